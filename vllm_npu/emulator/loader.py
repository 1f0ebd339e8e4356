"""Makes `import torch_npu` of this process find the emulated device."""

import ctypes
import importlib.abc
import importlib.machinery
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from vllm_npu import envs
from vllm_npu.emulator import ascend_stack, build, cann, soc
from vllm_npu.emulator.amended_imports import find_amended
from vllm_npu.errors import EmulatorBuildError, UnsupportedConfigError

# A library comes after those that it needs. torch_npu then asks for them by name and finds them loaded.
BEFORE_TORCH = (
    "libascendcl.so",
    "libhccl.so",
    "libhcomm.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_op_compiler.so",
    "libacl_tdt_channel.so",
)
AFTER_TORCH = ("libopapi.so", "libatb.so", "libnnopbase.so")  # they need torch's own libraries
OPERATORS = "libvllm_npu_emulator_aten.so"  # registers operators for torch_npu's device, so torch_npu comes first
AUTOLOAD_VARIABLE = "TORCH_DEVICE_BACKEND_AUTOLOAD"
# torch_npu passes this file to aclInit from CANN 8.3 on. It names the device of threads that set none.
CONFIGURATION, CONFIGURATION_VARIABLE = "acl_default.json", "TORCH_ACL_INIT_CONFIG_PATH"
CONFIGURATION_SINCE = (8, 3)
COLLECT_ENV = "torch_npu.utils.collect_env"  # its get_cann_version gives torch.version.cann


def load_library(folder: Path, name: str) -> None:
    path = folder / name
    try:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise EmulatorBuildError(
            f"cannot load {path} of the emulated device: {error}; delete its folder and run "
            "`python -m vllm_npu.emulator build`"
        ) from error


def name_configuration(torch: ModuleType, torch_npu: ModuleType) -> None:
    """Name torch_npu's configuration where torch_npu would not find it, because it looks beside torch only."""
    assert torch.__file__ is not None
    assert torch_npu.__file__ is not None
    own = Path(torch_npu.__file__).with_name(CONFIGURATION)
    version = tuple(int(part) for part in re.findall(r"\d+", envs.EMULATOR_CANN.read())[:2])
    beside_torch = Path(torch.__file__).parent.parent / "torch_npu" / CONFIGURATION
    if version >= CONFIGURATION_SINCE and own.is_file() and not beside_torch.is_file():
        os.environ.setdefault(CONFIGURATION_VARIABLE, str(own))


def name_version(collect_env: ModuleType) -> None:
    """Name the emulated CANN's version. At each import, torch_npu would look for a file of CANN below ASCEND_HOME_PATH, or else
    below the working directory."""
    collect_env.__dict__["get_cann_version"] = envs.EMULATOR_CANN.read


class TorchNpuFinder(importlib.abc.MetaPathFinder):
    """Finds the installed torch_npu, and loads the emulator's other libraries before and after it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder  # of the emulator's libraries

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == COLLECT_ENV:
            return find_amended(fullname, path, after=name_version)
        if fullname != "torch_npu":
            return None
        return find_amended(fullname, path, before=self._load_after_torch, after=self._load_operators)

    def _load_after_torch(self, torch_npu: ModuleType) -> None:
        import torch  # the libraries need those of torch

        name_configuration(torch, torch_npu)
        for name in AFTER_TORCH:
            if (self._folder / name).is_file():
                load_library(self._folder, name)

    def _load_operators(self, _torch_npu: ModuleType) -> None:
        import torch

        if (self._folder / OPERATORS).is_file():
            torch.ops.load_library(str(self._folder / OPERATORS))


def is_enabled() -> bool:
    return any(isinstance(finder, TorchNpuFinder) for finder in sys.meta_path)


def enable(soc_name: str | None = None) -> None:
    """Make every later `import torch_npu` of this process work and find emulated devices.

    Call it before the import of torch. After that import, it works only if torch did not try to load torch_npu by itself. A
    second call changes nothing. `soc_name` is a chip ("Ascend910_9391") or a family ("A3"); the default is
    VLLM_NPU_EMULATOR_SOC. Raises UnsupportedConfigError if a real CANN is installed or torch_npu is imported already, and
    EmulatorBuildError if the libraries cannot be built.
    """
    if is_enabled():
        return
    cann.refuse_if_found()
    if "torch_npu" in sys.modules:
        raise UnsupportedConfigError("torch_npu has been imported already; call vllm_npu.emulator.enable() before")
    os.environ[envs.EMULATOR_SOC.name] = soc.resolve(soc_name or envs.EMULATOR_SOC.read())
    cann.set_variables()
    folder = build.build()
    for name in BEFORE_TORCH:
        load_library(folder, name)
    # Unless the user wants it, torch does not import torch_npu by itself. A program that needs the device imports torch_npu.
    os.environ.setdefault(AUTOLOAD_VARIABLE, "0")
    sys.meta_path.insert(0, TorchNpuFinder(folder))
    ascend_stack.install()
