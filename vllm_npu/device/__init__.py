"""The ops around the experts: Ascend's own on NPU tensors, their definition in plain torch elsewhere."""

from importlib import import_module
from types import ModuleType

import torch

# By type of device; both modules have the same functions. Imported when first used.
OPS = {
    "cpu": "vllm_npu.device.portable_ops",
    "cuda": "vllm_npu.device.portable_ops",
    "npu": "vllm_npu.device.npu_ops",
}


def ops_of(x: torch.Tensor) -> ModuleType:
    """The ops that run on this tensor's device."""
    return import_module(OPS[x.device.type])
