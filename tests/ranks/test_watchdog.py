"""Ranks that end or are late: every other one says so, by name and in time; nothing is left, and a restart serves the same."""

import os
import time
from pathlib import Path

import torch

from tests import serving_ranks
from tests.serving_ranks import DEADLINE, NUM_RANKS, Kill, check_kill, serve
from vllm_npu.errors import RankFailureError
from vllm_npu.transport.launch import ProcessRankPool, Rank, ThreadRankPool

KILLS = int(os.environ.get("KILLS", "2"))  # 50 in the long form
SHARED_MEMORY = Path("/dev/shm")


def test_survivors_of_a_kill_name_the_dead_rank_and_a_restart_serves_the_same(tmp_path):
    """Each pool first serves all steps, which must give the tokens that threads give; then a rank of it is killed."""
    with ThreadRankPool(NUM_RANKS) as threads:
        expected = [report.tokens for report in threads.run(serve, None, None)]
    files_before = set(SHARED_MEMORY.iterdir())
    faults, slowest, pids = [], 0.0, []
    for number in range(KILLS + 1):
        with ProcessRankPool(NUM_RANKS, timeout=DEADLINE) as pool:
            started = time.monotonic()
            assert [report.tokens for report in pool.run(serve, None, None)] == expected, f"after {number} restarts"
            kill = Kill.drawn(number, (time.monotonic() - started) / serving_ranks.STEPS)
            pids += [process.pid for process in pool._processes]
            if number < KILLS:
                outcomes = pool.outcomes(serve, kill, str(tmp_path / f"moment{number}"))
                fault = check_kill(outcomes, kill)
                faults += [f"{kill}: {fault}"] if fault else []
                slowest = max(slowest, *(outcome.seconds_to_error for rank, outcome in enumerate(outcomes)
                                         if rank != kill.rank and isinstance(outcome, serving_ranks.Report)))  # fmt: skip
    print(f"{KILLS} kills over gloo: {len(faults)} faults; slowest report {slowest:.1f} s after the kill")
    assert faults == []
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
    assert {path for path in set(SHARED_MEMORY.iterdir()) - files_before if path.name.startswith("vllm_npu")} == set()


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
    with ProcessRankPool(3, timeout=deadline) as pool:
        outcomes = pool.run(be_late, 9.0)
    for rank in (0, 2):
        error, seconds = outcomes[rank]
        assert error.ranks == (1,)
        assert "rank 1 is late (process " in str(error)
        assert deadline <= seconds < deadline + 9
    error, _ = outcomes[1]
    assert "rank 0 reports: send_recv on group 'ep'" in str(error)
