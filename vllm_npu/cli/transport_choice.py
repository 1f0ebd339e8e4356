"""The option --transport of verify and bench."""

import sys

from vllm_npu.tools.rank_pools import SYMMETRIC, TRANSPORT_CHOICES, split_symmetric

BETWEEN_PROCESSES = [name for name in TRANSPORT_CHOICES if name != "threaded"]


def chosen_transport(transport: str, strategy: str | None) -> tuple[str, str | None]:
    """split_symmetric(), with a line on standard error where the user's choice stands for another one."""
    if transport == SYMMETRIC and strategy in (None, SYMMETRIC):
        print("--transport symmetric: ranks meet over nccl, and only strategy symmetric moves tokens", file=sys.stderr)
    return split_symmetric(transport, strategy)
