"""Puts the emulated device under torch_npu in this process."""

import ctypes
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from vllm_npu import envs
from vllm_npu.emulator import ascend_stack, build, cann, soc
from vllm_npu.errors import EmulatorBuildError, UnsupportedConfigError

# In the order of their dependencies. torch_npu finds them by name, as loaded already.
BEFORE_TORCH = (
    "libascendcl.so",
    "libhccl.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_op_compiler.so",
    "libacl_tdt_channel.so",
)
AFTER_TORCH = ("libopapi.so", "libatb.so")  # need torch's own libraries
OPERATORS = "libvllm_npu_emulator_aten.so"  # registers with torch_npu's device, so it comes after torch_npu
AUTOLOAD_VARIABLE = "TORCH_DEVICE_BACKEND_AUTOLOAD"


def load_library(folder: Path, name: str) -> None:
    path = folder / name
    try:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise EmulatorBuildError(
            f"cannot load {path} of the emulated device: {error}; delete its folder and run "
            "`python -m vllm_npu.emulator build`"
        ) from error


class LoaderWithDevice(importlib.abc.Loader):
    """Loads torch_npu, and around it what needs torch or torch_npu."""

    def __init__(self, real_loader: importlib.abc.Loader, folder: Path) -> None:
        self.real_loader = real_loader
        self.folder = folder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.real_loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        import torch

        for name in AFTER_TORCH:
            if (self.folder / name).is_file():
                load_library(self.folder, name)
        self.real_loader.exec_module(module)
        if (self.folder / OPERATORS).is_file():
            torch.ops.load_library(str(self.folder / OPERATORS))


class TorchNpuFinder(importlib.abc.MetaPathFinder):
    """Finds torch_npu where it is, to be loaded by LoaderWithDevice."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torch_npu":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = LoaderWithDevice(spec.loader, self.folder)
        return spec


def is_enabled() -> bool:
    return any(isinstance(finder, TorchNpuFinder) for finder in sys.meta_path)


def enable(soc_name: str | None = None) -> None:
    """From now on, `import torch_npu` works in this process and finds emulated devices.

    Call it before torch is imported (after, it works only if torch did not try to load torch_npu by itself). A second
    call changes nothing. `soc_name` is a chip ("Ascend910_9391") or a family ("A3"); the default is
    VLLM_NPU_EMULATOR_SOC, else A2's. Raises UnsupportedConfigError where a real CANN is there or where torch_npu has
    been imported already, EmulatorBuildError where the libraries cannot be built.
    """
    if is_enabled():
        return
    cann.refuse_if_found()
    if "torch_npu" in sys.modules:
        raise UnsupportedConfigError("torch_npu has been imported already; call vllm_npu.emulator.enable() before")
    os.environ[envs.EMULATOR_SOC.name] = soc.resolve(soc_name or envs.EMULATOR_SOC.read())
    folder = build.build()
    for name in BEFORE_TORCH:
        load_library(folder, name)
    # torch must not import torch_npu while it is half imported itself; who needs the device imports torch_npu.
    os.environ[AUTOLOAD_VARIABLE] = "0"
    sys.meta_path.insert(0, TorchNpuFinder(folder))
    ascend_stack.install()
