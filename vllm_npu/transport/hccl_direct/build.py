"""The library of csrc_npu/ops. Runs without torch.

python -m vllm_npu.transport.hccl_direct.build     builds it and prints its folder
"""

import sys

from vllm_npu.errors import NativeBuildError
from vllm_npu.native_build import Component

TOKEN_OPS = Component("ops", "token collectives on HCCL", "libvllm_npu_ops.so", install_hint="pip install cmake ninja")

if __name__ == "__main__":
    try:
        sys.stdout.write(f"{TOKEN_OPS.build()}\n")
    except NativeBuildError as fault:
        sys.exit(f"vllm_npu: {fault}")
