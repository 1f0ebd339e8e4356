"""The chip of this process. Imports torch_npu, which registers the backend hccl with torch.distributed."""

from functools import cache

from vllm_npu.core.limits import DEVICES, DeviceLimits
from vllm_npu.errors import UnsupportedConfigError

try:
    import torch_npu as torch_npu  # device/npu_ops takes it from here
except ImportError as error:
    raise UnsupportedConfigError(
        f"NPU tensors need torch_npu, and importing it fails ({error}); install torch_npu and CANN, or run under the emulated "
        "Ascend device: python -m vllm_npu.emulator run"
    ) from error


@cache
def limits_of_this_chip() -> DeviceLimits:
    """Limits of this process's NPU. DeviceLimits.of_version() adapts them to the MC2 ops of torch_npu. LOCAL.

    Raises UnsupportedConfigError for a chip of an unknown family.
    """
    name = str(torch_npu.npu.get_device_name())
    for limits in DEVICES.values():
        if name.startswith(limits.socs):
            return limits
    known = ", ".join(f"{limits.family} ({'*, '.join(limits.socs)}*)" for limits in DEVICES.values())
    raise UnsupportedConfigError(f"this NPU is a {name}, which belongs to none of the known families: {known}")
