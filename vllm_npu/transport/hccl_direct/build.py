"""The library of the token operators, csrc_npu/ops. This module runs without torch.

python -m vllm_npu.transport.hccl_direct.build     builds the library and prints its folder (about 40 seconds)
"""

import sys
from pathlib import Path

from vllm_npu.errors import NativeBuildError
from vllm_npu.native_build import Component

BUILD_COMMAND = "python -m vllm_npu.transport.hccl_direct.build"

TOKEN_OPS = Component(
    "ops",
    "the library of token operators on HCCL",
    "libvllm_npu_ops.so",
    install_hint="in a checkout: pip install '.[ascend]', or '.[emulator]' without an NPU",
)


def built_library() -> Path:
    """The path of the library. Never builds it, because a serving process calls this at its first collective.

    Raises NativeBuildError, which names BUILD_COMMAND, where the library is not built for these sources, this torch and
    this torch_npu.
    """
    library = TOKEN_OPS.library_folder() / TOKEN_OPS.product
    if not library.is_file():
        raise NativeBuildError(
            f"the token operators on HCCL are not built; run {BUILD_COMMAND} and start the ranks again"
        )
    return library


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{TOKEN_OPS.build()}\n")
    except NativeBuildError as fault:
        sys.exit(f"vllm_npu: {fault}")
