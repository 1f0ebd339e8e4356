"""Ranks over emulated HCCL that are killed: the same demands as over gloo (tests/ranks/test_watchdog.py)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.serving_ranks import DEADLINE, NUM_RANKS, kill_and_restart, vote_of
from vllm_npu.emulator import launcher
from vllm_npu.tools.launch import ProcessRankPool, Rank, RankPool
from vllm_npu.tools.verification import limits_of_device
from vllm_npu.trust.self_test import run_self_test

pytestmark = pytest.mark.emulated

KILLS = int(os.environ.get("KILLS", "1"))  # 50 in the long form


@contextmanager
def emulated_pool() -> Iterator[RankPool]:
    with launcher.emulated_devices(NUM_RANKS), ProcessRankPool(NUM_RANKS, 2 * DEADLINE, "hccl") as pool:
        yield pool


def test_survivors_of_a_kill_name_the_dead_rank_and_a_restart_serves_the_same(
    tmp_path, monkeypatch, nothing_left_behind
):
    monkeypatch.setenv("HCCL_EXEC_TIMEOUT", str(int(DEADLINE)))
    # Else torch_npu may abort the process before it has reported.
    monkeypatch.setenv("TORCH_HCCL_ASYNC_ERROR_HANDLING", "0")
    monkeypatch.setenv("VLLM_NPU_EMULATOR_LIMITS", "none")  # the hidden size is small
    assert kill_and_restart(emulated_pool, KILLS, tmp_path) == []


def self_test(rank: Rank) -> float:
    groups = rank.groups(tp_size=1, dp_size=rank.num_ranks)
    exchanges = limits_of_device(rank).all2all
    return min(run_self_test(groups, vote_of(rank, groups), rank.device, exchanges=exchanges) for _ in range(2))


@pytest.mark.parametrize("soc", os.environ.get("SOCS", "310P").split(","))
def test_the_self_test_passes_on_a_chip_without_all_to_all_too(warm, monkeypatch, soc):
    monkeypatch.setenv("VLLM_NPU_EMULATOR_SOC", soc)
    with launcher.emulated_devices(2), ProcessRankPool(2, transport="hccl", start_method=warm) as pool:
        seconds = pool.run(self_test)  # raises where a collective gives wrong data
    assert all(0 < each < 60 for each in seconds)
