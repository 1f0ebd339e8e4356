"""Which chip this process runs on. Importing this module imports torch_npu, which makes c10d know the backend hccl."""

from functools import cache

import torch_npu

from vllm_npu.core.limits import DEVICES, DeviceLimits
from vllm_npu.errors import UnsupportedConfigError


@cache
def limits_of_this_chip() -> DeviceLimits:
    """What this process's NPU can run, with every version of MC2's ops. LOCAL.

    Raises UnsupportedConfigError for a chip of no known family.
    """
    name = str(torch_npu.npu.get_device_name())
    for limits in DEVICES.values():
        if name.startswith(limits.socs):
            return limits
    known = ", ".join(f"{limits.family} ({'*, '.join(limits.socs)}*)" for limits in DEVICES.values())
    raise UnsupportedConfigError(f"this NPU is a {name}, which is of no family that is known here: {known}")
