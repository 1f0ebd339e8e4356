"""The nccl transport on CUDA tensors keeps the contract of all transports, and a rank that ends is named."""

import os
import threading
import time

import pytest
import torch

from tests.cuda.conftest import NUM_RANKS
from tests.ranks.test_transport_contract import CONTRACT, REFUSED, is_refused, ordered_sums, with_tensors_on_its_device
from vllm_npu.errors import RankFailureError
from vllm_npu.tools.launch import ProcessRankPool, Rank
from vllm_npu.trust.mailboxes import ANSWER_SECONDS
from vllm_npu.trust.step_lookout import StepLookout
from vllm_npu.trust.watchdog import GRACE_SECONDS

pytestmark = pytest.mark.cuda

GRIDS = [(1, NUM_RANKS), (NUM_RANKS, 1)]  # (tp_size, dp_size): each has a group of one rank and a group of all
# NCCL adds in its own order and rounds each sum. Two ranks give the same sum in any order, so only then ordered_sums holds.
PROMISES = [promise for promise, check in CONTRACT.items() if NUM_RANKS == 2 or check is not ordered_sums]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("promise", PROMISES)
def test_contract(gpus, grid, promise):
    gpus.run(with_tensors_on_its_device, CONTRACT[promise], grid)


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_do_not_fit_are_refused_before_rows_move(gpus, name):
    gpus.run(with_tensors_on_its_device, is_refused, (NUM_RANKS, 1), name)


def waits_for_a_rank_that_has_ended(rank: Rank) -> RankFailureError | None:
    """The last rank ends without its part of a collective. The others wait for the GPU, in a thread that never returns."""
    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    x = ep.all_reduce(torch.ones(4, device="cuda"))
    torch.cuda.synchronize()
    if rank.rank == rank.num_ranks - 1:
        os._exit(1)
    assert rank.watchdog is not None
    lookout = StepLookout(rank.watchdog, look_seconds=1.0)

    def step() -> None:
        with lookout.waiting():
            ep.all_reduce(x)
            torch.cuda.synchronize()

    threading.Thread(target=step, daemon=True).start()
    give_up = time.monotonic() + 30  # NCCL itself ends the process after the pool's 60 s
    while time.monotonic() < give_up:
        try:
            lookout.check()
        except RankFailureError as error:
            return error
        time.sleep(0.1)
    return None


DEADLINE = 8.0


def outlives_a_rank_that_has_stopped(rank: Rank, in_a_graph: bool) -> tuple[float, Exception | None]:
    """The last rank stops before its part of two collectives on two communicators. The others wait for the GPU in their main
    thread. Returns the seconds of the wait, and the error of the check after it."""
    groups = rank.groups(tp_size=1, dp_size=rank.num_ranks)
    x = torch.ones(4, device="cuda")

    def step() -> torch.Tensor:
        return groups.dp.all_reduce(groups.ep.all_reduce(x))

    step()
    torch.cuda.synchronize()
    if in_a_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        graph.replay()
        torch.cuda.synchronize()
    if rank.rank == rank.num_ranks - 1:
        time.sleep(DEADLINE + GRACE_SECONDS + ANSWER_SECONDS + 5)
        return 0.0, None
    assert rank.watchdog is not None
    rank.watchdog.deadline = DEADLINE
    lookout = StepLookout(rank.watchdog, look_seconds=1.0, groups=(groups.tp, groups.dp, groups.ep))
    started = time.monotonic()
    with lookout.waiting():
        graph.replay() if in_a_graph else step()
        torch.cuda.synchronize()
    seconds = time.monotonic() - started
    if in_a_graph:
        graph.reset()  # NCCL keeps a communicator as long as graphs hold its kernels
    try:
        lookout.check()
    except RankFailureError as error:
        return seconds, error
    return seconds, None


@pytest.mark.parametrize("in_a_graph", [False, True])
def test_a_wait_for_a_rank_that_stopped_ends_with_its_name_and_the_process_can_end(in_a_graph):
    with ProcessRankPool(NUM_RANKS, timeout=60, transport="nccl") as pool:
        *waiting, _ = pool.run(outlives_a_rank_that_has_stopped, in_a_graph)
        processes = list(pool._processes)
    for (seconds, error), process in zip(waiting, processes, strict=False):
        assert isinstance(error, RankFailureError), error
        assert error.ranks == (NUM_RANKS - 1,)
        assert seconds < DEADLINE + GRACE_SECONDS + ANSWER_SECONDS + 2, "NCCL itself would end the wait after 60 s"
        assert process.exitcode == 0, "the process did not end by itself"


def test_a_rank_that_ended_is_named_while_the_others_wait_for_their_gpus():
    with ProcessRankPool(NUM_RANKS, timeout=60, transport="nccl") as pool:
        *waiting, _ = pool.outcomes(waits_for_a_rank_that_has_ended)
    for error in waiting:
        assert isinstance(error, RankFailureError), error
        assert error.ranks == (NUM_RANKS - 1,)
        assert (error.operation, error.group) == ("all_reduce", "ep")
