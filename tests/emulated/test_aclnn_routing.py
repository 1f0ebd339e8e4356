"""The local routing ops, through op-plugin's own C++, against their documents read in plain Python."""

import math

import numpy as np
import pytest
import torch

from tests.emulated.references import (
    counts_of,
    distinct_ids,
    half_units,
    is_undefined,
    quotient_int8,
    random_rows,
    refused,
    sorted_pairs,
    sum_of_pairs,
)

pytestmark = pytest.mark.emulated

npu = torch.ops.npu

TOKENS, TOP_K, EXPERTS, WIDTH = 7, 3, 8, 32
PAIRS = TOKENS * TOP_K


def random_ids(seed: int = 0, tokens: int = TOKENS, top_k: int = TOP_K, experts: int = EXPERTS) -> torch.Tensor:
    return distinct_ids(tokens, top_k, experts, seed)


def init_routing(x: torch.Tensor, ids: torch.Tensor, **changes):
    arguments = {
        "active_num": -1,
        "expert_num": EXPERTS,
        "expert_tokens_num_type": 1,
        "expert_tokens_num_flag": True,
        "active_expert_range": [0, EXPERTS],
        "row_idx_type": 0,
        "quant_mode": -1,
    } | {name: value.npu() if isinstance(value, torch.Tensor) else value for name, value in changes.items()}
    return tuple(out.cpu() for out in npu.npu_moe_init_routing_v2(x.npu(), ids.npu(), **arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("first", "end"), [(0, EXPERTS), (2, 6), (7, 8)])
def test_init_routing_sorts_rows_by_expert(dtype: torch.dtype, first: int, end: int) -> None:
    x = random_rows(TOKENS, WIDTH).mul(20).to(dtype)
    ids = random_ids()
    pairs = sorted_pairs(ids, first, end)
    rows, index, counts, scale = init_routing(x, ids, active_expert_range=[first, end])
    assert rows.dtype == dtype
    assert torch.equal(rows[: len(pairs)], x[[pair // TOP_K for pair in pairs]])
    tail = rows[len(pairs) :]
    assert is_undefined(tail)
    assert index.tolist() == [pairs.index(pair) if pair in pairs else -1 for pair in range(PAIRS)]
    assert counts.tolist() == counts_of(ids, first, end)
    assert counts.dtype == torch.int64
    assert is_undefined(scale)


def test_init_routing_scatter_index() -> None:
    ids = random_ids(2)
    pairs = sorted_pairs(ids, 1, 4)
    _, index, _, _ = init_routing(random_rows(TOKENS, WIDTH), ids, active_expert_range=[1, 4], row_idx_type=1)
    assert index[: len(pairs)].tolist() == pairs
    assert is_undefined(index[len(pairs) :])


def test_init_routing_counts() -> None:
    x, ids = random_rows(TOKENS, WIDTH), random_ids(3)
    counts = counts_of(ids, 2, 7)
    cumulative = init_routing(x, ids, active_expert_range=[2, 7], expert_tokens_num_type=0)[2]
    assert cumulative.tolist() == torch.tensor(counts).cumsum(0).tolist()
    used = [[expert, count] for expert, count in enumerate(counts, start=2) if count]
    key_value = init_routing(x, ids, active_expert_range=[2, 7], expert_tokens_num_type=2)[2]
    assert key_value.tolist() == used + [[0, 0]] * (EXPERTS - len(used))
    not_asked_for = init_routing(x, ids, expert_tokens_num_flag=False)[2]
    assert is_undefined(not_asked_for)


@pytest.mark.parametrize("active_num", [0, 5, PAIRS, 100])
def test_init_routing_active_num_limits_the_rows(active_num: int) -> None:
    x, ids = random_rows(TOKENS, WIDTH), random_ids(4)
    pairs = sorted_pairs(ids, 0, EXPERTS)
    rows, index, _, _ = init_routing(x, ids, active_num=active_num)
    kept = min(active_num, PAIRS) if active_num > 0 else PAIRS
    assert rows.shape == (kept, WIDTH)
    assert torch.equal(rows, x[[pair // TOP_K for pair in pairs[:kept]]])
    assert index.tolist() == [pairs.index(pair) for pair in range(PAIRS)]


def test_init_routing_copies_scales_without_quantisation() -> None:
    ids, scale = random_ids(5), random_rows(TOKENS).abs()
    pairs = sorted_pairs(ids, 0, 4)
    out = init_routing(random_rows(TOKENS, WIDTH), ids, scale=scale, active_expert_range=[0, 4])[3]
    assert torch.equal(out[: len(pairs)], scale[[pair // TOP_K for pair in pairs]])
    assert is_undefined(out[len(pairs) :])


@pytest.mark.parametrize("smooth_rows", [None, 1, EXPERTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_init_routing_dynamic_quantisation(smooth_rows: int | None, dtype: torch.dtype) -> None:
    tokens = 300
    x, ids = random_rows(tokens, WIDTH, dtype=dtype), random_ids(6, tokens)
    smooth = None if smooth_rows is None else random_rows(smooth_rows, WIDTH, seed=8).abs() + 0.5
    pairs = sorted_pairs(ids, 0, EXPERTS)
    rows = x.float()[[pair // TOP_K for pair in pairs]]
    if smooth is not None:
        experts = [int(ids.flatten()[pair]) if smooth_rows == EXPERTS else 0 for pair in pairs]
        rows = rows * smooth[experts]
    wanted, wanted_scales = quotient_int8(rows.numpy())
    values, _, _, scales = init_routing(x, ids, quant_mode=1, **({} if smooth is None else {"scale": smooth}))
    assert values.dtype == torch.int8
    np.testing.assert_array_equal(values.numpy(), wanted)
    np.testing.assert_array_equal(scales.numpy(), wanted_scales)


def test_init_routing_quantises_a_row_of_zeros_to_zeros() -> None:
    values, _, _, scales = init_routing(torch.zeros(TOKENS, WIDTH), random_ids(), quant_mode=1)
    assert not values.any()
    assert not scales.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_init_routing_static_quantisation(dtype: torch.dtype) -> None:
    """All steps are float32. 40.1 and 3.3 have no float16, so steps in float16 give other numbers."""
    tokens = 300
    x, ids = random_rows(tokens, WIDTH, dtype=dtype), random_ids(7, tokens)
    scale, offset = torch.tensor([40.1]), torch.tensor([3.3])
    values = init_routing(x, ids, quant_mode=0, scale=scale, offset=offset)[0]
    scaled = x.float().numpy() * np.float32(40.1) + np.float32(3.3)
    wanted = torch.from_numpy(np.clip(np.rint(scaled), -128, 127).astype(np.int8))
    assert torch.equal(values, wanted[[pair // TOP_K for pair in sorted_pairs(ids, 0, EXPERTS)]])


@pytest.mark.parametrize("quant_mode", [-1, 1])
def test_init_routing_with_capacity_drops_and_pads(quant_mode: int) -> None:
    capacity = 2
    x, ids = random_rows(TOKENS, WIDTH), random_ids(8)
    scale = None if quant_mode == 1 else random_rows(TOKENS).abs()
    rows, index, counts, out_scale = init_routing(
        x,
        ids,
        drop_pad_mode=1,
        expert_capacity=capacity,
        quant_mode=quant_mode,
        **({} if scale is None else {"scale": scale}),
    )
    quantised, quantised_scales = quotient_int8(x.numpy())
    source = x if quant_mode == -1 else torch.from_numpy(quantised)
    source_scale = scale if scale is not None else torch.from_numpy(quantised_scales)
    wanted = torch.zeros(EXPERTS, capacity, WIDTH, dtype=source.dtype)
    wanted_scale = torch.zeros(EXPERTS * capacity)
    wanted_index = [-1] * PAIRS
    slots_used = [0] * EXPERTS
    for pair in range(PAIRS):
        expert = int(ids.flatten()[pair])
        slot = slots_used[expert]
        slots_used[expert] += 1
        if slot < capacity:
            wanted[expert, slot] = source[pair // TOP_K]
            wanted_scale[expert * capacity + slot] = source_scale[pair // TOP_K]
            wanted_index[pair] = expert * capacity + slot
    assert max(slots_used) > capacity > min(slots_used), "the case must drop and pad"
    assert torch.equal(rows, wanted)
    assert index.tolist() == wanted_index
    assert counts.tolist() == slots_used, "counts are those before the drop"
    assert torch.equal(out_scale, wanted_scale)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"quant_mode": 7}, r"(?s)561002.*quant_mode=7 is not emulated"),
        ({"row_idx_type": 2}, r"(?s)561002.*row_idx_type=2"),
        ({"expert_tokens_num_type": 3}, "expert_tokens_num_type=3|expert_token_cumsum_or_count|missing"),
        ({"expert_num": 20000, "active_expert_range": [0, 8]}, r"(?s)561002.*expert_num=20000 is not in 1\.\.10240"),
        ({"active_expert_range": [3, 12]}, r"(?s)561002.*active_expert_range=\[3, 12\)"),
        ({"active_num": -2}, r"(?s)561002.*active_num=-2"),
        ({"quant_mode": 0}, r"(?s)161001.*quant_mode=0 needs scale and offset"),
        ({"offset": torch.ones(1)}, r"(?s)161002.*offset is given"),
        ({"scale": torch.ones(3)}, r"(?s)561002.*scale has the shape \[3\]"),
        ({"quant_mode": 1, "scale": torch.ones(2, WIDTH)}, r"(?s)561002.*scale has the shape"),
        ({"drop_pad_mode": 2}, r"(?s)561002.*drop_pad_mode=2"),
        ({"drop_pad_mode": 1, "expert_capacity": 8}, r"(?s)561002.*expert_capacity=8"),
        ({"drop_pad_mode": 1, "expert_capacity": 2, "row_idx_type": 1}, r"(?s)561002.*row_idx_type=0"),
        (
            {"drop_pad_mode": 1, "expert_capacity": 2, "expert_tokens_num_type": 0},
            r"(?s)561002.*expert_tokens_num_type=1",
        ),
        ({"drop_pad_mode": 1, "expert_capacity": 2, "active_expert_range": [0, 4]}, r"(?s)561002.*active_expert_range"),
    ],
)
def test_init_routing_refuses_by_name(changes: dict, text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        init_routing(random_rows(TOKENS, WIDTH), random_ids(), **changes)


def default_range_of_the_first_call(rank: int, num_ranks: int) -> None:
    """torch_npu itself keeps the default of active_expert_range in a static variable."""
    del rank, num_ranks
    x, ids = random_rows(TOKENS, WIDTH).npu(), random_ids().npu() % 4
    counts = {"expert_tokens_num_type": 1, "expert_tokens_num_flag": True}
    for _ in range(2):
        npu.npu_moe_init_routing_v2(x, ids, expert_num=4, **counts)
    for changes in ({}, {"drop_pad_mode": 1, "expert_capacity": 2}):
        refused(
            r"561002.*has 4 elements for 8 experts: without active_expert_range.*pass active_expert_range=\[0, 8\]",
            lambda changes=changes: npu.npu_moe_init_routing_v2(x, ids, expert_num=EXPERTS, **counts, **changes),
        )


def test_init_routing_names_the_default_range_of_the_first_call(run_in_ranks) -> None:
    run_in_ranks(default_range_of_the_first_call, 1)


def test_init_routing_refuses_types_by_name() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)161002.*expert_idx is Long"):
        init_routing(random_rows(TOKENS, WIDTH), random_ids().long())
    with pytest.raises(RuntimeError, match=r"(?s)161002.*x is Char"):
        init_routing(torch.ones(TOKENS, WIDTH, dtype=torch.int8), random_ids(), quant_mode=1)


# --- permute, unpermute ---


@pytest.mark.parametrize("active", [TOKENS + 1, 4])
def test_the_first_init_routing_numbers_pairs_by_row_idx(active: int) -> None:
    x, ids = random_rows(TOKENS, WIDTH), random_ids()
    row_idx = torch.arange(PAIRS, dtype=torch.int32).view(TOP_K, TOKENS).T.contiguous()
    rows, places, experts = (out.cpu() for out in npu.npu_moe_init_routing(x.npu(), row_idx.npu(), ids.npu(), active))
    wanted = sorted((expert, position) for position, expert in enumerate(ids.flatten().tolist()))
    assert experts.tolist() == [expert for expert, _ in wanted]
    pairs = [row_idx.flatten()[position].item() for _, position in wanted]
    assert [places[pair].item() for pair in pairs] == list(range(PAIRS))
    kept = pairs[: min(active, TOKENS) * TOP_K]
    assert torch.equal(rows, x[[pair % TOKENS for pair in kept]])


def test_expert_tokens_end_where_the_rows_of_an_expert_end() -> None:
    experts = torch.tensor([0, 0, 2, 2, 2, 5], dtype=torch.int32)
    assert npu.npu_moe_compute_expert_tokens(experts.npu(), 6).tolist() == [2, 2, 5, 5, 5, 6]
    refused("num_expert=2049; it must be in 1..2048", lambda: npu.npu_moe_compute_expert_tokens(experts.npu(), 2049))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_out_tokens", [None, 5])
def test_permute_and_unpermute(index_dtype: torch.dtype, num_out_tokens: int | None) -> None:
    x, ids = random_rows(TOKENS, WIDTH, dtype=torch.bfloat16), random_ids(9)
    pairs = sorted_pairs(ids, 0, EXPERTS)
    permuted, index = npu.npu_moe_token_permute(x.npu(), ids.to(index_dtype).npu(), num_out_tokens)
    kept = num_out_tokens or PAIRS
    assert torch.equal(permuted.cpu(), x[[pair // TOP_K for pair in pairs[:kept]]])
    assert index.tolist() == [pairs.index(pair) for pair in range(PAIRS)], "the inverse permutation"
    if num_out_tokens:
        return
    probs = random_rows(TOKENS, TOP_K, seed=3)
    restored = npu.npu_moe_token_unpermute(permuted, index, probs.npu()).cpu()
    total = torch.zeros(TOKENS, WIDTH)
    for k in range(TOP_K):
        total = total + x.float() * probs[:, k, None]
    assert torch.equal(restored, total.bfloat16())


def test_permute_of_one_expert_a_token_is_undone_without_probs() -> None:
    x, ids = random_rows(TOKENS, WIDTH), random_ids(10)[:, 0].contiguous()
    permuted, index = npu.npu_moe_token_permute(x.npu(), ids.npu())
    assert torch.equal(npu.npu_moe_token_unpermute(permuted, index).cpu(), x)


def test_permute_keeps_the_order_of_equal_ids() -> None:
    x = torch.arange(600.0)[:, None]
    permuted, _ = npu.npu_moe_token_permute(x.npu(), torch.zeros(600, 1, dtype=torch.int32).npu())
    assert torch.equal(permuted.cpu(), x)


def test_permute_and_unpermute_refuse_by_name() -> None:
    x, ids = random_rows(TOKENS, WIDTH).npu(), random_ids().npu()
    with pytest.raises(RuntimeError, match=r"(?s)561002.*padded_mode=true is not emulated"):
        npu.npu_moe_token_permute(x, ids, None, True)
    with pytest.raises(RuntimeError, match=r"(?s)561002.*at most 512"):
        npu.npu_moe_token_permute(x, torch.zeros(TOKENS, 513, dtype=torch.int32).npu())
    with pytest.raises(RuntimeError, match=r"(?s)161002.*indices is Float"):
        npu.npu_moe_token_permute(x, ids.float())
    permuted, index = npu.npu_moe_token_permute(x, ids)
    with pytest.raises(RuntimeError, match="padded_mode"):
        npu.npu_moe_token_unpermute(permuted, index, torch.ones(TOKENS, TOP_K).npu(), True)
    with pytest.raises(RuntimeError, match=r"(?s)161002.*sorted_indices is Long"):
        npu.npu_moe_token_unpermute(permuted, index.long(), torch.ones(TOKENS, TOP_K).npu())


# --- finalize ---


@pytest.mark.parametrize("drop_pad_mode", [0, 1, 2, 3])
@pytest.mark.parametrize("extras", [False, True])
def test_finalize_routing(drop_pad_mode: int, extras: bool) -> None:
    generator = torch.Generator().manual_seed(drop_pad_mode)
    rows = random_rows(4, 6, WIDTH) if drop_pad_mode in (1, 3) else random_rows(24, WIDTH)
    flat = rows.reshape(-1, WIDTH)
    least = -1 if drop_pad_mode in (1, 3) else 0  # without a capacity, every index is a row
    index = torch.randint(least, 24, (TOKENS, TOP_K), generator=generator, dtype=torch.int32)
    scales = random_rows(TOKENS, TOP_K, seed=5)
    skip1, skip2, bias = (random_rows(n, WIDTH, seed=6 + i) for i, n in enumerate((TOKENS, TOKENS, EXPERTS)))
    experts = random_ids(11)
    given = index if drop_pad_mode >= 2 else index.t()
    out = npu.npu_moe_finalize_routing(
        rows.npu(),
        skip1.npu() if extras else None,
        skip2.npu() if extras else None,
        bias.npu() if extras else None,
        scales.npu(),
        given.reshape(-1).contiguous().npu(),
        experts.npu() if extras else None,
        drop_pad_mode,
    ).cpu()
    wanted = skip1 + skip2 if extras else torch.zeros(TOKENS, WIDTH)
    for k in range(TOP_K):
        row = torch.where(index[:, k, None] >= 0, flat[index[:, k].clamp_min(0).long()], 0.0)
        wanted = wanted + (row + bias[experts[:, k].long()] if extras else row) * scales[:, k, None]
    assert torch.equal(out, wanted)


def test_finalize_routing_without_scales_takes_one_row_a_token() -> None:
    rows, index = random_rows(TOKENS, WIDTH), torch.randperm(TOKENS).int()
    out = npu.npu_moe_finalize_routing(rows.npu(), None, None, None, None, index.npu(), None, 2)
    assert torch.equal(out.cpu(), rows[index.long()])


def test_finalize_never_reads_the_rows_of_inactive_experts() -> None:
    x, ids = random_rows(TOKENS, WIDTH), random_ids(12)
    rows, index, _, _ = npu.npu_moe_init_routing_v2(
        x.npu(), ids.npu(), expert_num=EXPERTS, expert_tokens_num_flag=True, active_expert_range=[2, 5]
    )
    ones = torch.ones(TOKENS, TOP_K).npu()
    out = npu.npu_moe_finalize_routing(rows.unsqueeze(1), None, None, None, ones, index, None, 3).cpu()
    assert torch.equal(out, x * ((ids >= 2) & (ids < 5)).sum(1, keepdim=True))


def unpermute_leaves_out(rank: int, num_ranks: int, soc: str) -> None:
    """Which pairs the chip's kernel leaves out. Row 0 is NaN: reading it shows."""
    del rank, num_ranks
    rows = random_rows(PAIRS, WIDTH, dtype=torch.bfloat16)
    rows[0] = float("nan")
    index = torch.randint(1, PAIRS, (TOKENS, TOP_K), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    weights = random_rows(TOKENS, TOP_K, seed=4)
    index[::2, 1], index[1, 2] = PAIRS, 2**31 - 1  # past the last row
    weights[0, 0] = 0

    def check() -> None:
        out = npu.npu_moe_token_unpermute(rows.npu(), index.flatten().npu(), weights.npu()).cpu()
        assert torch.equal(out, sum_of_pairs(rows, index, weights, np.float32).bfloat16())

    check()
    index[0, 0] = -1  # with weight 0
    check()
    if soc == "A5":  # moe_finalize_routing_v2's kernel
        index[2, 0] = -1
        check()
        index[0, 0] = 0
        assert npu.npu_moe_token_unpermute(rows.npu(), index.flatten().npu(), weights.npu())[0].isnan().all()
    else:
        index[0, 0] = 0  # a row that the kernel does not read, because of weight 0
        out = npu.npu_moe_token_unpermute(rows.npu(), index.flatten().npu(), weights.npu()).cpu()
        rows[0] = 0
        assert torch.equal(out, sum_of_pairs(rows, index, weights, np.float32).bfloat16())
        index[2, 0] = -1
        with pytest.raises(RuntimeError, match=r"(?s)561002.*sorted_indices has the value -1; it must be in 0\.\.20"):
            npu.npu_moe_token_unpermute(rows.npu(), index.flatten().npu(), weights.npu()).cpu()


@pytest.mark.parametrize("soc", ["A2", "A3", "A5"])
def test_unpermute_leaves_out_what_the_chips_kernel_leaves_out(run_in_ranks, soc: str) -> None:
    run_in_ranks(unpermute_leaves_out, 1, soc, soc=soc)


def sums_of_float16(rank: int, num_ranks: int, soc: str) -> None:
    """Both ops on the same rows. Only A2's and A3's finalize_routing rounds each product and each sum to float16."""
    del rank, num_ranks
    rows, index = random_rows(PAIRS, WIDTH, dtype=torch.float16), torch.randperm(PAIRS).int().view(TOKENS, TOP_K)
    weights = random_rows(TOKENS, TOP_K, seed=5).half()
    exact = sum_of_pairs(rows, index, weights, np.float64)
    unpermuted = npu.npu_moe_token_unpermute(rows.npu(), index.flatten().npu(), weights.npu()).cpu()
    finalized = npu.npu_moe_finalize_routing(
        rows.npu(), None, None, None, weights.npu(), index.flatten().npu(), None, 2
    ).cpu()
    assert torch.equal(unpermuted, sum_of_pairs(rows, index, weights, np.float32).half())
    assert ((unpermuted.double() - exact).abs() <= 1.01 * half_units(exact, torch.float16)).all()
    assert torch.equal(finalized, sum_of_pairs(rows, index, weights, np.float32 if soc == "A5" else np.float16).half())
    assert ((finalized.double() - exact).abs() > 1.5 * half_units(exact, torch.float16)).any() == (soc != "A5")


@pytest.mark.parametrize("soc", ["A2", "A3", "A5"])
def test_sums_of_float16(run_in_ranks, soc: str) -> None:
    run_in_ranks(sums_of_float16, 1, soc, soc=soc)


def finalize_without_a_row(rank: int, num_ranks: int, soc: str) -> None:
    del rank, num_ranks
    rows, index = random_rows(TOKENS, WIDTH), torch.tensor([[0, 1, -1]] * TOKENS, dtype=torch.int32)
    weights = random_rows(TOKENS, TOP_K, seed=5)

    def finalize() -> torch.Tensor:
        return npu.npu_moe_finalize_routing(
            rows.npu(), None, None, None, weights.npu(), index.flatten().npu(), None, 2
        ).cpu()

    if soc == "A5":
        assert torch.equal(finalize(), sum_of_pairs(rows, index, weights, np.float32))
    else:
        refused("561002.*expanded_src_to_dst_row has the value -1", finalize)


@pytest.mark.parametrize("soc", ["A2", "A3", "A5"])
def test_without_a_capacity_finalize_routing_takes_a_pair_without_a_row_on_a5_only(run_in_ranks, soc: str) -> None:
    run_in_ranks(finalize_without_a_row, 1, soc, soc=soc)


def test_finalize_routing_refuses_by_name() -> None:
    rows, index = random_rows(TOKENS, WIDTH).npu(), torch.zeros(TOKENS, dtype=torch.int32).npu()
    with pytest.raises(RuntimeError, match=r"(?s)561002.*drop_pad_mode=4"):
        npu.npu_moe_finalize_routing(rows, None, None, None, None, index, None, 4)
    with pytest.raises(RuntimeError, match=r"(?s)161001.*bias needs export_for_source_row"):
        npu.npu_moe_finalize_routing(rows, None, None, rows, None, index, None, 2)
    with pytest.raises(RuntimeError, match=r"(?s)561002.*skip2 is given without skip1"):
        npu.npu_moe_finalize_routing(rows, None, rows, None, None, index, None, 2)
    with pytest.raises(RuntimeError, match=r"(?s)561002.*skip1 has the shape"):
        npu.npu_moe_finalize_routing(rows, rows[:2], None, None, None, index, None, 2)
    half, one = rows.half(), torch.ones(TOKENS, 1).npu()
    for place, name in ((1, "skip1"), (2, "skip2"), (3, "bias"), (4, "scales")):
        arguments = [half, None, None, None, None, index, index.view(TOKENS, 1), 2]
        arguments[place] = one if name == "scales" else rows
        with pytest.raises(RuntimeError, match=rf"(?s)161002.*{name} is Float"):
            npu.npu_moe_finalize_routing(*arguments)


def finalize_on_310p(rank: int, num_ranks: int) -> None:
    del rank, num_ranks
    rows, index = random_rows(TOKENS, WIDTH), torch.randperm(TOKENS).int().npu()
    finalize = npu.npu_moe_finalize_routing
    out = finalize(rows.npu(), None, None, None, None, index, None, 2)
    assert torch.equal(out.cpu(), rows[index.cpu().long()])
    given = rows.npu()
    refused(
        "561002.*drop_pad_mode=0: Ascend310P takes 2", lambda: finalize(given, None, None, None, None, index, None, 0)
    )
    refused("161002.*skip1 is given", lambda: finalize(given, given, None, None, None, index, None, 2))
    refused(
        "161002.*export_for_source_row is given",
        lambda: finalize(given, None, None, None, None, index, index.view(TOKENS, 1), 2),
    )
    refused(
        "161002.*rows on Ascend310P is BFloat16",
        lambda: finalize(given.bfloat16(), None, None, None, None, index, None, 2),
    )
    narrow = given[:, :8].contiguous()
    refused("561002.*multiples of 32", lambda: finalize(narrow, None, None, None, None, index, None, 2))


def test_finalize_routing_on_310p(run_in_ranks) -> None:
    run_in_ranks(finalize_on_310p, 1, soc="310P")


def test_finalize_routing_of_bfloat16_takes_float32_scales() -> None:
    rows, scales = random_rows(TOKENS, WIDTH, dtype=torch.bfloat16), random_rows(TOKENS, 1, seed=5)
    index = torch.arange(TOKENS, dtype=torch.int32)
    out = npu.npu_moe_finalize_routing(rows.npu(), None, None, None, scales.npu(), index.npu(), None, 2)
    assert torch.equal(out.cpu(), (rows.float() * scales).bfloat16())


# --- re-routing ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_re_routing_goes_from_rank_major_to_expert_major(dtype: torch.dtype) -> None:
    counts = torch.tensor([[2, 0, 3], [1, 4, 0]], dtype=torch.int64)
    total, rows = int(counts.sum()), 13
    tokens = random_rows(rows, WIDTH).mul(20).to(dtype)
    scales = random_rows(rows).abs()
    origin = [(expert, rank) for rank in range(2) for expert in range(3) for _ in range(int(counts[rank, expert]))]
    order = sorted(range(total), key=lambda row: origin[row])
    out, out_scales, index, expert_counts = npu.npu_moe_re_routing(
        tokens.npu(), counts.npu(), per_token_scales=scales.npu()
    )
    assert torch.equal(out.cpu()[:total], tokens[order])
    assert torch.equal(out_scales.cpu()[:total], scales[order])
    assert index[:total].tolist() == order
    assert expert_counts.tolist() == [3, 4, 3]
    assert is_undefined(out_scales.cpu()[total:])
    assert is_undefined(index.cpu()[total:])


def test_re_routing_refuses_by_name() -> None:
    tokens, counts = random_rows(4, WIDTH, dtype=torch.bfloat16).npu(), torch.ones(2, 2, dtype=torch.int64).npu()
    with pytest.raises(RuntimeError, match=r"(?s)561002.*expert_token_num_type=0"):
        npu.npu_moe_re_routing(tokens, counts, expert_token_num_type=0)
    with pytest.raises(RuntimeError, match=r"(?s)561002.*idx_type=1"):
        npu.npu_moe_re_routing(tokens, counts, idx_type=1)
    with pytest.raises(RuntimeError, match=r"(?s)161002.*tokens is Float"):
        npu.npu_moe_re_routing(tokens.float(), counts)
    with pytest.raises(RuntimeError, match=r"(?s)561002.*shorter than 16384"):
        npu.npu_moe_re_routing(torch.zeros(4, 16384, dtype=torch.bfloat16).npu(), counts)


# --- replicas of experts; on A3, so in a rank of its own ---


def place_of_replica(replicas: int, token: int, rank: int, world_size: int, balance_mode: int) -> int:
    return rank // math.ceil(world_size / replicas) if balance_mode == 0 else token % replicas


def replicas_and_pruning(rank: int, num_ranks: int) -> None:
    del rank, num_ranks
    table = torch.tensor([[1, 0, -1, -1], [2, 1, 5, -1], [3, 2, 6, 7], [1, 3, -1, -1]], dtype=torch.int32)
    ids = random_ids(13, TOKENS, 3, 4)
    for balance_mode in (0, 1):
        for local_rank in range(8):
            for dtype in (torch.int32, torch.int64):
                physical, _ = npu.npu_moe_update_expert(
                    ids.to(dtype).npu(), table.npu(), local_rank_id=local_rank, world_size=8, balance_mode=balance_mode
                )
                assert physical.dtype == dtype
                assert physical.tolist() == [
                    [
                        int(table[e, 1 + place_of_replica(int(table[e, 0]), token, local_rank, 8, balance_mode)])
                        for e in row
                    ]
                    for token, row in enumerate(ids.tolist())
                ]
    scales = torch.rand(TOKENS, 3, generator=torch.Generator().manual_seed(1)).sort(1, descending=True).values
    threshold = torch.tensor([0.0, 0.3, 0.25])
    active = torch.arange(TOKENS) < 5
    _, mask = npu.npu_moe_update_expert(
        ids.npu(),
        table.npu(),
        expert_scales=scales.npu(),
        pruning_threshold=threshold.npu(),
        active_mask=active.npu(),
        local_rank_id=0,
        world_size=8,
    )
    wanted = active[:, None] & (scales >= threshold * scales.sum(1, keepdim=True))
    assert torch.equal(mask.cpu(), wanted)
    assert wanted.any()
    assert not wanted[:5].all()
    with pytest.raises(RuntimeError, match=r"(?s)561002.*active_mask has a hole"):
        npu.npu_moe_update_expert(
            ids.npu(),
            table.npu(),
            expert_scales=scales.npu(),
            pruning_threshold=threshold.npu(),
            active_mask=(~active).npu(),
            balance_mode=1,
        )
    for changes, text in (
        ({"balance_mode": 2}, "balance_mode=2"),
        ({"world_size": 1, "local_rank_id": 0}, "world_size=1"),
        ({"world_size": 8, "local_rank_id": 8}, "local_rank_id=8"),
        ({"balance_mode": 1, "expert_scales": scales.npu()}, "go together"),
        ({"balance_mode": 1, "active_mask": active.npu()}, "active_mask needs expert_scales"),
    ):
        with pytest.raises(RuntimeError, match=rf"(?s)561002.*{text}"):
            npu.npu_moe_update_expert(ids.npu(), table.npu(), **changes)
    with pytest.raises(RuntimeError, match=r"(?s)561002.*number of replicas that is not in 1\.\.3"):
        npu.npu_moe_update_expert(ids.npu(), table.npu() + 3, balance_mode=1)


def indices_found_bad_on_the_device(rank: int, num_ranks: int) -> None:
    del rank, num_ranks
    rows = random_rows(4, WIDTH)
    with pytest.raises(RuntimeError, match=r"(?s)561002.*sorted_indices has the value -2; it must be in 0\.\.3"):
        npu.npu_moe_token_unpermute(rows.npu(), torch.tensor([0, 1, -2, 9], dtype=torch.int32).npu())
    index = torch.tensor([0, 1, 2, -2], dtype=torch.int32).npu()
    with pytest.raises(RuntimeError, match=r"(?s)561002.*expanded_src_to_dst_row has the value -2"):
        npu.npu_moe_finalize_routing(rows.npu(), None, None, None, None, index, None, 2)
    with pytest.raises(RuntimeError, match=r"(?s)561002.*adds up to 6 and tokens has 4 rows"):
        npu.npu_moe_re_routing(rows.bfloat16().npu(), torch.full((2, 1), 3, dtype=torch.int32).npu())


def test_replicas_and_pruning(run_in_ranks) -> None:
    run_in_ranks(replicas_and_pruning, 1, soc="A3")


def test_indices_found_bad_on_the_device(run_in_ranks) -> None:
    run_in_ranks(indices_found_bad_on_the_device, 1)


def test_update_expert_is_refused_on_a2() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)561002.*has no npu_moe_update_expert"):
        npu.npu_moe_update_expert(random_ids().npu(), torch.ones(EXPERTS, 2, dtype=torch.int32).npu(), balance_mode=1)
