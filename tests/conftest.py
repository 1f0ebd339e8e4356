"""Settings and fixtures of all tests."""

from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

from vllm_npu.transport.launch import RANK_POOLS, RankPool

# The same examples in every run: a failure on one machine is a failure on all.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=60, print_blob=True)
settings.load_profile("ci")

POOL_TIMEOUT = 20.0  # seconds


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[str, int], RankPool]]:
    """pools(kind, num_ranks) is a pool of RANK_POOLS, started when first asked for and shared by all tests."""
    opened: dict[tuple[str, int], RankPool] = {}

    def pool(kind: str, num_ranks: int) -> RankPool:
        if (kind, num_ranks) not in opened:
            opened[kind, num_ranks] = RANK_POOLS[kind](num_ranks, timeout=POOL_TIMEOUT)
        return opened[kind, num_ranks]

    yield pool
    for each in opened.values():
        each.close()
