"""Finder for imports of the modules that the docstring of this package lists."""

import ctypes
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from vllm_npu import envs
from vllm_npu.emulator import soc
from vllm_npu.emulator.amended_imports import Step, do_nothing, find_amended

STACK = "vllm_ascend"  # without this package, the finder is not installed

# Names of families, with vllm-ascend's AscendDeviceType of each.
DEVICE_TYPES = {"A2": "A2", "A3": "A3", "310P": "_310P", "A5": "A5"}


# The operators of fla_npu that vllm-ascend 0.30 imports by name when it starts. Models with linear attention call them.
LINEAR_ATTENTION = (
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "chunk_kda_fwd",
    "recurrent_gated_delta_rule",
    "recurrent_kda",
)


def fill_package(module: ModuleType) -> None:
    module.__path__ = []  # makes the module a package


def fill_linear_attention(module: ModuleType) -> None:
    for name in LINEAR_ATTENTION:
        module.__dict__[name] = _refusing(f"{module.__name__}.{name}")


def _refusing(name: str) -> Callable[..., None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError(f"{name} is not emulated: the emulated device runs no model with linear attention")

    return refuse


def fill_acl_rt(module: ModuleType) -> None:
    def memcpy(destination: int, destination_size: int, source: int, size: int, kind: int) -> int:
        """pyACL's function: addresses, sizes in bytes, an aclrtMemcpyKind. Returns ACL's error code."""
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


def amend_slot_mapping(module: ModuleType) -> None:
    from vllm_npu.emulator.ascend_stack.slot_mapping import SlotMappingKernel

    module.__dict__["_compute_slot_mapping_kernel"] = SlotMappingKernel()


def amend_formats(_module: ModuleType) -> None:
    from vllm_npu.emulator.ascend_stack import custom_ops

    custom_ops.keep_formats_plain()


def amend_transfer_engine(module: ModuleType) -> None:
    real: type[Any] = module.__dict__["TransferEngine"]

    class TransferEngine(real):
        """Mooncake's engine, over TCP where vllm-ascend asks for its transport of Ascend."""

        def initialize(self, local_hostname: str, metadata_server: str, protocol: str, device_name: str) -> int:
            by = "tcp" if protocol == "ascend" else protocol
            return int(super().initialize(local_hostname, metadata_server, by, device_name))

    module.__dict__["TransferEngine"] = TransferEngine


MADE: dict[str, Step] = {
    "acl": fill_package,
    "acl.rt": fill_acl_rt,
    "fla_npu": fill_package,
    "fla_npu.ops": fill_package,
    "fla_npu.ops.ascendc": fill_linear_attention,
    "torchvision._meta_registrations": do_nothing,
    "vllm_ascend._build_info": fill_build_info,
    "vllm_ascend.vllm_ascend_C": fill_custom_ops,
}
AMENDED: dict[str, Step] = {
    "mooncake.engine": amend_transfer_engine,
    "vllm.v1.worker.block_table": amend_slot_mapping,
    "vllm_ascend.ops.triton.compute_slot_mapping": amend_slot_mapping,
    "vllm_ascend.utils": amend_formats,
}


class MadeModuleLoader(importlib.abc.Loader):
    """Makes a module without a file."""

    def __init__(self, fill: Step) -> None:
        self.fill = fill

    def exec_module(self, module: ModuleType) -> None:
        self.fill(module)


class AscendStackFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of MADE and AMENDED."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname in MADE:
            return importlib.machinery.ModuleSpec(
                fullname, MadeModuleLoader(MADE[fullname]), origin=f"made by {__name__}"
            )
        if fullname not in AMENDED:
            return None
        return find_amended(fullname, path, after=AMENDED[fullname])


def install() -> None:
    """Make later imports of this process find what vllm-ascend needs. Without vllm-ascend, do nothing."""
    if importlib.util.find_spec(STACK) is not None:
        sys.meta_path.insert(0, AscendStackFinder())
