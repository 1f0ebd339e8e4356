"""agree(): proposals of all ranks where plans are equal, an error that names ranks and plans on every rank where not."""

import time

import pytest

from vllm_npu.errors import PlanDisagreementError
from vllm_npu.tools.launch import Rank
from vllm_npu.trust.agreement import MAX_PLAN_BYTES, agree

PLAN = "strategy=mc2 tokens=[4, 0] sharding=replicated dtype=bfloat16"
LARGEST = 2**63 - 1

on_all_pools = pytest.mark.parametrize(
    ("kind", "num_ranks"), [(kind, num_ranks) for kind in ("threaded", "gloo") for num_ranks in (2, 3, 4)]
)


def vote(rank: Rank, plans: list[str], proposals: list[int]) -> list[int]:
    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    return agree(plans[rank.rank], ep, proposals[rank.rank])


def outcomes_of(pools, kind: str, plans: list[str]) -> list:
    """What each rank got, within 10 seconds; and the pool still works."""
    pool = pools(kind, len(plans))
    pool.run(vote, [PLAN] * len(plans), [0] * len(plans))  # started
    began = time.monotonic()
    outcomes = pool.outcomes(vote, plans, [0] * len(plans))
    assert time.monotonic() - began < 10
    assert pool.run(vote, [PLAN] * len(plans), list(range(len(plans)))) == [list(range(len(plans)))] * len(plans)
    return outcomes


@on_all_pools
@pytest.mark.parametrize("plan", [PLAN, "", "ä" * 10 * MAX_PLAN_BYTES], ids=["usual", "empty", "long"])
def test_equal_plans_return_every_ranks_proposal_in_rank_order(pools, kind, num_ranks, plan):
    proposals = [7, -3, LARGEST, 0][:num_ranks]
    assert pools(kind, num_ranks).run(vote, [plan] * num_ranks, proposals) == [proposals] * num_ranks


@on_all_pools
@pytest.mark.parametrize("odd", ["first", "last", "two", "all"])
def test_different_plans_are_an_error_on_every_rank_that_names_ranks_and_plans(pools, kind, num_ranks, odd):
    plans = [PLAN] * num_ranks
    for rank in {"first": [0], "last": [num_ranks - 1], "two": [0, 1], "all": range(num_ranks)}[odd]:
        plans[rank] = f"{PLAN} ubatch={rank}"
    ranks_with = {plan: [rank for rank in range(num_ranks) if plans[rank] == plan] for plan in plans}
    for error in outcomes_of(pools, kind, plans):
        assert isinstance(error, PlanDisagreementError)
        first, *lines = str(error).splitlines()
        assert first.startswith("ranks planned different steps; start all of them with the same versions, model and")
        assert sorted(lines) == sorted(f"  ranks {ranks}: {plan}" for plan, ranks in ranks_with.items())


FIELDS = {"tokens": [4, 0], "sharding": "replicated", "dtype": "bfloat16", "layers": "x" * 5000}


@pytest.mark.parametrize("kind", ["threaded", "gloo"])
def test_of_plans_in_fields_the_fields_that_differ_are_named_with_their_ranks(pools, kind):
    plans = [FIELDS, FIELDS | {"tokens": [4, 1]}, FIELDS | {"tokens": [4, 1], "layers": "x" * 4999 + "y"}, FIELDS]
    for error in outcomes_of(pools, kind, plans):
        assert isinstance(error, PlanDisagreementError)
        _, tokens, layers = str(error).splitlines()
        assert tokens == "  tokens: ranks [0, 3]: [4, 0]; ranks [1, 2]: [4, 1]"
        assert layers.startswith("  layers: ranks [0, 1, 3]: xxx")
        assert "; ranks [2]: xxx" in layers
    for error in outcomes_of(pools, kind, [FIELDS, {"tokens": [4, 0]}]):
        assert "  dtype: ranks [0]: bfloat16; ranks [1]: (absent)" in str(error)


@pytest.mark.parametrize("kind", ["threaded", "gloo"])
def test_an_empty_plan_and_one_of_many_bytes_a_letter_differ(pools, kind):
    for error in outcomes_of(pools, kind, ["", "ä€"]):
        assert isinstance(error, PlanDisagreementError)
        assert "ranks [0]: " in str(error)
        assert "ranks [1]: ä€" in str(error)


@pytest.mark.parametrize("kind", ["threaded", "gloo"])
@pytest.mark.parametrize("same_bytes", [0, MAX_PLAN_BYTES - 1, MAX_PLAN_BYTES, 5 * MAX_PLAN_BYTES])
def test_long_plans_may_differ_anywhere_and_the_error_still_tells_the_ranks_apart(pools, kind, same_bytes):
    plans = ["x" * same_bytes + letter + "y" * 3 * MAX_PLAN_BYTES for letter in "ab"] + [""]
    plans[2] = plans[0]
    for error in outcomes_of(pools, kind, plans):
        assert isinstance(error, PlanDisagreementError)
        assert "ranks [0, 2]: " in str(error)
        assert "ranks [1]: " in str(error)


def disagree_then_go_on(rank: Rank) -> list[int]:
    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    try:
        agree(f"plan of rank {rank.rank}", ep)
    except PlanDisagreementError:
        return agree(PLAN, ep, rank.rank)
    return []


@pytest.mark.parametrize("kind", ["threaded", "gloo"])
def test_the_group_stays_in_step_after_a_disagreement(pools, kind):
    assert pools(kind, 3).run(disagree_then_go_on) == [[0, 1, 2]] * 3


def vote_alone(rank: Rank) -> list[int]:
    tp = rank.groups(tp_size=1, dp_size=2).tp
    return agree(f"plan of rank {rank.rank}", tp, 5)


def test_a_group_of_one_agrees_with_itself(pools):
    assert pools("threaded", 2).run(vote_alone) == [[5], [5]]
