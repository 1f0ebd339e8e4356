"""The ops around the experts: Ascend's own ops for NPU tensors, and their definition in plain torch for all others."""

from importlib import import_module
from types import ModuleType

import torch

# Module by type of device. Both modules have the same functions. Each is imported at its first use.
OPS = {
    "cpu": "vllm_npu.device.portable_ops",
    "cuda": "vllm_npu.device.portable_ops",
    "npu": "vllm_npu.device.npu_ops",
}


def ops_of(x: torch.Tensor) -> ModuleType:
    """The module of the ops that run on the device of `x`."""
    return import_module(OPS[x.device.type])
