"""Run on each rank to test the strategies as vLLM's all2all manager. The experts read rows, weights and ids as vLLM's do."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from vllm_npu.all2all.strategy import StrategyAll2AllManager
from vllm_npu.core.step_plan import TokenSharding
from vllm_npu.tools.launch import Rank
from vllm_npu.tools.verification import Case, CaseTensors

OPENED: dict[str, dist.ProcessGroup] = {}  # the gloo groups that this rank's process has opened


@dataclass
class GivenStep:
    """A running step with given facts."""

    counts: tuple[int, ...] = ()
    in_graph: bool = False
    batch: int = 0
    current: object = field(default_factory=object)

    def begin(self, counts: tuple[int, ...], *, in_graph: bool = False) -> None:
        self.counts, self.in_graph, self.current = counts, in_graph, object()

    def key(self) -> object:
        return self.current

    def num_tokens_across_dp(self) -> tuple[int, ...]:
        return self.counts

    def captured(self) -> bool:
        return self.in_graph

    def micro_batch(self) -> int:
        return self.batch


def manager_of(rank: Rank, case: Case, step: GivenStep) -> StrategyAll2AllManager:
    """Return a manager on this rank's groups. COLLECTIVE."""
    if "gloo" not in OPENED:
        OPENED["gloo"] = dist.new_group(backend="gloo")
    groups = rank.groups(tp_size=case.tp_size, dp_size=case.dp_size)
    return StrategyAll2AllManager(
        groups, OPENED["gloo"], strategy=case.strategy, num_experts=case.num_experts, running=step
    )


def run_cases(rank: Rank, cases: list[Case]) -> list[str]:
    """Return the faults that this rank finds. COLLECTIVE."""
    faults = []
    for case in cases:
        step = GivenStep(case.num_tokens_across_dp)
        manager = manager_of(rank, case, step)
        for into in (False, True):
            step.begin(case.num_tokens_across_dp)
            faults += [f"{case}, {into=}: {fault}" for fault in exchange(rank, case, manager, into=into)]
        manager.destroy()
    return faults


def exchange(
    rank: Rank,
    case: Case,
    manager: Any,
    after_dispatch: Callable[[], None] | None = None,  # runs in place of the experts
    *,
    into: bool = False,  # whether combine gets a tensor for its result
) -> list[str]:
    """Run the layer of the case through the manager, and return its faults."""
    topology = rank.groups(tp_size=case.tp_size, dp_size=case.dp_size).topology
    tensors = CaseTensors.of(case)
    hidden_states, weights, ids = tensors.input_of(topology, case.sharding, rank.device)
    matrices = tensors.experts.weights.to(rank.device)
    first = topology.ep_rank * case.experts_per_rank
    sequence_parallel = case.sharding is TokenSharding.SLICED_OVER_TP
    rows, row_weights, row_ids = manager.dispatch(hidden_states, weights, ids.int(), sequence_parallel)
    faults = [f"rank {rank.rank}: not contiguous" for x in (rows, row_weights, row_ids) if not x.is_contiguous()]
    if bool((row_ids < 0).any()) or row_ids.shape != row_weights.shape:
        faults.append(f"rank {rank.rank}: ids below 0, or of another shape than the weights")
    if after_dispatch is not None:
        after_dispatch()
    output = torch.zeros(rows.shape[0], case.width, device=rank.device)
    for expert in range(first, first + case.experts_per_rank):
        row, k = (row_ids == expert).nonzero(as_tuple=True)
        output.index_add_(0, row, (rows[row] @ matrices[expert]).float() * row_weights[row, k, None])
    rows_in = output.to(case.dtype)
    if into:  # as vLLM 0.32 calls a manager
        allocated = manager.allocate_combine_input(tuple(rows_in.shape), rows_in.dtype)
        rows_in = rows_in if allocated is None else allocated.copy_(rows_in)
        given = torch.full((hidden_states.shape[0], case.width), float("nan"), device=rank.device, dtype=case.dtype)
        combined = manager.combine_into(rows_in, given, sequence_parallel)
        faults += [f"rank {rank.rank}: another tensor than the given one"] * (combined is not given)
    else:
        combined = manager.combine(rows_in, sequence_parallel)
    expected = tensors.expected_on(topology, case.sharding)
    if not torch.equal(combined[: expected.shape[0]].cpu(), expected):
        faults.append(f"rank {rank.rank}: not the reference")
    return faults


class ExpertsFailed(Exception):
    """Raised in place of the experts."""


def goes_on_after_errors(rank: Rank, case: Case, steps: int) -> list[str]:
    """Let the experts fail in three steps, and combine in one, and then run good steps. Returns the faults."""
    step = GivenStep(case.num_tokens_across_dp)
    manager = manager_of(rank, case, step)

    def fail() -> None:
        raise ExpertsFailed

    faults = exchange(rank, case, manager)
    for _ in range(3):
        step.begin(case.num_tokens_across_dp)
        try:
            exchange(rank, case, manager, fail)
        except ExpertsFailed:
            continue
        faults.append("the experts did not fail")
    for _ in range(steps):
        step.begin(case.num_tokens_across_dp)
        faults += exchange(rank, case, manager)
    manager.check_failed()
    manager.destroy()
    return faults


def cases(strategy: str, num_ranks: int) -> list[Case]:
    """Full steps, uneven steps and steps in which some ranks have no tokens, each with data parallelism alone and with sequence
    parallelism over TP2."""
    grids = [(1, num_ranks, TokenSharding.REPLICATED), (2, num_ranks // 2, TokenSharding.SLICED_OVER_TP)]
    found = []
    for tp_size, dp_size, sharding in grids:
        for counts in ((4, 4, 4, 4), (5, 1, 3, 2), (0, 7, 0, 1), (64, 64, 64, 64)):
            own = counts[:dp_size]
            shape = {"tp_size": tp_size, "dp_size": dp_size, "sharding": sharding, "width": 96, "hidden_size": 96}
            found.append(Case(strategy=strategy, num_tokens_across_dp=own, seed=sum(own), **shape))
    return found
