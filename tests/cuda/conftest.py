"""Starts ranks over NCCL: one process for each GPU of this machine, for 2 to 8 GPUs. Two ranks share a lone GPU, where the
kernels of a rank run while the other rank has its turn: that shows what they compute, not how they run beside each other."""

import os
from collections.abc import Iterator

import pytest
import torch

from vllm_npu import envs
from vllm_npu.tools.launch import ProcessRankPool, RankPool

SHARED = torch.cuda.device_count() == 1
if SHARED:
    os.environ.setdefault(envs.SHARE_GPUS.name, "1")
NUM_RANKS = 1 << (
    max(2, min(torch.cuda.device_count(), 8)).bit_length() - 1
)  # a power of two, to divide the experts evenly


def missing() -> str | None:
    """Return the reason why this machine cannot run these tests, or None if it can."""
    if SHARED:
        return None
    if torch.cuda.device_count() < NUM_RANKS or not all(
        torch.cuda.can_device_access_peer(0, peer) for peer in range(1, NUM_RANKS)
    ):
        return "needs an NVIDIA GPU, or several of one host with peer access"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    for item in items:
        if "tests/cuda" in item.path.as_posix() and item.get_closest_marker("cuda") and reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def gpus() -> Iterator[RankPool]:
    with ProcessRankPool(NUM_RANKS, timeout=60, transport="nccl") as pool:
        yield pool
