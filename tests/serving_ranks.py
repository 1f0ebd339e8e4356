"""Ranks that serve without vLLM: steps of a few MoE layers with a vote before each, whose "tokens" are known in advance."""

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.errors import RankFailureError, VllmNpuError
from vllm_npu.strategies.select import build
from vllm_npu.strategies.table import STRATEGIES
from vllm_npu.tools.launch import Rank, RankPool, ThreadRankPool
from vllm_npu.tools.verification import Case, CaseTensors
from vllm_npu.transport.base import Groups, Transport
from vllm_npu.transport.gloo import GlooTransport
from vllm_npu.trust.agreement import agree
from vllm_npu.trust.self_test import run_self_test

TP, DP = 2, 2
NUM_RANKS = TP * DP
STEPS, LAYERS = 12, 3
DEADLINE = 10.0  # seconds: of a collective
REPORT_SECONDS = 1.0  # for a failed rank's report to reach the test


def stop_this_process(seconds: float) -> None:
    """SIGSTOP, and SIGCONT from another process."""
    subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


@dataclass(frozen=True)
class Kill:
    """The victim ends itself `seconds` after it has begun a step."""

    rank: int
    step: int
    seconds: float

    @classmethod
    def drawn(cls, seed: int, step_seconds: float) -> "Kill":
        draw = random.Random(seed)
        return cls(draw.randrange(NUM_RANKS), draw.randrange(1, STEPS), draw.uniform(0, step_seconds))


@dataclass(frozen=True)
class Report:
    """What a rank's serving came to."""

    tokens: list[list[int]]  # of each step
    error: VllmNpuError | None
    seconds_to_error: float  # from the moment of the kill


def serve(rank: Rank, kill: Kill | None, moment: str | None) -> Report:
    """Steps with drawn token counts through every strategy; integers, so that the tokens are the same on any transport.

    `moment`: a file in which the victim notes when it ended.
    """
    groups = rank.groups(tp_size=TP, dp_size=DP)
    vote = vote_of(rank, groups)
    topology = groups.topology
    served: list[list[int]] = []
    try:
        if kill is None:
            run_self_test(groups, vote, rank.device)
        for step in range(STEPS):
            draw = random.Random(step)
            strategy = draw.choice(list(STRATEGIES))
            counts = tuple(draw.choice([0, 1, 3, 8, 17]) for _ in range(DP))
            if kill is not None and (kill.rank, kill.step) == (rank.rank, step):
                threading.Timer(kill.seconds, end_at, (moment,)).start()
            agree(f"{strategy} {counts}", vote)
            for layer in range(LAYERS):
                case = Case(
                    strategy=strategy, tp_size=TP, dp_size=DP, num_tokens_across_dp=counts, seed=100 * step + layer
                )
                tensors = CaseTensors.of(case)
                plan = StepPlan(num_tokens_across_dp=counts, sharding=TokenSharding.REPLICATED)
                experts = tensors.experts_of(topology, rank.device)
                hidden_states, weights, ids = tensors.input_of(topology, case.sharding, rank.device)
                output = build(strategy, groups, case.num_experts).run(hidden_states, weights, ids, experts, plan)
                served.append(output.hidden_states.cpu().argmax(1).tolist() if hidden_states.shape[0] else [])
        if kill is not None and kill.rank == rank.rank:
            time.sleep(60)  # the timer ends it
        groups.ep.barrier()
    except VllmNpuError as error:
        threading.Timer(REPORT_SECONDS, os._exit, (1,)).start()  # as an engine does: others lose their connections
        return Report(served, error, time.time() - float(Path(moment or "").read_text()) if moment else 0.0)
    return Report(served, None, 0.0)


def vote_of(rank: Rank, groups: Groups) -> Transport:
    """A CPU group over all ranks, watched as in an engine; made once."""
    if rank.device.type == "cpu":
        return groups.ep
    if not hasattr(rank, "vote"):
        rank.vote = GlooTransport(dist.new_group(backend="gloo"), "ep-vote")
        rank.vote.watch(rank.watchdog)
    return rank.vote


def end_at(moment: str) -> None:
    Path(moment).write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


def kill_and_restart(pool_of: Callable[[], RankPool], kills: int, folder: Path) -> list[str]:
    """What was wrong, over `kills` pools of which each first serves all steps, and then loses a rank; and one more pool.

    Fails at once where the tokens are not those that threads give.
    """
    with ThreadRankPool(NUM_RANKS) as threads:
        expected = [report.tokens for report in threads.run(serve, None, None)]
    faults, seconds = [], []
    for number in range(kills + 1):
        with pool_of() as pool:
            pool.run(serve, None, None)
            started = time.monotonic()
            tokens = [report.tokens for report in pool.run(serve, None, None)]
            kill = Kill.drawn(number, (time.monotonic() - started) / STEPS)
            assert tokens == expected, f"after {number} restarts"
            if number == kills:
                break
            outcomes = pool.outcomes(serve, kill, str(folder / f"moment{number}"))
            fault = check_kill(outcomes, kill)
            if fault:
                print(f"{kill}: {fault}")
                faults.append(f"{kill}: {fault}")
            seconds += [report.seconds_to_error for report in outcomes if isinstance(report, Report)]
    print(f"{kills} kills: {len(faults)} faults; survivors' reports after {max(seconds):.2f} s at most")
    return faults


def check_kill(outcomes: list, kill: Kill) -> str | None:
    """What is wrong with how the survivors took the end of one of them, or None."""
    for rank, outcome in enumerate(outcomes):
        if rank == kill.rank:
            continue
        if isinstance(outcome, RuntimeError) and f"the process of rank {kill.rank} has ended" in str(outcome):
            continue  # MC2's device operators communicate by themselves: the error is torch_npu's, and names the rank
        if not isinstance(outcome, Report):
            return f"rank {rank} gave {outcome!r}"
        error = outcome.error
        if not isinstance(error, RankFailureError):
            return f"rank {rank} got {type(error).__name__}: {error}"
        if error.ranks != (kill.rank,) or f"rank {kill.rank} has ended" not in str(error):
            return f"rank {rank} blames ranks {error.ranks}: {error}"
        if outcome.seconds_to_error > DEADLINE + 5:
            return f"rank {rank} reported after {outcome.seconds_to_error:.1f} s"
    return None
