"""agree(): the proposal of all ranks where plans are equal, an error that names ranks and plans on every rank where not."""

import time

import pytest
import torch

from tests.cases import seeded
from tests.time_limits import on_this_machine
from vllm_npu.errors import InvalidInputError, PlanDisagreementError, PreparationError, RankFailureError
from vllm_npu.tools.launch import ProcessRankPool, Rank
from vllm_npu.transport.base import FAN_OUT, rounds_of
from vllm_npu.trust.agreement import MAX_PLAN_BYTES, VOTE_BYTES, agree, agree_start, prepare_on_all
from vllm_npu.trust.recording import CollectiveCounter

PLAN = "strategy=mc2 tokens=[4, 0] sharding=replicated dtype=bfloat16"
LARGEST = 2**63 - 1

on_all_pools = pytest.mark.parametrize(
    ("kind", "num_ranks"),
    [(kind, num_ranks) for kind in ("threaded", "gloo") for num_ranks in (2, 3, 4)] + [("threaded", 64), ("gloo", 9)],
)


def vote(rank: Rank, plans: list[str], proposals: list[int]) -> int | None:
    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    return agree(plans[rank.rank], ep, proposals[rank.rank])


def outcomes_of(pools, kind: str, plans: list[str]) -> list:
    """What each rank got, within 10 seconds; and the pool still works."""
    pool = pools(kind, len(plans))
    pool.run(vote, [PLAN] * len(plans), [0] * len(plans))  # started
    began = time.monotonic()
    outcomes = pool.outcomes(vote, plans, [0] * len(plans))
    assert time.monotonic() - began < on_this_machine(10)
    assert pool.run(vote, [PLAN] * len(plans), [7] * len(plans)) == [7] * len(plans)
    return outcomes


@on_all_pools
@pytest.mark.parametrize("plan", [PLAN, "", "ä" * 10 * MAX_PLAN_BYTES], ids=["usual", "empty", "long"])
def test_equal_plans_return_the_proposal_that_all_ranks_share(pools, kind, num_ranks, plan):
    pool, plans = pools(kind, num_ranks), [plan] * num_ranks
    for same in (7, 0, -1, LARGEST, -LARGEST - 1):
        assert pool.run(vote, plans, [same] * num_ranks) == [same] * num_ranks
    for odd_rank in {0, 1, num_ranks - 1}:
        for usual, odd in ((7, -3), (LARGEST, -LARGEST - 1), (-1, 0)):
            proposals = [usual] * num_ranks
            proposals[odd_rank] = odd
            assert pool.run(vote, plans, proposals) == [None] * num_ranks


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


def disagree_then_go_on(rank: Rank) -> int | None:
    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    try:
        agree(f"plan of rank {rank.rank}", ep)
    except PlanDisagreementError:
        return agree(PLAN, ep, 5)
    return None


@pytest.mark.parametrize(("kind", "num_ranks"), [("threaded", 3), ("gloo", 3), ("threaded", 64), ("gloo", 9)])
def test_the_group_stays_in_step_after_a_disagreement(pools, kind, num_ranks):
    assert pools(kind, num_ranks).run(disagree_then_go_on) == [5] * num_ranks


def vote_alone(rank: Rank) -> int | None:
    tp = rank.groups(tp_size=1, dp_size=2).tp
    return agree(f"plan of rank {rank.rank}", tp, 5)


def test_a_group_of_one_agrees_with_itself(pools):
    assert pools("threaded", 2).run(vote_alone) == [5, 5]


def counted_votes(rank: Rank) -> dict[str, tuple[int, int]]:
    """Calls and bytes of ten votes on one plan."""
    counter = CollectiveCounter()
    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks, counter=counter).ep
    for proposal in range(10):
        assert agree(PLAN, ep, proposal) == proposal
    return {name: (counter.calls[name], counter.bytes_sent[name]) for name in counter.calls}


@pytest.mark.parametrize(
    ("kind", "num_ranks", "messages"), [("gloo", 2, 1), ("gloo", 8, 7), ("gloo", 9, 8), ("threaded", 64, 14)]
)
def test_a_vote_is_one_collective_and_a_rank_sends_few_messages(pools, kind, num_ranks, messages):
    """A rank sent one message to each other rank: 63 of 64."""
    expected = {"ep.maximum": (10, 10 * messages * VOTE_BYTES)}
    assert pools(kind, num_ranks).run(counted_votes) == [expected] * num_ranks


@pytest.mark.parametrize("size", [*range(1, 66), 511, 512, 513, 768, 5000])
def test_rounds_bring_something_of_each_rank_to_all_in_messages_that_grow_as_the_logarithm(size):
    """By rank 0; the others are alike, as distances are."""
    known = {0}
    for distances in rounds_of(size):
        assert 1 <= len(distances) < FAN_OUT
        known |= {(other - distance) % size for other in known for distance in distances}
    assert known == set(range(size))
    assert FAN_OUT ** (len(rounds_of(size)) - 1) < size


def maxima(rank: Rank) -> None:
    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    drawn = torch.randint(-LARGEST - 1, LARGEST, (2, ep.size, 5), generator=seeded(ep.size))
    first, second = (ep.maximum_start(values[ep.rank].tolist()) for values in drawn)
    assert [second.finish(), first.finish()] == [values.amax(0).tolist() for values in drawn.flip(0)]


@pytest.mark.parametrize(
    ("kind", "num_ranks"), [("threaded", 1), ("threaded", 4), ("threaded", 64), ("gloo", 4), ("gloo", 9)]
)
def test_the_maximum_is_over_all_ranks_and_two_may_be_in_flight(pools, kind, num_ranks):
    pools(kind, num_ranks).run(maxima)


def votes_with_one_late(rank: Rank, late: int, seconds: float) -> tuple[RankFailureError | None, float]:
    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    agree(PLAN, ep)
    began = time.monotonic()
    if rank.rank == late:
        time.sleep(seconds)
    try:
        agree_start(PLAN, ep).finish()
    except RankFailureError as error:
        return error, time.monotonic() - began
    return None, 0.0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("num_ranks", [4, 9])
def test_a_late_rank_is_named_by_all_that_wait_for_its_vote(num_ranks):
    """Also by ranks that wait for it only through others: with 9 ranks a vote has two rounds. A busy machine may make more
    ranks late, and give the late rank no time to take a letter: its error then says so."""
    deadline, late = on_this_machine(3.0), 2
    asleep = 2 * deadline + 24
    with ProcessRankPool(num_ranks, timeout=deadline, start_method="forkserver") as pool:
        outcomes = pool.run(votes_with_one_late, late, asleep)
    for rank, (error, seconds) in enumerate(outcomes):
        assert error is not None, rank
        if rank != late:
            assert late in error.ranks, str(error)
            said = str(error)
            assert f"rank {late} is late (process " in said or f"rank {late} is stopped: it accepts connections" in said
            assert seconds < asleep, "it was named before it came"


def prepares(rank: Rank, faults: dict[int, Exception], texts: dict[int, str]) -> str:
    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep

    def prepare() -> str:
        if rank.rank in faults:
            raise faults[rank.rank]
        return texts.get(rank.rank, "ready")

    try:
        prepare_on_all(prepare, ep, "not ready")
    except (PlanDisagreementError, PreparationError, InvalidInputError) as error:
        return f"{type(error).__name__} {error}"
    return "ready"


@pytest.mark.parametrize(
    ("faults", "texts", "said"),
    [
        ({}, {}, "ready"),
        ({1: RuntimeError("no memory")}, {},
         "PlanDisagreementError not ready:\n  ranks [0, 2]: ready\n  ranks [1]: rank 1 cannot prepare: no memory"),
        ({0: MemoryError(), 2: InvalidInputError("wrong")}, {},
         "PlanDisagreementError not ready:\n  ranks [0]: rank 0 cannot prepare: MemoryError\n  ranks [1]: ready\n"
         "  ranks [2]: wrong"),
        (dict.fromkeys(range(3), InvalidInputError("wrong")), {}, "InvalidInputError wrong"),
        ({}, {2: "ready for more"}, "PlanDisagreementError not ready:\n  ranks [0, 1]: ready\n  ranks [2]: ready for more"),
    ],
)  # fmt: skip
def test_a_preparation_that_fails_anywhere_is_an_error_everywhere(pools, faults, texts, said):
    assert pools("gloo", 3).run(prepares, faults, texts) == [said] * 3
    assert pools("gloo", 3).run(prepares, {}, {}) == ["ready"] * 3
