"""Ranks that end or are late: every other one says so, by name and in time; nothing is left, and a restart serves the same."""

import multiprocessing
import os
import time
from functools import partial

import torch

from tests.serving_ranks import DEADLINE, NUM_RANKS, kill_and_restart
from vllm_npu.errors import RankFailureError
from vllm_npu.transport.launch import ProcessRankPool, Rank

KILLS = int(os.environ.get("KILLS", "2"))  # 50 in the long form


def test_survivors_of_a_kill_name_the_dead_rank_and_a_restart_serves_the_same(tmp_path, nothing_left_behind):
    multiprocessing.set_forkserver_preload(["tests.serving_ranks"])
    pool = partial(ProcessRankPool, NUM_RANKS, DEADLINE, start_method="forkserver")
    assert kill_and_restart(pool, KILLS, tmp_path) == []


def be_late(rank: Rank, seconds: float) -> tuple[RankFailureError | None, float]:
    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    ep.barrier()
    started = time.monotonic()
    if rank.rank == 1:
        time.sleep(seconds)
    try:
        ep.all_gather(torch.zeros(rank.rank, 3), [0, 1, 2])
    except RankFailureError as error:
        return error, time.monotonic() - started
    return None, 0.0


def test_a_late_rank_is_named_at_the_deadline_also_to_itself():
    """By an uneven gather: sends and receives, which gloo lets wait for ever."""
    deadline = 2.0
    with ProcessRankPool(3, timeout=deadline, start_method="forkserver") as pool:
        outcomes = pool.run(be_late, 9.0)
    for rank in (0, 2):
        error, seconds = outcomes[rank]
        assert error.ranks == (1,)
        assert "rank 1 is late (process " in str(error)
        assert deadline <= seconds < deadline + 9
    error, _ = outcomes[1]
    assert "rank 0 reports: send_recv on group 'ep'" in str(error)
