"""Ranks that survive: a stopped process is named on all others in seconds, and after SIGCONT all go on in a new epoch."""

import os
import threading
import time
from dataclasses import dataclass, field

import pytest
import torch

from tests.serving_ranks import stop_this_process
from tests.time_limits import on_this_machine
from vllm_npu import envs
from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.errors import RankFailureError, TransportError
from vllm_npu.strategies.select import build
from vllm_npu.strategies.table import STRATEGIES
from vllm_npu.tools.launch import ProcessRankPool, Rank
from vllm_npu.tools.verification import Case, CaseTensors, difference_of
from vllm_npu.transport.base import Groups
from vllm_npu.trust.agreement import agree
from vllm_npu.trust.trace import read_traces
from vllm_npu.trust.trace_comparison import compare
from vllm_npu.trust.watchdog import FAILURE_SECONDS

STEPS, LAYERS = 8, 2
STOP_AT = 3  # step
VICTIM = 1
QUIET_DEADLINE = 3.0  # seconds for a collective on a quiet machine
LARGE = 2048  # hidden size of the layers whose messages go through shared memory
NUM_TOKENS = 64


@dataclass
class Life:
    """What one rank saw."""

    steps: int = 0  # that it served, repeated ones included
    faults: list[str] = field(default_factory=list)  # wrong data
    errors: list[tuple[RankFailureError, float]] = field(default_factory=list)  # with seconds from the step's begin
    epoch: int = 0
    recovered_in: float = 0.0  # seconds from the last error to a step in the new epoch


def one_step(rank: Rank, groups: Groups, step: int) -> str | None:
    """A vote, and layers whose output is compared with the reference."""
    strategy = list(STRATEGIES)[step % len(STRATEGIES)]
    counts = (NUM_TOKENS, 3) if rank.num_ranks % 2 == 0 else (NUM_TOKENS, 3, 0)
    agree({"strategy": strategy, "step": step}, groups.ep)
    for layer in range(LAYERS):
        case = Case(
            strategy=strategy,
            tp_size=groups.topology.tp_size,
            dp_size=groups.topology.dp_size,
            num_tokens_across_dp=counts,
            hidden_size=LARGE if layer else 32,
            width=LARGE if layer else 32,
            seed=10 * step + layer,
        )
        tensors = CaseTensors.of(case)
        inputs = tensors.input_of(groups.topology, case.sharding, rank.device)
        plan = StepPlan(num_tokens_across_dp=counts, sharding=TokenSharding.REPLICATED)
        experts = tensors.experts_of(groups.topology, rank.device)
        output = build(strategy, groups, case.num_experts).run(*inputs, experts, plan).hidden_states
        fault = difference_of(rank.rank, output, tensors.expected_on(groups.topology, case.sharding), case)
        if fault:
            return fault
    return None


def live(rank: Rank, tp_size: int, stopped_for: float) -> Life:
    """Serve all steps. Rank VICTIM is stopped in the middle of step STOP_AT, once."""
    dp_size, seen, step = rank.num_ranks // tp_size, Life(), 0
    groups = rank.groups(tp_size=tp_size, dp_size=dp_size)
    may_stop = rank.rank == VICTIM
    while step < STEPS:
        began = time.monotonic()
        if may_stop and step == STOP_AT:
            may_stop = False
            threading.Timer(0.002, stop_this_process, (stopped_for,)).start()
        try:
            fault = one_step(rank, groups, step)
            seen.faults += [fault] if fault else []
            seen.steps += 1
            step += 1
            continue
        except RankFailureError as error:
            seen.errors.append((error.with_traceback(None), time.monotonic() - began))
        failed = time.monotonic()
        old = groups
        while True:
            try:
                rank.renew()
                groups = rank.groups(tp_size=tp_size, dp_size=dp_size)
                [behind] = groups.ep.maximum_start([-step]).finish()
                break
            except RankFailureError as error:
                seen.errors.append((error.with_traceback(None), 0.0))
        step = -behind
        seen.epoch = rank.watchdog.epoch
        seen.recovered_in = time.monotonic() - failed
        with pytest.raises(TransportError, match="has left the group"):
            old.ep.barrier()
    return seen


@pytest.mark.parametrize(("num_ranks", "tp_size"), [(3, 1), (4, 2)])
def test_a_stopped_rank_is_named_and_all_serve_on_when_it_continues(
    num_ranks, tp_size, tmp_path, monkeypatch, nothing_left_behind
):
    """Small messages through sockets, large ones through shared memory; every strategy before and after."""
    deadline = on_this_machine(QUIET_DEADLINE)
    stopped_for = deadline + 5.0
    monkeypatch.setenv(envs.RECORD.name, str(tmp_path))
    with ProcessRankPool(num_ranks, timeout=deadline, start_method="spawn") as pool:
        lives = pool.run(live, tp_size, stopped_for)
    [epoch] = {seen.epoch for seen in lives}  # above 1 where the host had no time for a rank, and the others named it
    assert epoch >= 1
    for rank, seen in enumerate(lives):
        assert seen.faults == []
        assert seen.steps >= STEPS
        assert all(error.ranks for error, _ in seen.errors), seen.errors
        first, seconds = seen.errors[0]
        assert first.ranks == (VICTIM,), f"rank {rank}: {first}"
        if rank != VICTIM:
            assert seconds < deadline + FAILURE_SECONDS
    others = [seen for rank, seen in enumerate(lives) if rank != VICTIM]
    texts = [str(seen.errors[0][0]) for seen in others]
    assert any("is stopped: it accepts connections" in text for text in texts), texts
    assert max(seen.recovered_in for seen in others) < stopped_for + FAILURE_SECONDS
    print(f"named after {max(seen.errors[0][1] for seen in others):.1f} s; "
          f"serving again {max(seen.recovered_in for seen in others):.1f} s later")  # fmt: skip
    traces = read_traces([tmp_path])
    newest = [[call for call in trace.calls if call.group.epoch == epoch] for trace in traces]
    assert all(newest)
    assert [finding for finding in compare(traces) if finding.group.epoch == epoch] == []


def fail_in_the_step(rank: Rank) -> tuple[list[RankFailureError], list[float]]:
    """Rank VICTIM fails in its own step, tells the others, and all meet again."""
    groups = rank.groups(tp_size=1, dp_size=rank.num_ranks)
    errors = []
    try:
        groups.ep.barrier()
        if rank.rank == VICTIM:
            rank.watchdog.tell_fault(ValueError("no such expert"))
        else:
            groups.ep.all_gather(torch.ones(rank.rank + 1, 2), [1, 2, 3][: rank.num_ranks])
    except RankFailureError as error:
        errors.append(error.with_traceback(None))
    rank.renew()
    groups = rank.groups(tp_size=1, dp_size=rank.num_ranks)
    return errors, groups.ep.all_gather(torch.full((1,), float(rank.rank))).tolist()


def test_a_rank_that_fails_in_its_own_step_is_named():
    with ProcessRankPool(3, timeout=on_this_machine(QUIET_DEADLINE), start_method="forkserver") as pool:
        outcomes = pool.run(fail_in_the_step)
    for rank, (errors, gathered) in enumerate(outcomes):
        assert gathered == [0, 1, 2]
        assert [error.ranks for error in errors] == ([] if rank == VICTIM else [(VICTIM,)])
        if errors:
            assert "rank 1 failed in its own step" in str(errors[0])
            assert "rank 1 reports: ValueError: no such expert" in str(errors[0])


def lose_a_rank(rank: Rank) -> tuple[tuple[int, ...], tuple[int, ...], str, float]:
    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    ep.barrier()
    if rank.rank == VICTIM:
        os._exit(1)
    try:
        ep.barrier()
    except RankFailureError as error:
        first = error.ranks
    began = time.monotonic()
    try:
        rank.renew()
    except RankFailureError as error:
        return first, error.ranks, str(error), time.monotonic() - began
    raise AssertionError("a rank that ended cannot come")


def test_without_a_rank_that_ended_no_epoch_begins_and_the_error_names_it():
    with ProcessRankPool(3, timeout=on_this_machine(QUIET_DEADLINE), start_method="forkserver") as pool:
        outcomes = pool.outcomes(lose_a_rank)
    for rank in (0, 2):
        first, second, text, seconds = outcomes[rank]
        assert first == second == (VICTIM,)
        assert "rank 1 has ended, or cannot be reached" in text
        assert "for epoch 1" in text
        assert seconds < FAILURE_SECONDS
