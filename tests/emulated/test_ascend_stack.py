"""What stands in for vllm-ascend's compiled operators and vLLM's Triton kernel, against plain torch. Needs neither."""

import ctypes
from types import ModuleType

import pytest
import torch

from tests.emulated.references import distinct_ids, random_rows
from tests.emulated.test_aclnn_low_bits import packed, scale_in_int64
from vllm_npu.emulator.ascend_stack import custom_ops, finder
from vllm_npu.emulator.ascend_stack.slot_mapping import SlotMappingKernel

pytestmark = pytest.mark.emulated

ROWS, EXPERTS, TOP_K = 7, 16, 3


@pytest.fixture(scope="module")
def ops():
    custom_ops.register()
    custom_ops.register()  # once in a process is enough
    return torch.ops._C_ascend


@pytest.mark.parametrize("group_count", [4, 8])  # torch_npu's gating refuses groups of two experts
@pytest.mark.parametrize(("norm_type", "renorm"), [(0, 0), (0, 1), (1, 1)])
def test_gating_divides_the_chosen_weights_by_their_sum(ops, norm_type, renorm, group_count):
    logits, bias = random_rows(ROWS, EXPERTS, dtype=torch.bfloat16), random_rows(EXPERTS, dtype=torch.bfloat16, seed=2)
    weights, ids, all_scores = ops.moe_gating_top_k(
        logits.npu(), TOP_K, 2, group_count, 1, renorm, norm_type, True, 2.5, 1e-20, bias.npu() if norm_type else None
    )
    scores = torch.sigmoid(logits.float()) if norm_type else torch.softmax(logits.float(), -1)
    choice = scores + bias.float() if norm_type else scores
    best_groups = choice.view(ROWS, group_count, -1).topk(2).values.sum(-1).topk(2).indices
    kept = torch.zeros(ROWS, group_count, dtype=torch.bool).scatter_(1, best_groups, True)
    wanted_ids = choice.masked_fill(~kept.repeat_interleave(EXPERTS // group_count, 1), -torch.inf).topk(TOP_K).indices
    wanted = scores.gather(1, wanted_ids)
    if norm_type or renorm:
        wanted = wanted / wanted.sum(-1, keepdim=True)
    assert torch.equal(ids.cpu().long(), wanted_ids)
    torch.testing.assert_close(weights.cpu(), (wanted * 2.5).bfloat16())
    torch.testing.assert_close(all_scores.cpu(), scores)


@pytest.mark.parametrize("by_table", [True, False])
def test_experts_chosen_by_a_table_of_token_ids(ops, by_table):
    logits, bias = random_rows(ROWS, EXPERTS, dtype=torch.float32), random_rows(EXPERTS, seed=2)
    table = distinct_ids(20, TOP_K, EXPERTS, seed=3)
    token_ids = torch.tensor([3, 19, 0, 7, 7, -1, 12])  # -1: a row of padding
    given = {"input_ids": token_ids.npu(), "tid2eid": table.npu()} if by_table else {"bias": bias.npu()}
    weights, ids, _ = ops.moe_gating_top_k_hash(
        logits.npu(), TOP_K, **given, routed_scaling_factor=1.5, norm_type=2, group_select_mode=1
    )
    scores = (1 + logits.double().exp()).log().sqrt()
    wanted_ids = table[token_ids.clamp(min=0)].long() if by_table else (scores + bias).topk(TOP_K).indices
    wanted = scores.gather(1, wanted_ids)
    assert torch.equal(ids.cpu().long(), wanted_ids)
    torch.testing.assert_close(weights.cpu().double(), 1.5 * wanted / wanted.sum(-1, keepdim=True), rtol=1e-5, atol=0)
    with pytest.raises(NotImplementedError, match="norm_type=1"):
        ops.moe_gating_top_k_hash(logits.npu(), TOP_K, **given, norm_type=1)


def test_routing_without_a_range_is_over_all_experts(ops):
    x, ids = random_rows(ROWS, 8, dtype=torch.float16), distinct_ids(ROWS, TOP_K, EXPERTS, seed=1)
    options = {"expert_num": EXPERTS, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True, "quant_mode": -1}
    rows, _, counts, _ = ops.npu_moe_init_routing_custom(x.npu(), ids.npu(), active_num=ROWS * TOP_K, **options)
    assert torch.equal(counts.cpu(), torch.bincount(ids.flatten(), minlength=EXPERTS))
    order = ids.flatten().argsort(stable=True)
    torch.testing.assert_close(rows.cpu(), x.repeat_interleave(TOP_K, 0)[order])


def test_norm_with_bias(ops):
    x1, x2, gamma, beta = (random_rows(*shape, seed=len(shape)) for shape in ((4, 8), (4, 8), (8,), (8,)))
    y, _, total = ops.npu_add_rms_norm_bias(x1.npu(), x2.npu(), gamma.npu(), beta.npu(), 1e-6)
    torch.testing.assert_close(total.cpu(), x1 + x2)
    torch.testing.assert_close(y.cpu(), torch.nn.functional.rms_norm(x1 + x2, (8,), gamma, 1e-6) + beta)


@pytest.mark.parametrize("limit", [0.0, 0.5])
def test_int8_swiglu_of_experts(ops, limit):
    """The operators that multiply, by one tensor of all weights and by one for each expert, and the one that is given sums."""
    counts, inner, width = torch.tensor([3, 0, 2]), 16, 12
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-128, 128, (6, inner), generator=generator, dtype=torch.int8)  # a row more than the groups have
    weight = torch.randint(-128, 128, (3, inner, width), generator=generator, dtype=torch.int8)
    scale, x_scale = random_rows(3, width).abs() / 99, random_rows(6, seed=2).abs() / 99
    groups = torch.repeat_interleave(torch.arange(3), counts)
    sums = torch.stack([x[row].int() @ weight[group].int() for row, group in enumerate(groups)])
    gate, up = (sums.float() * scale[groups] * x_scale[:5, None]).chunk(2, -1)
    if limit:
        assert all(bool((half > limit).any() and (half < -limit).any()) for half in (gate, up))
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    wanted = torch.nn.functional.silu(gate) * up
    fused = ops.grouped_matmul_swiglu_quant_weight_nz(
        x.npu(), weight.npu(), scale.npu(), x_scale.npu(), counts.cumsum(0).npu(), swiglu_limit=limit
    )
    of_lists = ops.grouped_matmul_swiglu_quant_weight_nz_tensor_list(
        x.npu(), list(weight.npu()), list(scale.npu()), x_scale.npu(), counts.cumsum(0).npu(), swiglu_limit=limit
    )
    padded = torch.cat([sums, torch.full((1, width), 9, dtype=torch.int32)])
    apart = ops.npu_dequant_swiglu_quant(
        padded.npu(),
        weight_scale=scale.npu(),
        activation_scale=x_scale.npu(),
        group_index=counts.npu(),
        quant_mode=1,
        swiglu_mode=int(limit > 0),
        clamp_limit=limit,
    )
    for values, scales in (fused[:2], of_lists[:2], apart):
        assert values.dtype == torch.int8
        steps = (values[:5].cpu().float() - wanted / scales[:5].cpu().unsqueeze(-1)).abs()
        assert steps.max() <= 0.5 + 1e-4
        torch.testing.assert_close(scales[:5].cpu(), wanted.abs().amax(-1) / 127)
        assert bool(scales[5:].isnan().all())
    with pytest.raises(NotImplementedError, match="bias and offset are not emulated"):
        ops.grouped_matmul_swiglu_quant_weight_nz(
            x.npu(), weight.npu(), scale.npu(), x_scale.npu(), counts.cumsum(0).npu(), bias=scale.npu()
        )
    with pytest.raises(NotImplementedError, match="quant_mode=0"):
        ops.npu_dequant_swiglu_quant(
            padded.npu(), weight_scale=scale.npu(), activation_scale=x_scale.npu(), group_index=counts.npu()
        )


@pytest.mark.parametrize("limit", [0.0, 0.5])
@pytest.mark.parametrize("running_sums", [False, True])
@pytest.mark.parametrize("lists", [False, True])
def test_int8_rows_by_int4_weights_of_experts(ops, lists, running_sums, limit):
    """With the assist matrix 8 * weight * scale, the product is the plain one; a larger matrix adds the rest."""
    counts, inner, width = torch.tensor([3, 0, 2]), 32, 16
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-128, 128, (6, inner), generator=generator, dtype=torch.int8)  # a row more than the groups have
    weight = torch.randint(-8, 8, (3, inner, width), generator=generator, dtype=torch.int32)
    scale, x_scale = random_rows(3, width).abs() / 9, random_rows(6, seed=2).abs() / 9
    more = random_rows(3, width, seed=3)
    arguments = {
        "weight": torch.stack([packed(each) for each in weight]),
        "weight_scale": scale_in_int64(scale),
        "weight_assist_matrix": 8 * weight.sum(1) * scale + more,
    }
    on_device = {name: list(each.npu()) if lists else [each.npu()] for name, each in arguments.items()}
    values, scales = ops.grouped_matmul_swiglu_quant_v2(
        x.npu(),
        **on_device,
        x_scale=x_scale.npu(),
        group_list=(counts.cumsum(0) if running_sums else counts).npu(),
        group_list_type=0 if running_sums else 1,
        swiglu_limit=limit,
    )
    groups = torch.repeat_interleave(torch.arange(3), counts)
    products = torch.stack(
        [x[row].double() @ (weight[group] * scale[group].double()) for row, group in enumerate(groups)]
    )
    gate, up = ((products + more[groups]) * x_scale[:5, None]).chunk(2, -1)
    if limit:
        assert (gate > limit).any()
        assert (up.abs() > limit).any()
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    wanted = (torch.nn.functional.silu(gate) * up).float()
    steps = (values[:5].cpu().float() - wanted / scales[:5].cpu().unsqueeze(-1)).abs()
    assert steps.max() <= 0.5 + 1e-3
    torch.testing.assert_close(scales[:5].cpu(), wanted.abs().amax(-1) / 127)
    assert bool(scales[5:].isnan().all())


def test_int8_rows_by_int4_weights_without_an_assist_matrix_are_refused(ops):
    tensors = torch.zeros(2, 8, dtype=torch.int8), [torch.zeros(1, 8, 2, dtype=torch.int32).npu()]
    scales = [torch.zeros(1, 16, dtype=torch.int64).npu()], torch.zeros(2).npu()
    with pytest.raises(NotImplementedError, match="weight_assist_matrix=False"):
        ops.grouped_matmul_swiglu_quant_v2(tensors[0].npu(), tensors[1], *scales, torch.tensor([2]).npu())


@pytest.mark.parametrize(("limit", "alpha", "bias"), [(0.0, 1.0, 0.0), (0.5, 1.7, 1.0)])
def test_int8_swiglu_of_shared_experts(ops, limit, alpha, bias):
    """One group, mode 1: a sigmoid of the scaled gate, both halves limited, and a number added to the second."""
    sums = torch.randint(-900, 900, (5, 12), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    scale, x_scale = random_rows(12).abs() / 99, random_rows(5, seed=2).abs()
    gate, up = (sums.double() * scale.double() * x_scale.double()[:, None]).chunk(2, -1)
    if limit:
        assert (gate > limit).any()
        assert (up.abs() > limit).any()
        gate, up = torch.minimum(gate, torch.tensor(limit)), up.clamp(-limit, limit)
    wanted = (gate / (1 + torch.exp(-alpha * gate)) * (up + bias)).float()
    given = {"weight_scale": scale.npu(), "activation_scale": x_scale.npu(), "quant_mode": 1}
    shape = {"clamp_limit": limit, "glu_alpha": alpha, "glu_bias": bias}
    values, scales = ops.npu_dequant_swiglu_quant(sums.npu(), **given, swiglu_mode=1, **shape)
    steps = (values.cpu().float() - wanted / scales.cpu().unsqueeze(-1)).abs()
    assert steps.max() <= 0.5 + 1e-4
    torch.testing.assert_close(scales.cpu(), wanted.abs().amax(-1) / 127)
    if limit:
        with pytest.raises(NotImplementedError, match=r"swiglu_mode=0, \{\}, \{'clamp_limit': 0.5"):
            ops.npu_dequant_swiglu_quant(sums.npu(), **given, **shape)


@pytest.mark.parametrize("beta", [None, torch.zeros(8, dtype=torch.float16)])
def test_shapes_for_torch_compile_are_those_of_the_device(ops, beta):
    """torch.compile asks for shapes and dtypes on the meta device."""
    rows, logits, ids = torch.zeros(4, 8).half(), torch.zeros(4, EXPERTS).half(), torch.zeros(4, TOP_K).int()
    sums, scale, counts = torch.zeros(6, 8).int(), torch.ones(EXPERTS, 8), torch.tensor([6] + [0] * (EXPERTS - 1))
    routing = {"expert_num": EXPERTS, "active_num": 12, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True}
    quantised = {"group_index": counts, "weight_scale": scale, "activation_scale": torch.ones(6), "quant_mode": 1}
    for call, arguments, options in (
        (ops.npu_add_rms_norm_bias, (rows, rows, rows[0], beta), {}),
        (ops.moe_gating_top_k, (logits, TOP_K, 1, 1, 1, 1, 0, False, 1.0, 1e-20), {}),
        (ops.npu_moe_init_routing_custom, (rows, ids), {**routing, "quant_mode": -1}),
        (ops.npu_dequant_swiglu_quant, (sums,), quantised),
        (ops.npu_dequant_swiglu_quant, (sums,), quantised | {"group_index": None, "weight_scale": scale[0]}),
    ):
        on_device, on_meta = (
            call(*to(arguments, device), **dict(zip(options, to(options.values(), device), strict=True)))
            for device in ("npu", "meta")
        )
        assert [(each.shape, each.dtype) for each in on_device] == [(each.shape, each.dtype) for each in on_meta]


def to(arguments, device: str) -> list:
    return [each.to(device) if isinstance(each, torch.Tensor) else each for each in arguments]


def test_an_operator_that_is_not_there_is_named(ops):
    with pytest.raises(AttributeError, match="matmul_allreduce_add_rmsnorm"):
        print(ops.matmul_allreduce_add_rmsnorm)


def plain_formats(rank: int, num_ranks: int) -> None:
    import torch_npu

    custom_ops.keep_formats_plain()
    weight = torch.arange(64, dtype=torch.int8).view(2, 32).npu()
    cast = torch_npu.npu_format_cast(weight, 29)
    assert torch.equal(cast.cpu(), weight.cpu())
    assert cast.data_ptr() != weight.data_ptr()
    assert torch_npu.npu_format_cast(weight, 2).data_ptr() == weight.data_ptr()
    with pytest.raises(NotImplementedError, match="acl_format=4, "):
        torch_npu.npu_format_cast(weight, 4)


def test_weights_stay_plain(run_in_ranks) -> None:
    run_in_ranks(plain_formats, 1)


@pytest.mark.parametrize(
    ("shifted", "ids", "positions", "rejected", "drafting", "places", "moved"),
    [
        (
            *(False, [1, 2, 9, -5, 6, 4, 5, 8, -5], [10, 11, 12, 13, 0, 7, 8, 9, 10]),
            *([0, 0, 0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0, 1], [2, 3, 7, 8], [0] * 5),
        ),
        (
            *(True, [2, 9, -5, 6, 5, 8, -5], [10, 11, 12, 0, 7, 8, 9]),
            *([0, 0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0, 1], [1, 2, 5, 6], [0, 1, 2, 4, 5]),
        ),
    ],
)
def test_inputs_of_a_parallel_draft(ops, shifted, ids, positions, rejected, drafting, places, moved):
    """Two requests: tokens 1, 2, 3, of which 3 was rejected, and tokens 4, 5. Their next tokens are 9 and 8. By hand."""
    values = ([1, 2, 3, 4, 5], [10, 11, 12, 7, 8], [9, 8], [0, 3, 5], [1, 4])
    tensors = [torch.tensor(each, dtype=torch.int32) for each in values]
    call = ops.npu_copy_and_expand_eagle_inputs
    out = call(*(tensor.npu() for tensor in tensors), 6, -5, 2, shifted, len(ids))
    assert [each.tolist() for each in out] == [ids, positions, rejected, drafting, places, moved]
    assert [each.dtype for each in out] == [torch.int32] * 2 + [torch.int8] * 2 + [torch.int32] * 2
    # vllm-ascend without Triton computes the last one, query_end_loc, as int64.
    on_device = [tensor.npu() for tensor in tensors]
    again = call(*on_device[:-1], on_device[-1].long(), 6, -5, 2, shifted, len(ids))
    assert [each.tolist() for each in again] == [ids, positions, rejected, drafting, places, moved]
    with pytest.raises(NotImplementedError, match=r"int32 tensors only, and got torch\.int64"):
        call(on_device[0].long(), *on_device[1:], 6, -5, 2, shifted, len(ids))
    shapes = call(*(tensor.to("meta") for tensor in tensors), 6, -5, 2, shifted, len(ids))
    assert [(each.shape, each.dtype) for each in shapes] == [(each.shape, each.dtype) for each in out]
    with pytest.raises(ValueError, match=r"request 1 fills places \d to \d, and total_draft_tokens is"):
        call(*(tensor.npu() for tensor in tensors), 6, -5, 2, shifted, len(ids) - 1)


def test_blocks_that_came_from_two_ranks_are_ordered(ops):
    """Blocks 2 and 0 of 3: of each token, two heads of rank 0 and two of rank 1, which arrive as one half of the block each."""
    num_heads, head_size, block_size = 4, 3, 5
    wanted = [
        torch.arange(3 * block_size * num_heads * head_size).view(3, block_size, num_heads, head_size) + i
        for i in (0, 1)
    ]
    caches = [each.clone().npu() for each in wanted]
    for cache, whole in zip(caches, wanted, strict=True):
        for block in (2, 0):
            halves = [whole[block][:, :2], whole[block][:, 2:]]
            cache[block] = torch.cat([half.reshape(-1) for half in halves]).view(whole[block].shape).npu()
    names = torch.tensor([2, 0]).npu()
    ops.transpose_kv_cache_by_block(caches[:1], caches[1:], names, block_size, num_heads, head_size, 2, 1)
    for cache, whole in zip(caches, wanted, strict=True):
        torch.testing.assert_close(cache.cpu(), whole, rtol=0, atol=0)
    with pytest.raises(NotImplementedError, match=r"takes blocks of \(5, 2, 3\), not \(5, 4, 3\)"):
        ops.transpose_kv_cache_by_block(caches[:1], caches[1:], names, block_size, 2, head_size, 2, 1)


def test_slots_of_tokens():
    """Two requests of 3 and 2 new tokens, from positions 2 and 7 on, blocks of 4."""
    slots = torch.full((10,), 77).npu()
    positions = torch.tensor([2, 3, 4, 7, 8])
    table = torch.tensor([[5, 2, 9], [1, 3, 8], [4, 4, 4]], dtype=torch.int32)
    arguments = (5, 10, torch.tensor([0, 3, 5], dtype=torch.int32).npu(), positions.npu(), table.npu(), 3, 4, slots)
    constants = {"TOTAL_CP_RANK": 0, "CP_KV_CACHE_INTERLEAVE_SIZE": 1, "BLOCK_SIZE": 1024, "PAD_ID": -1}
    SlotMappingKernel()[(3,)](*arguments, TOTAL_CP_WORLD_SIZE=1, **constants)
    assert slots.tolist() == [22, 23, 8, 15, 32, -1, -1, -1, -1, -1]
    with pytest.raises(NotImplementedError, match="context parallelism over 2 ranks"):
        SlotMappingKernel()[(3,)](*arguments, TOTAL_CP_WORLD_SIZE=2, **constants)


def test_acl_copies_over_the_runtime():
    module = ModuleType("acl.rt")
    finder.fill_acl_rt(module)
    source, target = ctypes.create_string_buffer(b"abcdef"), ctypes.create_string_buffer(7)
    assert module.memcpy(ctypes.addressof(target), 7, ctypes.addressof(source), 7, 0) == 0
    assert target.value == b"abcdef"
    assert module.memcpy(ctypes.addressof(target), 3, ctypes.addressof(source), 7, 0) != 0


@pytest.mark.parametrize(
    ("chip", "device_type"), [("A2", "A2"), ("Ascend910_9391", "A3"), ("310P", "_310P"), ("A5", "A5")]
)
def test_the_chip_is_that_of_the_process(monkeypatch, chip, device_type):
    monkeypatch.setenv("VLLM_NPU_EMULATOR_SOC", chip)
    module = ModuleType("_build_info")
    finder.fill_build_info(module)
    assert module.__device_type__ == device_type


@pytest.mark.parametrize("by_sequence", [False, True], ids=["bgmv", "sgmv"])
@pytest.mark.parametrize("weight_dims", [3, 4])
def test_each_row_is_multiplied_by_the_matrices_of_its_adapter_or_left_as_it_is(ops, by_sequence, weight_dims):
    hidden, rank, width = 64, 8, 48
    of_sequences, lengths = torch.tensor([1, -1, 0]), torch.tensor([3, 2, 1])  # the last row belongs to no sequence
    indices = torch.cat([of_sequences.repeat_interleave(lengths), torch.tensor([-1])])
    x = random_rows(ROWS, hidden, dtype=torch.float16)
    shrinking, expanding = (
        random_rows(2, rank, hidden, dtype=torch.float16),
        random_rows(2, width, rank, dtype=torch.float16),
    )
    if weight_dims == 4:
        shrinking, expanding = shrinking.unsqueeze(1), expanding.unsqueeze(1)
    adapters = (of_sequences.npu(), lengths.npu()) if by_sequence else (indices.npu(),)
    kind = "sgmv" if by_sequence else "bgmv"
    small, old = torch.full((ROWS, rank), torch.nan).npu(), random_rows(ROWS, 80, dtype=torch.float16, seed=3)
    getattr(ops, f"{kind}_shrink")(x.npu(), shrinking.npu(), *adapters, small, 0.5)
    y = old.npu()
    getattr(ops, f"{kind}_expand")(small, expanding.npu(), *adapters, y, 16, width)
    for row, adapter in enumerate(indices.tolist()):
        if adapter < 0:
            assert small[row].isnan().all()
            assert torch.equal(y[row].cpu(), old[row])
            continue
        wanted = x[row].float() @ shrinking[adapter].reshape(rank, hidden).float().T * 0.5
        torch.testing.assert_close(small[row].cpu(), wanted)
        added = old[row].clone()
        added[16:64] = (old[row, 16:64].float() + wanted @ expanding[adapter].reshape(width, rank).float().T).half()
        torch.testing.assert_close(y[row].cpu(), added, rtol=1e-3, atol=1e-3)


def test_a_rank_that_the_expanding_kernel_has_no_sum_for_is_refused(ops):
    x, weight, y = torch.zeros(2, 24).npu(), torch.zeros(1, 32, 24).npu(), torch.zeros(2, 32).half().npu()
    with pytest.raises(ValueError, match="no sum for rank 24"):
        ops.bgmv_expand(x, weight, torch.zeros(2, dtype=torch.int64).npu(), y, 0, 32)
