"""The strategies as vLLM's all2all manager, over gloo: the reference, errors between dispatch and combine, rules of graphs."""

from dataclasses import replace

import pytest
import torch

from tests.strategy_manager_ranks import GivenStep, cases, exchange, goes_on_after_errors, manager_of, run_cases
from vllm_npu.core.handles import Handle
from vllm_npu.core.limits import NVLINK
from vllm_npu.errors import HandleMismatchError, InvalidInputError, UnsupportedConfigError
from vllm_npu.strategies.dispatch.base import RoutedTokens
from vllm_npu.strategies.dispatch.local_permute import LocalPermuteDispatcher
from vllm_npu.strategies.select import build
from vllm_npu.strategies.table import ALL_STRATEGIES, STRATEGIES, StrategyRow
from vllm_npu.tools.launch import Rank
from vllm_npu.tools.verification import Case

RANKS = 4
WINDOWS = 2


def test_every_strategy_gives_the_reference(pools):
    every = [case for name in STRATEGIES for case in cases(name, RANKS)]
    assert [fault for found in pools("gloo", RANKS).run(run_cases, every) for fault in found] == []


def refuses_symmetric(rank: Rank) -> str:
    case = Case(strategy="symmetric", tp_size=1, dp_size=4, num_tokens_across_dp=(1, 1, 1, 1))
    with pytest.raises(UnsupportedConfigError) as error:
        manager_of(rank, case, GivenStep())
    return str(error.value)


def test_symmetric_needs_gpus_and_says_so(pools):
    for message in pools("gloo", RANKS).run(refuses_symmetric):
        assert "symmetric cannot run here: not every rank has a CUDA device" in message


# ----------------------------------------------------------------------------------- errors between dispatch and combine


@pytest.mark.parametrize("name", STRATEGIES)
def test_good_steps_follow_steps_whose_experts_failed(pools, name):
    case = cases(name, RANKS)[1]
    assert [fault for found in pools("gloo", RANKS).run(goes_on_after_errors, case, 100) for fault in found] == []


class FewWindows(LocalPermuteDispatcher):
    """Holds one of two windows from dispatch_with_ids to combine_with_ids, as symmetric does."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.held: list[int] = []

    def dispatch_with_ids(self, tokens: RoutedTokens, extra_tensors: tuple[torch.Tensor, ...] = ()):
        if len(self.held) == WINDOWS:
            raise InvalidInputError(f"{WINDOWS} dispatches are in flight already")
        rows, handle = super().dispatch_with_ids(tokens, extra_tensors)
        self.held.append(id(handle))
        return rows, handle

    def combine_with_ids(self, expert_output: torch.Tensor, handle: Handle, output: torch.Tensor | None = None):
        combined = super().combine_with_ids(expert_output, handle, output)
        self.held.remove(id(handle))
        return combined

    def _release(self, handle: Handle) -> None:
        self.held.remove(id(handle))


def gives_windows_back(rank: Rank) -> list[str]:
    few = StrategyRow(
        prepare_finalize=STRATEGIES["allgather"].prepare_finalize,
        dispatcher=f"{__name__}:FewWindows",
        needs_expert_parallel=False,
        summary="",
    )
    case = replace(cases("allgather", RANKS)[1])
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(ALL_STRATEGIES, "allgather", few)
        faults = goes_on_after_errors(rank, case, 10)
        step = GivenStep(case.num_tokens_across_dp)
        manager = manager_of(rank, case, step)
        faults += exchange(rank, case, manager)
        [pipeline] = manager._pipelines._pipelines.values()
        x = torch.zeros(case.num_tokens_across_dp[rank.rank], 96, dtype=case.dtype)
        ids = torch.zeros(x.shape[0], 1, dtype=torch.int32)
        rows, _, _ = manager.dispatch(x, torch.ones(x.shape[0], 1), ids)
        with pytest.raises(InvalidInputError):
            manager.combine(rows[1:])  # a row is missing: this error, too, must not cost a window
        faults += exchange(rank, case, manager)
        faults += [f"{len(pipeline.dispatcher.held)} windows are held"] if pipeline.dispatcher.held else []
        manager.dispatch(x, torch.ones(x.shape[0], 1), ids)
        manager.destroy()
    return faults + (["destroy leaves a window"] if pipeline.dispatcher.held else [])


def test_an_error_between_dispatch_and_combine_costs_no_window(pools):
    assert [fault for found in pools("gloo", RANKS).run(gives_windows_back) for fault in found] == []


def scales_travel(rank: Rank) -> None:
    """all2all brings extra tensors beside their rows. Column 0 of each tensor is the number of the token."""
    groups = rank.groups(tp_size=1, dp_size=rank.num_ranks)
    dispatcher = build("all2all", groups, 2 * rank.num_ranks).dispatcher
    numbers = torch.arange(7 + rank.rank) + 20 * rank.rank
    x, scales = numbers[:, None].bfloat16().expand(-1, 6).contiguous(), numbers[:, None].float().expand(-1, 3)
    ids = torch.stack([numbers % (2 * rank.num_ranks), (numbers + 1) % (2 * rank.num_ranks)], 1).int()
    tokens = RoutedTokens(hidden_states=x, topk_weights=torch.ones(ids.shape), topk_ids=ids)
    received, handle = dispatcher.dispatch_with_ids(tokens, (scales,))
    [brought] = received.extra_tensors
    assert torch.equal(brought.bfloat16(), received.rows[:, :3])
    assert bool((received.topk_ids // 2 == rank.rank).any(1).all()), "a row that no expert of this rank takes"
    per_row = (received.topk_ids // 2 == rank.rank).sum(1, keepdim=True)
    assert torch.equal(dispatcher.combine_with_ids(received.rows * per_row, handle), 2 * x)


def test_scales_travel_beside_the_rows_of_all2all(pools):
    pools("gloo", RANKS).run(scales_travel)


def combines_twice(rank: Rank) -> None:
    case = cases("allgather", RANKS)[0]
    manager = manager_of(rank, case, GivenStep(case.num_tokens_across_dp))
    assert exchange(rank, case, manager) == []
    with pytest.raises(HandleMismatchError, match="without a dispatch in this micro-batch"):
        manager.combine(torch.zeros(4, 96))


def test_combine_needs_a_dispatch(pools):
    pools("gloo", RANKS).run(combines_twice)


def interleaves(rank: Rank) -> list[str]:
    """Two micro-batches in flight: the dispatch of one must not end the other."""
    case = cases("allgather", RANKS)[1]
    step = GivenStep(case.num_tokens_across_dp)
    manager = manager_of(rank, case, step)

    def other() -> None:
        step.batch = 1
        faults.extend(exchange(rank, case, manager))
        step.batch = 0

    faults: list[str] = []
    return exchange(rank, case, manager, other) + faults


def test_micro_batches_do_not_end_each_other(pools):
    assert [fault for found in pools("gloo", RANKS).run(interleaves) for fault in found] == []


# -------------------------------------------------------------------------------------------------------------- graphs


def selects(rank: Rank) -> dict[str, list[str]]:
    """Return the strategies of an eager and of a captured step, for each request, as a manager between GPUs selects them."""
    chosen = {}
    for name in ("auto", "mc2", "all2all", "allgather", "naive", "symmetric"):
        case = replace(cases("allgather", RANKS)[0], strategy=name)
        step = GivenStep(case.num_tokens_across_dp)
        manager = manager_of(rank, replace(case, strategy="auto"), step)
        manager.strategy, manager.limits = name, replace(NVLINK, captures=manager.limits.captures)
        found = []
        for in_graph in (False, True):
            for tokens in (4, 5000):
                step.begin((tokens,) * RANKS, in_graph=in_graph)
                plan = manager._current_step(False).plan
                assert plan.captured is in_graph
                found.append(manager._select(plan, case.layer))
        chosen[name] = found
    return chosen


def test_captured_steps_follow_the_rules_of_graphs(pools):
    for chosen in pools("gloo", RANKS).run(selects):
        assert chosen == {  # an eager step of few and of many tokens, a captured step of few and of many
            "auto": ["symmetric", "all2all", "symmetric", "allgather"],
            "mc2": ["mc2", "all2all", "mc2", "allgather"],
            "all2all": ["all2all", "all2all", "allgather", "allgather"],
            "allgather": ["allgather"] * 4,
            "naive": ["naive"] * 4,
            "symmetric": ["symmetric", "all2all", "symmetric", "allgather"],
        }


def selects_over_tp(rank: Rank) -> list[str]:
    """Return auto's choices on TP2×DP2 between GPUs: with whole tokens on each TP rank, and with slices of them."""
    case = replace(cases("allgather", RANKS)[0], tp_size=2, dp_size=2, num_tokens_across_dp=(4, 4), strategy="auto")
    step = GivenStep(case.num_tokens_across_dp)
    manager = manager_of(rank, case, step)
    manager.limits = replace(NVLINK, captures=manager.limits.captures)
    return [manager._select(manager._current_step(sliced).plan, case.layer) for sliced in (False, True)]


def test_auto_takes_a_strategy_whose_sum_over_tp_is_vllms(pools):
    assert pools("gloo", RANKS).run(selects_over_tp) == [["allgather", "symmetric"]] * RANKS


def counts_steps(rank: Rank) -> list:
    case = replace(cases("mc2", RANKS)[0], hidden_size=96, width=96)
    step = GivenStep()
    manager = manager_of(rank, case, step)
    taken = [manager.end_step()]
    for in_graph in (False, True):
        step.begin(case.num_tokens_across_dp, in_graph=in_graph)
        exchange(rank, case, manager)
        taken.append(manager.end_step())
    taken.append(manager.end_step())  # a replay runs no Python
    return taken


def test_a_replayed_step_counts_as_the_captured_one(pools):
    for none, *taken in pools("gloo", RANKS).run(counts_steps):
        assert none is None
        assert taken == [("mc2", "mc2")] * 3
