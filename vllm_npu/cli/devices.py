"""What the ranks of verify and bench run on."""

from collections.abc import Iterator
from contextlib import contextmanager

from vllm_npu.emulator import cann, launcher
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.transport.launch import RANK_POOLS, RankPool


@contextmanager
def rank_pool(transport: str, ranks: int) -> Iterator[tuple[RankPool, str]]:
    """Ranks over this transport, and the name of their device. hccl without CANN: the emulated Ascend device."""
    if transport not in RANK_POOLS:
        raise UnsupportedConfigError(f"unknown transport {transport!r}; there are: {', '.join(RANK_POOLS)}")
    if transport == "hccl" and cann.find() is None:
        with launcher.emulated_devices(ranks) as chip, RANK_POOLS[transport](ranks) as pool:
            yield pool, f"emulated {chip}"
    else:
        with RANK_POOLS[transport](ranks) as pool:
            yield pool, {"hccl": "NPU", "nccl": "GPU"}.get(transport, "CPU")
