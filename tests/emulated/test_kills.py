"""Ranks over emulated HCCL that are killed: the same demands as over gloo (tests/ranks/test_watchdog.py)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.serving_ranks import DEADLINE, NUM_RANKS, kill_and_restart
from vllm_npu.emulator import launcher
from vllm_npu.transport.launch import ProcessRankPool, RankPool

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
    monkeypatch.setenv("VLLM_NPU_EMULATOR_LIMITS", "none")  # the hidden size is small
    assert kill_and_restart(emulated_pool, KILLS, tmp_path) == []
