"""step_plan: padding, the number of rows of each rank, and the refusal of another number."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import GRIDS, topologies
from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.errors import InvalidInputError

SHARDINGS = st.sampled_from(list(TokenSharding))


@st.composite
def planned_grids(draw):
    """(tp_size, dp_size, plan)."""
    tp_size, dp_size = draw(st.sampled_from(GRIDS))
    counts = draw(st.lists(st.integers(0, 1100), min_size=dp_size, max_size=dp_size))
    return tp_size, dp_size, StepPlan(num_tokens_across_dp=tuple(counts), sharding=draw(SHARDINGS))


@given(planned_grids())
def test_padding_is_the_least_positive_multiple_of_tp_that_holds_every_rank(grid):
    tp_size, _, plan = grid
    padded = plan.padded_tokens(tp_size)
    needed = max(1, *plan.num_tokens_across_dp)
    assert padded % tp_size == 0
    assert needed <= padded < needed + tp_size


@pytest.mark.parametrize("tp_size", [1, 3, 8])
def test_a_step_without_tokens_is_padded_to_one_row_a_rank(tp_size):
    plan = StepPlan(num_tokens_across_dp=(0, 0), sharding=TokenSharding.REPLICATED)
    assert plan.padded_tokens(tp_size) == tp_size


@given(planned_grids())
def test_a_step_is_full_where_no_rank_pads_a_row(grid):
    tp_size, dp_size, plan = grid
    rows = plan.padded_tokens(tp_size) // tp_size
    assert plan.is_full(tp_size) == (plan.sliced_tokens_across_ep(tp_size) == [rows] * (tp_size * dp_size))


@pytest.mark.parametrize(
    ("counts", "tp_size", "full"),
    [((8, 8), 1, True), ((8, 8), 4, True), ((9, 9), 4, False), ((8, 7), 1, False), ((0, 0), 1, False), ((6,), 2, True)],
)
def test_full_steps(counts, tp_size, full):
    assert StepPlan(num_tokens_across_dp=counts, sharding=TokenSharding.REPLICATED).is_full(tp_size) is full


@given(planned_grids())
def test_each_rank_has_all_tokens_of_its_dp_rank_or_one_of_equal_slices(grid):
    tp_size, dp_size, plan = grid
    ranks = topologies(tp_size, dp_size)
    rows = [plan.input_rows(each) for each in ranks]
    real = plan.sliced_tokens_across_ep(tp_size)
    for dp_rank, num_tokens in enumerate(plan.num_tokens_across_dp):
        own = slice(dp_rank * tp_size, (dp_rank + 1) * tp_size)
        assert sum(real[own]) == num_tokens
        if plan.sharding is TokenSharding.REPLICATED:
            assert rows[own] == [num_tokens] * tp_size
        else:
            (length,) = set(rows[own])
            assert num_tokens <= length * tp_size < num_tokens + tp_size
            assert real[own] == [min(max(num_tokens - rank * length, 0), length) for rank in range(tp_size)]


@given(planned_grids(), st.integers(-3, 3))
def test_only_the_planned_number_of_rows_is_taken(grid, surplus):
    tp_size, dp_size, plan = grid
    for topology in topologies(tp_size, dp_size):
        expected = plan.input_rows(topology)
        brought = max(expected + surplus, 0)
        if brought == expected:
            plan.check_input(brought, topology)
            continue
        message = (
            f"hidden_states has {brought} rows on rank {topology.rank}, but the step plan ({plan}) gives this rank "
            f"{expected}"
        )
        with pytest.raises(InvalidInputError, match=re.escape(message)):
            plan.check_input(brought, topology)


def test_a_plan_for_another_number_of_dp_ranks_is_refused():
    plan = StepPlan(num_tokens_across_dp=(4, 4, 4), sharding=TokenSharding.REPLICATED)
    with pytest.raises(InvalidInputError, match=r"counts 3 DP ranks, but dp_size=2"):
        plan.check_input(4, topologies(2, 2)[0])


@pytest.mark.parametrize("counts", [(), (-1,), (3, -2)])
def test_a_plan_needs_a_count_for_each_dp_rank(counts):
    with pytest.raises(InvalidInputError, match=rf"num_tokens_across_dp={re.escape(str(counts))}: give one count >= 0"):
        StepPlan(num_tokens_across_dp=counts, sharding=TokenSharding.REPLICATED)


def test_any_flag_of_the_original_design_says_that_the_input_is_sliced():
    for flags in itertools.product([False, True], repeat=3):
        names = ("enable_shared_expert_dp", "replace_allreduce", "sequence_parallel")
        sharding = TokenSharding.from_flags(**dict(zip(names, flags, strict=True)))
        assert (sharding is TokenSharding.SLICED_OVER_TP) == any(flags)


def test_a_plan_reads_as_its_facts():
    plan = StepPlan(num_tokens_across_dp=(4, 0), sharding=TokenSharding.SLICED_OVER_TP)
    assert str(plan) == "tokens=[4, 0] sharding=sliced_over_tp"


@pytest.mark.parametrize("own_tokens", [0, 9])
def test_own_tokens_outside_of_the_bound_are_refused(own_tokens):
    with pytest.raises(InvalidInputError, match=f"own_tokens={own_tokens}: give 1 to 8 tokens"):
        StepPlan(num_tokens_across_dp=(8, 8), sharding=TokenSharding.REPLICATED, own_tokens=own_tokens)


def test_own_tokens_take_the_place_of_this_ranks_count():
    plan = StepPlan(num_tokens_across_dp=(8, 8), sharding=TokenSharding.SLICED_OVER_TP, own_tokens=5)
    topology = ParallelTopology.of_rank(3, tp_size=2, dp_size=2)
    assert (plan.tokens_of(topology.dp_rank), plan.input_rows(topology)) == (5, 3)
    assert str(plan) == "tokens=5 of up to [8, 8] sharding=sliced_over_tp"
