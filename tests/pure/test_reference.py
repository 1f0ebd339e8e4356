"""reference: the truth of all other tests against loops in float64, tie by tie and expert by expert."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import SEEDS, distinct_ids, seeded, small_integers
from vllm_npu.device.portable_ops import _int8_product, npu_dynamic_quant, npu_grouped_matmul
from vllm_npu.errors import InvalidInputError
from vllm_npu.tools.reference import LinearExperts, reference_moe, select_topk


@given(st.integers(0, 9), st.integers(1, 40), SEEDS, st.data())
def test_top_k_takes_the_largest_logits_and_among_equal_ones_the_lowest_id(num_tokens, num_experts, seed, data):
    top_k = data.draw(st.integers(1, num_experts))
    logits = small_integers(num_tokens, num_experts, generator=seeded(seed))  # many ties
    weights, ids = select_topk(logits, top_k)
    expected = [sorted(range(num_experts), key=lambda e: (-row[e], e))[:top_k] for row in logits.tolist()]
    assert ids.tolist() == expected
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    softmax = logits.double().softmax(-1).gather(1, ids.long())
    # exp, a sum of at most 40 terms and a quotient in float32
    torch.testing.assert_close(weights.double(), softmax, rtol=64 * 2**-24, atol=0)


def test_all_zero_logits_choose_the_first_experts():
    assert select_topk(torch.zeros(2, 64), 8)[1].tolist() == [list(range(8))] * 2


def test_logits_of_a_short_dtype_are_weighted_in_float32():
    logits = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.bfloat16)
    weights, _ = select_topk(logits, 3)
    assert torch.equal(weights, select_topk(logits.float(), 3)[0])


def naive_moe(hidden_states, topk_weights, topk_ids, experts):
    """(sum of the terms, sum of their magnitudes), float64, one scalar product at a time."""
    num_tokens, width = hidden_states.shape[0], experts.weights.shape[2]
    total, magnitude = torch.zeros(2, num_tokens, width, dtype=torch.float64)
    for token in range(num_tokens):
        for weight, expert in zip(topk_weights[token].tolist(), topk_ids[token].tolist(), strict=True):
            terms = hidden_states[token].double()[:, None] * experts.weights[expert].double() * weight
            total[token] += terms.sum(0)
            magnitude[token] += terms.abs().sum(0)
    return total, magnitude


@given(
    st.integers(0, 9),
    st.integers(1, 5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([torch.int32, torch.int64]),
    SEEDS,
)
def test_the_reference_is_exact_on_small_integers(num_tokens, top_k, dtype, id_dtype, seed):
    generator = seeded(seed)
    hidden_states = small_integers(num_tokens, 6, generator=generator, dtype=dtype)
    topk_ids = distinct_ids(num_tokens, top_k, 8, generator).to(id_dtype)
    topk_weights = torch.randint(1, 3, (num_tokens, top_k), generator=generator).float()
    experts = LinearExperts.integer(8, 6, 7, seed=seed, dtype=dtype)
    output = reference_moe(hidden_states, topk_weights, topk_ids, experts)
    total, _ = naive_moe(hidden_states, topk_weights, topk_ids, experts)
    assert output.dtype == dtype
    assert torch.equal(output.double(), total)


# Of the experts' outputs and of the total, each rounded once to the dtype; sums of 6 products and of top_k terms in float32.
@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 2**-24), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@given(st.integers(0, 9), st.integers(1, 5), SEEDS)
def test_the_reference_is_within_rounding_on_random_data(dtype, unit, num_tokens, top_k, seed):
    generator = seeded(seed)
    hidden_states = torch.randn(num_tokens, 6, generator=generator).to(dtype)
    topk_ids = distinct_ids(num_tokens, top_k, 8, generator)
    topk_weights = torch.rand(num_tokens, top_k, generator=generator)
    experts = LinearExperts.random(8, 6, 7, seed=seed, dtype=dtype)
    output = reference_moe(hidden_states, topk_weights, topk_ids, experts)
    total, magnitude = naive_moe(hidden_states, topk_weights, topk_ids, experts)
    bound = magnitude * (2.5 * unit + 16 * 2**-24) + 2**-24 * (dtype is torch.float16)  # float16: subnormal results
    assert bool(((output.double() - total).abs() <= bound).all())


def test_the_reference_adds_ascending_k_in_float32():
    big, small = 2.0**24, 1.0
    experts = LinearExperts(torch.tensor([big, small, -big]).view(3, 1, 1))
    x = torch.ones(2, 1)
    ids = torch.tensor([[0, 1, 2], [0, 2, 1]])
    output = reference_moe(x, torch.ones(2, 3), ids, experts)
    assert output.flatten().tolist() == [0.0, 1.0], "2**24 + 1 rounds to 2**24 in float32, and only there"


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), SEEDS)
def test_integer_experts_add_or_subtract_at_most_two_inputs_for_each_output(num_experts, hidden_size, width, seed):
    weights = LinearExperts.integer(num_experts, hidden_size, width, seed=seed, dtype=torch.bfloat16).weights
    assert weights.shape == (num_experts, hidden_size, width)
    assert set(weights.flatten().tolist()) <= {-1.0, 0.0, 1.0}
    used = weights.abs().sum(1)
    assert bool(((used >= 1) & (used <= 2)).all()), "every output column depends on the input"


@pytest.mark.parametrize("draw", [LinearExperts.integer, LinearExperts.random])
def test_experts_are_the_same_for_one_seed_and_differ_for_another(draw):
    first, again, other = (draw(4, 16, 16, seed=seed, dtype=torch.float32).weights for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(expert.flatten().tolist()) for expert in first}) == 4, "experts can be told apart"


@given(st.integers(1, 5), SEEDS)
def test_the_shards_of_all_ranks_add_up_to_the_experts(size, seed):
    experts = LinearExperts.random(3, 7, 5, seed=seed, dtype=torch.float32)
    shards = [experts.shard(rank, size).weights for rank in range(size)]
    assert torch.equal(torch.stack(shards).sum(0), experts.weights)
    assert bool((torch.stack(shards).ne(0).sum(0) <= 1).all()), "no entry is in two shards"


@given(st.lists(st.integers(0, 3), min_size=2, max_size=2), st.integers(0, 3), SEEDS)
def test_a_rank_computes_each_row_with_its_expert_and_leaves_poison_behind_the_last(counts, unused, seed):
    experts = LinearExperts.integer(6, 5, 4, seed=seed, dtype=torch.float32)
    rows = small_integers(sum(counts) + unused, 5, generator=seeded(seed))
    output = npu_grouped_matmul(rows, experts.on_rank(2, 2).weights, torch.tensor(counts))
    owners = [2] * counts[0] + [3] * counts[1]
    for row, expert in enumerate(owners):
        assert torch.equal(output[row], rows[row] @ experts.weights[expert])
    assert output.shape == (len(rows), 4)
    assert bool(output[len(owners) :].isnan().all())


@pytest.mark.parametrize("groups", [1, 3])
def test_a_group_list_that_is_not_one_of_the_weights_is_refused(groups):
    with pytest.raises(InvalidInputError, match=f"group_list has {groups} groups, weight 2"):
        npu_grouped_matmul(torch.zeros(0, 5), torch.zeros(2, 5, 4), torch.zeros(groups, dtype=torch.int64))


def test_int8_products_are_exact_where_float32_has_no_odd_numbers():
    values = torch.full((1, 2049), -128, dtype=torch.int8)
    values[0, 0] = 1
    assert _int8_product(values, values.t()).item() == 2048 * 128**2 + 1 > 2**25


@given(st.integers(1, 5), st.sampled_from([torch.bfloat16, torch.float32]), SEEDS)
def test_int8_experts_hold_integers_exactly_and_others_to_a_127th(num_experts, dtype, seed):
    exact = LinearExperts.integer(num_experts, 6, 7, seed=seed, dtype=dtype)
    assert torch.equal(exact.quantized().dequantized().weights, exact.weights.float())
    inexact = LinearExperts.random(num_experts, 6, 7, seed=seed, dtype=dtype)
    largest = inexact.weights.float().abs().amax(1, keepdim=True)
    error = (inexact.quantized().dequantized().weights - inexact.weights.float()).abs()
    assert bool((error <= largest / 127).all()), (
        "a scale is at most twice the least: half a step of it is largest / 127"
    )


@given(st.integers(0, 4), st.sampled_from([1, 9, 1024, 1025, 2500]), SEEDS)
def test_int8_rows_times_int8_experts_are_the_product_of_their_values(num_rows, hidden_size, seed):
    experts = LinearExperts.random(2, hidden_size, 3, seed=seed, dtype=torch.float32).quantized()
    values, scales = npu_dynamic_quant(torch.randn(2 * num_rows, hidden_size, generator=seeded(seed)))
    output = npu_grouped_matmul(
        values,
        experts.weights,
        torch.tensor([num_rows, num_rows]),
        scale=experts.scales,
        per_token_scale=scales.flatten(),
        output_dtype=torch.float32,
    )
    product = values.view(2, num_rows, hidden_size).long() @ experts.weights.long()
    expected = product.float() * experts.scales[:, None] * scales.view(2, num_rows, 1)
    assert torch.equal(output.view(2, num_rows, 3), expected)
