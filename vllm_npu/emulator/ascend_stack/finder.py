"""Answers imports of the modules in the table of this package's docstring."""

import ctypes
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from vllm_npu import envs
from vllm_npu.emulator import soc

STACK = "vllm_ascend"  # the finder has nothing to do where this is not installed

# The members of vllm-ascend's AscendDeviceType, by the family's name.
DEVICE_TYPES = {"A2": "A2", "A3": "A3", "310P": "_310P", "A5": "A5"}

Fill = Callable[[ModuleType], None]


def fill_acl(module: ModuleType) -> None:
    module.__path__ = []  # a package


def fill_acl_rt(module: ModuleType) -> None:
    def memcpy(destination: int, destination_size: int, source: int, size: int, kind: int) -> int:
        """pyACL's signature: addresses and sizes in bytes, aclrtMemcpyKind; returns ACL's code."""
        copy = ctypes.CDLL("libascendcl.so").aclrtMemcpy
        copy.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        copy.restype = ctypes.c_int
        return int(copy(destination, destination_size, source, size, kind))

    module.__dict__["memcpy"] = memcpy


def fill_build_info(module: ModuleType) -> None:
    family = soc.family_of(envs.EMULATOR_SOC.read())
    module.__dict__["__device_type__"] = DEVICE_TYPES[family.name]


def fill_custom_ops(_module: ModuleType) -> None:
    from vllm_npu.emulator.ascend_stack import custom_ops

    custom_ops.register()


def amend_block_table(module: ModuleType) -> None:
    from vllm_npu.emulator.ascend_stack.slot_mapping import SlotMappingKernel

    module.__dict__["_compute_slot_mapping_kernel"] = SlotMappingKernel()


def amend_formats(_module: ModuleType) -> None:
    from vllm_npu.emulator.ascend_stack import custom_ops

    custom_ops.keep_formats_plain()


def leave_empty(_module: ModuleType) -> None:
    """For a module that is imported for its effects only."""


MADE: dict[str, Fill] = {
    "acl": fill_acl,
    "acl.rt": fill_acl_rt,
    "torchvision._meta_registrations": leave_empty,
    "vllm_ascend._build_info": fill_build_info,
    "vllm_ascend.vllm_ascend_C": fill_custom_ops,
}
AMENDED: dict[str, Fill] = {
    "vllm.v1.worker.block_table": amend_block_table,
    "vllm_ascend.utils": amend_formats,
}


class MadeModuleLoader(importlib.abc.Loader):
    """Makes a module that has no file."""

    def __init__(self, fill: Fill) -> None:
        self.fill = fill

    def exec_module(self, module: ModuleType) -> None:
        self.fill(module)


class AmendingLoader(importlib.abc.Loader):
    """Loads a module from its file, then changes it."""

    def __init__(self, real_loader: importlib.abc.Loader, amend: Fill) -> None:
        self.real_loader = real_loader
        self.amend = amend

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.real_loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.real_loader.exec_module(module)
        self.amend(module)


class AscendStackFinder(importlib.abc.MetaPathFinder):
    """Finds what MADE and AMENDED list."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname in MADE:
            return importlib.machinery.ModuleSpec(
                fullname, MadeModuleLoader(MADE[fullname]), origin=f"made by {__name__}"
            )
        if fullname not in AMENDED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = AmendingLoader(spec.loader, AMENDED[fullname])
        return spec


def install() -> None:
    """From now on, this process's imports find what vllm-ascend needs. Changes nothing where vllm-ascend is not installed."""
    if importlib.util.find_spec(STACK) is not None:
        sys.meta_path.insert(0, AscendStackFinder())
