"""The emulated Ascend device: the real torch_npu runs on a machine without CANN and without an NPU.

    python -m vllm_npu.emulator run --nproc 4 --soc Ascend910_9391 script.py

or, in a script, before the import of torch:

    import vllm_npu.emulator
    vllm_npu.emulator.enable()

docs/emulator.md says what is emulated, and what that proves.
"""

from vllm_npu.emulator.loader import enable

__all__ = ["enable"]
