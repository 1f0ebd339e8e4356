"""The emulated Ascend device: the real torch_npu on a machine without CANN and without an NPU.

    python -m vllm_npu.emulator run --nproc 4 --soc Ascend910_9391 script.py

or, in a script, before torch is imported:

    import vllm_npu.emulator
    vllm_npu.emulator.enable()

What is emulated, and what that proves, is in docs/emulator.md.
"""

from vllm_npu.emulator.loader import enable

__all__ = ["enable"]
