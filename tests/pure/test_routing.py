"""routing: permutations and destinations against plain loops, and the refusal of routing that does not fit."""

import re
from math import comb

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.cases import SEEDS, distinct_ids, seeded, small_integers
from vllm_npu.core.routing import (
    ExpertPermutation,
    RankDestinations,
    RanksOfTokens,
    _sum_rows_without_sync,
    check_router_logits,
    check_topk,
    expert_ranges,
    local_expert_ids,
    sum_rows,
)
from vllm_npu.core.topology import ExpertPlacement
from vllm_npu.errors import InvalidInputError
from vllm_npu.strategies.select import distinct_destinations

ID_DTYPES = st.sampled_from([torch.int32, torch.int64])
NAN = float("nan")


@st.composite
def routings(draw):
    """(global ids [num_tokens, top_k], placement, one EP rank)."""
    placement = ExpertPlacement(draw(st.sampled_from([4, 8, 16])), draw(st.sampled_from([1, 2, 4])))
    top_k = draw(st.integers(1, min(5, placement.num_experts)))
    ids = distinct_ids(draw(st.integers(0, 12)), top_k, placement.num_experts, seeded(draw(SEEDS)))
    return ids.to(draw(ID_DTYPES)), placement, draw(st.integers(0, placement.ep_size - 1))


def local_ids_of(routing) -> torch.Tensor:
    ids, placement, rank = routing
    return local_expert_ids(ids, placement.first_expert(rank), placement.experts_per_rank)


def expert_major_pairs(local_ids: torch.Tensor, num_local_experts: int) -> list[tuple[int, int, int]]:
    """(expert, token, k) of every local pair, in the documented order of expert-major rows."""
    return [
        (expert, token, k)
        for expert in range(num_local_experts)
        for token, row in enumerate(local_ids.tolist())
        for k, each in enumerate(row)
        if each == expert
    ]


@given(routings())
def test_local_ids_number_the_ranks_own_experts_and_mark_all_others(routing):
    ids, placement, rank = routing
    local = local_ids_of(routing)
    assert local.dtype == ids.dtype
    for before, after in zip(ids.flatten().tolist(), local.flatten().tolist(), strict=True):
        owner, slot = divmod(before, placement.experts_per_rank)
        assert after == (slot if owner == rank else -1)


def test_an_empty_slot_is_no_local_expert_of_any_rank():
    for first_expert in (0, 4, 8):
        assert local_expert_ids(torch.tensor([[-1]]), first_expert, 4).tolist() == [[-1]]


@given(routings())
def test_a_permutation_is_expert_major_and_stable(routing):
    local_ids, num_local = local_ids_of(routing), routing[1].experts_per_rank
    permutation = ExpertPermutation.build(local_ids, num_local)
    pairs = expert_major_pairs(local_ids, num_local)
    assert permutation.source_rows.tolist() == [token for _, token, _ in pairs]
    counts = [sum(1 for each, _, _ in pairs if each == expert) for expert in range(num_local)]
    assert permutation.tokens_per_expert.tolist() == counts
    row_of = {(token, k): row for row, (_, token, k) in enumerate(pairs)}
    tokens, top_k = local_ids.shape
    expected = [[row_of.get((token, k), -1) for k in range(top_k)] for token in range(tokens)]
    assert permutation.row_of_pair.tolist() == expected


# Bounds of the error, relative to the sum of the terms' magnitudes. Each product and each sum in float32 is rounded by up to
# 2**-24. The result is rounded once more to the output's dtype, by up to half of that dtype's spacing.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@given(routings(), SEEDS, st.sampled_from(list(ROUNDING)), st.integers(0, 3))
@example((torch.zeros(0, 2, dtype=torch.int32), ExpertPlacement(4, 1), 0), 0, torch.bfloat16, 0)  # no token
@example((torch.zeros(3, 1, dtype=torch.int64), ExpertPlacement(4, 2), 1), 0, torch.bfloat16, 2)  # no local pair
@pytest.mark.parametrize("on_gpus", [False, True])
def test_sum_rows_is_the_weighted_sum_of_each_tokens_rows(on_gpus, routing, seed, dtype, unused_rows):
    local_ids, num_local = local_ids_of(routing), routing[1].experts_per_rank
    generator = seeded(seed)
    weights = torch.rand(local_ids.shape, generator=generator)
    weights[local_ids < 0] = NAN  # weights of pairs of other ranks
    permutation = ExpertPermutation.build(local_ids, num_local)
    pairs = expert_major_pairs(local_ids, num_local)
    rows = torch.randn(len(pairs) + unused_rows, 5, generator=generator).to(dtype)
    rows[len(pairs) :] = NAN
    before = rows.clone()

    if on_gpus and local_ids.numel():  # sum_rows calls this function for CUDA tensors
        output = _sum_rows_without_sync(rows, permutation.row_of_pair, permutation.row_of_pair >= 0, weights)
    else:
        output = sum_rows(rows, permutation.row_of_pair, weights)

    expected = torch.zeros(local_ids.shape[0], 5, dtype=torch.float64)
    magnitude = torch.zeros_like(expected)
    for row, (_, token, k) in enumerate(pairs):
        term = rows[row].double() * weights[token, k].double()
        expected[token] += term
        magnitude[token] += term.abs()
    assert (output.dtype, output.shape) == (dtype, expected.shape)
    bound = magnitude * (2 * local_ids.shape[1] * 2**-24 + ROUNDING[dtype])
    # float16 has subnormal numbers: half of their spacing is 2**-24
    assert bool(((output.double() - expected).abs() <= bound + 2**-24 * (dtype is torch.float16)).all())
    assert torch.equal(rows[: len(pairs)], before[: len(pairs)]), "the experts' output is not written"
    assert output.untyped_storage().data_ptr() != rows.untyped_storage().data_ptr() or not output.numel()


def test_a_bad_row_reaches_its_own_token_only():
    local_ids = torch.tensor([[0, -1], [-1, -1], [1, 0]])
    permutation = ExpertPermutation.build(local_ids, 2)
    rows = torch.ones(3, 2)  # tokens 0 and 2 of expert 0, then token 2 of expert 1
    rows[0] = NAN
    output = sum_rows(rows, permutation.row_of_pair, torch.ones(3, 2))
    assert output[0].isnan().all()
    assert output[1:].tolist() == [[0, 0], [2, 2]]


@given(routings())
def test_each_token_goes_once_to_each_rank_that_has_one_of_its_experts(routing):
    ids, placement, _ = routing
    destinations = RankDestinations.build(ids, placement)
    owners = [{expert // placement.experts_per_rank for expert in row} for row in ids.tolist()]
    sent = [(rank, token) for rank in range(placement.ep_size) for token in range(len(owners)) if rank in owners[token]]
    ranks_of_rows = torch.arange(placement.ep_size).repeat_interleave(destinations.rows_per_rank)
    assert list(zip(ranks_of_rows.tolist(), destinations.tokens.tolist(), strict=True)) == sent
    assert destinations.rows_per_rank.tolist() == [
        sum(1 for rank, _ in sent if rank == destination) for destination in range(placement.ep_size)
    ]
    row_of = {pair: row for row, pair in enumerate(sent)}
    ranks = range(placement.ep_size)
    expected = [[row_of.get((rank, token), -1) for rank in ranks] for token in range(len(owners))]
    assert destinations.row_of_rank.tolist() == expected
    ranks_of_tokens = RanksOfTokens.of(ids, placement)
    assert torch.equal(ranks_of_tokens.rows_per_rank, destinations.rows_per_rank)
    assert torch.equal(ranks_of_tokens.tokens(len(sent)), destinations.tokens)
    assert ranks_of_tokens.row_of_rank().tolist() == expected


@given(routings(), SEEDS, st.sampled_from([torch.float32, torch.bfloat16]))
def test_returned_rows_are_added_to_their_token(routing, seed, dtype):
    ids, placement, _ = routing
    destinations = RankDestinations.build(ids, placement)
    returned = small_integers(destinations.tokens.numel(), 3, generator=seeded(seed), dtype=dtype)
    expected = [[0.0] * 3 for _ in range(ids.shape[0])]
    for token, row in zip(destinations.tokens.tolist(), returned.tolist(), strict=True):
        expected[token] = [a + b for a, b in zip(expected[token], row, strict=True)]
    output = sum_rows(returned, destinations.row_of_rank)
    assert output.dtype == dtype
    assert output.tolist() == expected


@given(st.lists(st.integers(0, 4), max_size=9))
def test_expert_ranges_cover_the_rows_and_skip_idle_experts(counts):
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    covered = []
    for expert, start, stop in expert_ranges(counts):
        assert start == len(covered) < stop
        covered += [expert] * (stop - start)
    assert covered == owners


def good(**changes):
    arguments = {
        "hidden_states": torch.zeros(3, 4),
        "topk_weights": torch.ones(3, 2),
        "topk_ids": torch.tensor([[0, 7], [3, 1], [2, 6]], dtype=torch.int32),
        "num_experts": 8,
    }
    return arguments | changes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"topk_ids": torch.tensor([[0, 7], [3, 1], [2, 6]])},
        {"hidden_states": torch.zeros(0, 4), "topk_weights": torch.ones(0, 2), "topk_ids": torch.zeros(0, 2).int()},
        {"topk_ids": torch.tensor([[0, 7], [5, 5], [99, -1]]), "mask": torch.tensor([True, False, False])},
        {"topk_ids": torch.full((3, 2), -1), "mask": torch.zeros(3, dtype=torch.bool)},
    ],
    ids=["int32", "int64", "no tokens", "unused rows hold anything", "no row is used"],
)
def test_routing_that_fits_is_accepted(changes):
    check_topk(**good(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": torch.zeros(3)}, "hidden_states has shape (3,); it must be [tokens, hidden_size]"),
        ({"hidden_states": torch.zeros(4, 4)}, "topk_ids (3, 2) and topk_weights (3, 2) must both be [4, top_k]"),
        ({"topk_weights": torch.ones(3, 3)}, "topk_ids (3, 2) and topk_weights (3, 3) must both be [3, top_k]"),
        ({"topk_weights": torch.ones(3), "topk_ids": torch.zeros(3).int()}, "topk_ids (3,) and topk_weights (3,) must"),
        ({"topk_ids": torch.zeros(3, 2)}, "topk_ids is torch.float32; it must be int32 or int64"),
        ({"topk_ids": torch.zeros(3, 2, dtype=torch.int16)}, "topk_ids is torch.int16; it must be int32 or int64"),
        (
            {"num_experts": 7},
            "topk_ids lie in [0, 7]; with 7 experts they must lie in [0, 6]",
        ),
        (
            {"topk_ids": torch.tensor([[0, 7], [-1, 1], [2, 6]])},
            "topk_ids lie in [-1, 7]; with 8 experts they must lie in [0, 7]",
        ),
        (
            {"topk_ids": torch.tensor([[0, 7], [3, 3], [2, 6]]), "distinct_for": "mc2"},
            "topk_ids row 1 is [3, 3]: mc2 takes an expert only once in a row",
        ),
        (
            {"topk_ids": torch.tensor([[0, 7], [1, 8], [9, 9]]), "mask": torch.tensor([True, True, False])},
            "topk_ids lie in [0, 8]",
        ),
        (
            {
                "topk_ids": torch.tensor([[0, 7], [4, 4], [9, 9]]),
                "mask": torch.tensor([True, True, False]),
                "distinct_for": "mc2",
            },
            "topk_ids row 1 is [4, 4]",
        ),
    ],
)
def test_routing_that_does_not_fit_is_refused_with_what_it_is_and_what_it_must_be(changes, message):
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        check_topk(**good(**changes))


def test_a_repeated_expert_is_found_when_the_two_are_not_neighbours():
    ids = torch.tensor([[0, 1, 2], [5, 3, 5]])
    with pytest.raises(InvalidInputError, match=re.escape("row 1 is [5, 3, 5]")):
        check_topk(torch.zeros(2, 4), torch.ones(2, 3), ids, 8, distinct_for="mc2")


def test_values_on_an_accelerator_are_not_read():
    hidden_states = torch.zeros(2, 4, device="meta")
    check_topk(hidden_states, torch.ones(2, 2, device="meta"), torch.zeros(2, 2, dtype=torch.int32, device="meta"), 8)
    with pytest.raises(InvalidInputError, match="must both be"):
        check_topk(hidden_states, torch.ones(2, 2, device="meta"), torch.zeros(2, 3).int().to("meta"), 8)


def test_router_logits_must_have_a_row_a_token_and_a_column_an_expert():
    check_router_logits(torch.zeros(3, 4), torch.zeros(3, 8), 8)
    for wrong in (torch.zeros(2, 8), torch.zeros(3, 7), torch.zeros(24)):
        with pytest.raises(InvalidInputError, match=rf"{re.escape(str(tuple(wrong.shape)))}.*must be \[3, 8\]"):
            check_router_logits(torch.zeros(3, 4), wrong, 8)


@given(st.integers(1, 32), st.integers(1, 16), st.data())
def test_expected_destinations_follow_the_hypergeometric_law(ep_size, experts_per_rank, data):
    num_experts = ep_size * experts_per_rank
    top_k = data.draw(st.integers(1, num_experts))
    misses_a_rank = comb(num_experts - experts_per_rank, top_k) / comb(num_experts, top_k)
    # the tolerance covers 3 rounded operations for each of the top_k factors
    exact = ep_size * (1 - misses_a_rank)
    assert distinct_destinations(num_experts, ep_size, top_k) == pytest.approx(exact, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("ep_size", "ranks"), [(8, 5.29), (16, 6.52), (32, 7.27), (64, 7.68)])
def test_expected_destinations_of_256_experts_and_top_8(ep_size, ranks):
    assert distinct_destinations(256, ep_size, 8) == pytest.approx(ranks, abs=0.005)


@given(st.sampled_from([2, 4, 8]), SEEDS)
def test_the_law_agrees_with_counted_destinations(ep_size, seed):
    placement = ExpertPlacement(16, ep_size)
    ids = distinct_ids(2000, 3, 16, seeded(seed))
    mean = RankDestinations.build(ids, placement).tokens.numel() / 2000
    # A token needs at most 3 ranks, so the standard deviation of the mean is below 1 / sqrt(2000). Five of them are allowed.
    assert mean == pytest.approx(distinct_destinations(16, ep_size, 3), abs=5 / 2000**0.5)
