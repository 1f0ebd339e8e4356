"""What users and callers get wrong: an error that says what, where and what to do, on the rank that is wrong, and no hang."""

import pytest
import torch

from vllm_npu.core.routing import check_router_logits
from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.errors import HandleMismatchError, InvalidInputError, TransportError, UnsupportedConfigError
from vllm_npu.strategies.dispatch.base import RoutedTokens
from vllm_npu.strategies.select import build
from vllm_npu.strategies.table import STRATEGIES
from vllm_npu.tools.launch import Rank, ThreadRankPool
from vllm_npu.tools.reference import LinearExperts
from vllm_npu.tools.verification import grouped_experts

HIDDEN, EXPERTS, TOP_K = 4, 4, 2
STEP = StepPlan(num_tokens_across_dp=(3, 3), sharding=TokenSharding.REPLICATED)


def inputs():
    ids = torch.tensor([[0, 1], [2, 3], [1, 2]], dtype=torch.int32)
    return torch.randn(3, HIDDEN), torch.ones(3, TOP_K), ids


def run(rank: Rank, strategy: str, hidden_states, weights, ids, step=STEP):
    groups = rank.groups(tp_size=1, dp_size=2)
    local = EXPERTS // 2
    experts = LinearExperts.integer(EXPERTS, HIDDEN, HIDDEN, seed=0, dtype=torch.float32)
    on_rank = grouped_experts(experts.on_rank(rank.rank * local, local), torch.float32)
    return build(strategy, groups, EXPERTS).run(hidden_states, weights, ids, on_rank, step).hidden_states


def errors_on_all_ranks(function, *args) -> list[BaseException]:
    with ThreadRankPool(2, timeout=5) as pool:
        outcomes = pool.outcomes(function, *args)
    return outcomes


def raises(strategy: str, error: type[Exception], match: str, hidden_states, weights, ids, step=STEP) -> None:
    """Both ranks bring the same wrong input: one at least says so itself, and none goes on or hangs."""
    outcomes = errors_on_all_ranks(run, strategy, hidden_states, weights, ids, step)
    assert all(isinstance(outcome, (error, TransportError)) for outcome in outcomes)
    own = [outcome for outcome in outcomes if isinstance(outcome, error)]
    with pytest.raises(error, match=match):
        raise own[0]


@pytest.mark.parametrize("strategy", STRATEGIES)
class TestEveryStrategy:
    def test_refuses_hidden_states_that_are_not_2d(self, strategy):
        hidden_states, weights, ids = inputs()
        raises(strategy, InvalidInputError, "must be \\[num_tokens, hidden_size\\]", hidden_states[None], weights, ids)

    def test_refuses_other_token_counts_in_the_routing(self, strategy):
        hidden_states, weights, ids = inputs()
        raises(strategy, InvalidInputError, "one row for each token", hidden_states, weights[:2], ids[:2])

    def test_refuses_more_tokens_than_planned(self, strategy):
        hidden_states, weights, ids = (torch.cat([tensor, tensor]) for tensor in inputs())
        raises(strategy, InvalidInputError, "has 6 rows on rank ., but the step plan", hidden_states, weights, ids)

    def test_refuses_a_plan_for_another_grid(self, strategy):
        step = StepPlan(num_tokens_across_dp=(3,), sharding=TokenSharding.REPLICATED)
        raises(strategy, InvalidInputError, "counts 1 DP ranks, but dp_size=2", *inputs(), step)

    @pytest.mark.parametrize("bad_id", [-1, EXPERTS, 10**6])
    def test_refuses_ids_out_of_range(self, strategy, bad_id):
        hidden_states, weights, ids = inputs()
        ids[1, 0] = bad_id
        raises(strategy, InvalidInputError, "must lie in \\[0, 3\\]", hidden_states, weights, ids)

    def test_refuses_ids_that_are_not_integers(self, strategy):
        hidden_states, weights, ids = inputs()
        raises(strategy, InvalidInputError, "int32 or int64", hidden_states, weights, ids.float())

    def test_refuses_experts_that_do_not_divide_over_the_ranks(self, strategy):
        def build_it(rank: Rank):
            build(strategy, rank.groups(tp_size=1, dp_size=2), 5)

        for outcome in errors_on_all_ranks(build_it):
            assert isinstance(outcome, UnsupportedConfigError)
            assert "5 experts do not divide over ep_size=2" in str(outcome)

    def test_refuses_a_handle_that_was_used(self, strategy):
        for outcome in errors_on_all_ranks(_finalize_twice, strategy):
            assert isinstance(outcome, HandleMismatchError)
            assert "has already used" in str(outcome)

    def test_refuses_a_handle_of_another_strategy(self, strategy):
        for outcome in errors_on_all_ranks(_finalize_with_every_other, strategy):
            assert outcome == "refused"

    def test_refuses_an_output_with_other_rows_and_takes_the_right_one_after(self, strategy):
        for outcome in errors_on_all_ranks(_finalize_wrong_rows_first, strategy):
            assert torch.equal(outcome, torch.full((3, HIDDEN), outcome[0, 0].item()))

    def test_one_wrong_rank_does_not_hang_the_other(self, strategy):
        outcomes = errors_on_all_ranks(_one_rank_wrong, strategy)
        assert isinstance(outcomes[1], InvalidInputError)
        assert isinstance(outcomes[0], (TransportError, InvalidInputError))


def _prepared(rank: Rank, strategy: str):
    pipeline = build(strategy, rank.groups(tp_size=1, dp_size=2), EXPERTS)
    prepared = pipeline.prepare_finalize.prepare(torch.ones(3, HIDDEN), (), STEP)
    return pipeline, prepared


def _finalize_twice(rank: Rank, strategy: str):
    pipeline, prepared = _prepared(rank, strategy)
    pipeline.prepare_finalize.finalize(prepared.hidden_states, prepared.handle)
    pipeline.prepare_finalize.finalize(prepared.hidden_states, prepared.handle)


def _finalize_with_every_other(rank: Rank, strategy: str):
    groups = rank.groups(tp_size=1, dp_size=2)
    _, prepared = _prepared(rank, strategy)
    same_handles = {"naive", "allgather"}  # naive multicast ends as allgather does, and shares its handle
    for other in STRATEGIES:
        if other == strategy or {other, strategy} == same_handles:
            continue
        with pytest.raises(HandleMismatchError, match="in pairs"):
            build(other, groups, EXPERTS).prepare_finalize.finalize(prepared.hidden_states, prepared.handle)
    return "refused"


def _finalize_wrong_rows_first(rank: Rank, strategy: str):
    pipeline, prepared = _prepared(rank, strategy)
    with pytest.raises(InvalidInputError, match="a row for each prepared token"):
        pipeline.prepare_finalize.finalize(prepared.hidden_states[:-1], prepared.handle)
    return pipeline.prepare_finalize.finalize(prepared.hidden_states, prepared.handle).hidden_states


def _one_rank_wrong(rank: Rank, strategy: str):
    hidden_states, weights, ids = inputs()
    return run(rank, strategy, hidden_states[:, :, None] if rank.rank == 1 else hidden_states, weights, ids)


def _dispatch_with_a_mask(rank: Rank, strategy: str, max_rows: int | None = None) -> tuple[list[int], list[bool]]:
    """Rows of each of this rank's experts, and which rows come back as NaN."""
    dispatcher = build(strategy, rank.groups(tp_size=1, dp_size=2), EXPERTS).dispatcher
    hidden_states, weights, ids = inputs()
    mask = torch.tensor([True, False, False])
    tokens = RoutedTokens(hidden_states=hidden_states, topk_weights=weights, topk_ids=ids, mask=mask, max_rows=max_rows)
    dispatched = dispatcher.dispatch(tokens)
    combined = dispatcher.combine(dispatched.expert_input, dispatched.handle)
    return dispatched.tokens_per_expert.tolist(), combined.isnan().any(1).tolist()


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "mc2"])
def test_a_mask_is_refused_where_shapes_are_not_fixed(strategy):
    for outcome in errors_on_all_ranks(_dispatch_with_a_mask, strategy):
        assert isinstance(outcome, InvalidInputError)
        assert "bring the rows that are tokens only" in str(outcome)


def test_mc2_takes_a_mask_and_leaves_its_rows_out_but_not_on_top_of_different_numbers_of_rows():
    (counts, first), (no_counts, second) = errors_on_all_ranks(_dispatch_with_a_mask, "mc2")
    assert (counts, no_counts) == ([2, 2], [0, 0]), "the first row of each rank goes to experts 0 and 1, and no other"
    assert first == second == [False, True, True]
    for outcome in errors_on_all_ranks(_dispatch_with_a_mask, "mc2", 3):
        assert isinstance(outcome, InvalidInputError)
        assert "max_rows=3 says that they differ" in str(outcome)


def test_router_logits_must_fit_tokens_and_experts():
    for logits in (torch.zeros(2, EXPERTS), torch.zeros(3, EXPERTS + 1), torch.zeros(3)):
        with pytest.raises(InvalidInputError, match="router_logits has shape"):
            check_router_logits(torch.zeros(3, HIDDEN), logits, EXPERTS)


@pytest.mark.parametrize("strategy", [name for name, row in STRATEGIES.items() if row.needs_expert_parallel])
def test_strategies_that_need_expert_parallelism_say_so(strategy):
    def build_it(rank: Rank):
        build(strategy, rank.groups(tp_size=1, dp_size=2, expert_parallel=False), EXPERTS)

    for outcome in errors_on_all_ranks(build_it):
        assert isinstance(outcome, UnsupportedConfigError)
        assert "needs ep_size > 1" in str(outcome)
        assert "--enable-expert-parallel" in str(outcome)


def test_an_unknown_strategy_lists_those_that_exist():
    def build_it(rank: Rank):
        build("multicast", rank.groups(tp_size=1, dp_size=2), EXPERTS)

    for outcome in errors_on_all_ranks(build_it):
        assert isinstance(outcome, UnsupportedConfigError)
        assert "auto, mc2, all2all, allgather, naive" in str(outcome)
