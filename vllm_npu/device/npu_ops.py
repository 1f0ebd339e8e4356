"""Ascend's ops, through torch_npu: the only module that calls it."""

from vllm_npu.errors import UnsupportedConfigError

try:
    import torch_npu
except ImportError as error:
    raise UnsupportedConfigError(
        f"NPU tensors need torch_npu, and importing it fails ({error}); install torch_npu and CANN, or run under the emulated "
        "Ascend device: python -m vllm_npu.emulator run"
    ) from error

__all__ = ["torch_npu"]
