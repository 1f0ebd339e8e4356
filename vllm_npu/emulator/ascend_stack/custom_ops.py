"""Some of vllm-ascend's compiled operators (torch.ops._C_ascend), made of operators of torch_npu, or called in libopapi.so.

Source of signatures and results: vllm-ascend 0.23.0, csrc/torch_binding.cpp and the kernels. Other operators are absent:
torch.ops raises AttributeError with their name.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from vllm_npu import envs
from vllm_npu.emulator.ascend_stack import aclnn, draft_inputs, kv_blocks, lora_ops

NAMESPACE = "_C_ascend"
SOFTMAX, SQRT_SOFTPLUS = 0, 2  # norm_type
NO_RENORM, L1_RENORM = 0, 1
BY_MAXIMUM = 0  # group_select_mode
# The fewest experts of a group that torch_npu's gating takes. vllm-ascend's takes 2, or 1 where the maximum counts.
LEAST_GROUP = 3

Tensors = tuple[torch.Tensor, ...]


def moe_gating_top_k(
    x: torch.Tensor,
    k: int,
    k_group: int,
    group_count: int,
    group_select_mode: int,
    renorm: int,
    norm_type: int,
    out_flag: bool,
    routed_scaling_factor: float,
    eps: float,
    bias_opt: torch.Tensor | None = None,
) -> Tensors:
    """torch_npu's gating with `renorm`: 1 divides the chosen softmax weights by their sum plus `eps`, and then scales.

    Groups of fewer than LEAST_GROUP experts are filled with experts that cannot be chosen.
    """
    import torch_npu

    divides = norm_type == SOFTMAX and renorm == L1_RENORM
    if renorm not in (NO_RENORM, L1_RENORM):
        raise ValueError(f"moe_gating_top_k: renorm={renorm} is not 0 or 1")
    of_group, rest = divmod(x.shape[-1], group_count) if group_count > 0 else (0, 1)
    is_filled = (
        group_count > 1 and rest == 0 and (1 if group_select_mode == BY_MAXIMUM else 2) <= of_group < LEAST_GROUP
    )
    if is_filled:
        x = _filled_groups(x, group_count)
        bias_opt = _filled_groups(x.new_zeros(group_count * of_group) if bias_opt is None else bias_opt, group_count)
    weights, expert_ids, scores = torch_npu.npu_moe_gating_top_k(
        x.float() if divides else x,
        k,
        bias=bias_opt.float() if divides and bias_opt is not None else bias_opt,
        k_group=k_group,
        group_count=group_count,
        group_select_mode=group_select_mode,
        renorm=NO_RENORM,
        norm_type=norm_type,
        out_flag=out_flag,
        routed_scaling_factor=1.0 if divides else routed_scaling_factor,
        eps=eps,
    )
    if divides:
        weights = (weights / (weights.sum(-1, keepdim=True) + eps) * routed_scaling_factor).to(x.dtype)
    if is_filled:
        expert_ids = expert_ids // LEAST_GROUP * of_group + expert_ids % LEAST_GROUP
        scores = scores.unflatten(-1, (group_count, LEAST_GROUP))[..., :of_group].flatten(-2)
    return weights, expert_ids, scores


def _filled_groups(values: torch.Tensor, group_count: int) -> torch.Tensor:
    """[..., group_count * size] with minus infinity after each group, so that it has LEAST_GROUP values."""
    groups = values.unflatten(-1, (group_count, -1))
    return torch.nn.functional.pad(groups, (0, LEAST_GROUP - groups.shape[-1]), value=-torch.inf).flatten(-2)


def moe_gating_top_k_hash(
    x: torch.Tensor,
    k: int,
    bias: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    tid2eid: torch.Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = SOFTMAX,
    out_flag: bool = False,
    bias_vl: torch.Tensor | None = None,
    image_sentinel_lo: int = 0,
    image_sentinel_count: int = 0,
) -> Tensors:
    """Choose experts by a table of token ids (tid2eid [vocabulary, k], input_ids [n]), or the best without a table.

    A score is sqrt(softplus(x)), and the chosen scores are divided by their sum plus `eps`. The id -1 is that of token 0.
    Source: csrc/moe/moe_gating_top_k_hash, its kernel without groups.
    """
    if (k_group, group_count, renorm, norm_type) != (1, 1, NO_RENORM, SQRT_SOFTPLUS) or bias_vl is not None:
        raise NotImplementedError(
            f"moe_gating_top_k_hash is emulated for one group, renorm=0, norm_type=2 and no bias_vl, not for "
            f"{k_group=}, {group_count=}, {renorm=}, {norm_type=}, bias_vl={bias_vl is not None}"
        )
    scores = torch.nn.functional.softplus(x.float()).sqrt()
    if tid2eid is not None and input_ids is not None:
        expert_ids = tid2eid[input_ids.clamp(min=0)].to(torch.int32)
    else:
        expert_ids = (scores if bias is None else scores + bias.float()).topk(k).indices.to(torch.int32)
    chosen = scores.gather(1, expert_ids.long())
    weights = chosen / (chosen.sum(-1, keepdim=True) + eps) * routed_scaling_factor
    return weights.to(x.dtype), expert_ids, scores


def npu_moe_init_routing_custom(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    *,
    active_expert_range: Sequence[int] = (),
    expert_num: int = -1,
    **rest: Any,
) -> Tensors:
    """torch_npu's init_routing v2. An empty range of experts means all experts."""
    import torch_npu

    return tuple(
        torch_npu.npu_moe_init_routing_v2(
            x,
            expert_idx,
            expert_num=expert_num,
            active_expert_range=list(active_expert_range) or [0, expert_num],
            **rest,
        )
    )


def npu_add_rms_norm_bias(
    x1: torch.Tensor,
    x2: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor | None = None,
    epsilon: float = 1e-6,
) -> Tensors:
    """torch_npu's add_rms_norm, and then an addition of `beta`."""
    import torch_npu

    y, rstd, total = torch_npu.npu_add_rms_norm(x1, x2, gamma, epsilon)
    return (y if beta is None else y + beta), rstd, total


def _swiglu_quantised(
    sums: torch.Tensor,
    counts: torch.Tensor,
    weight_scale: torch.Tensor,
    row_scale: torch.Tensor,
    *,
    added: torch.Tensor | None = None,
    limit: float = 0.0,
    alpha: float = 1.0,
    bias: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale int32 sums [n, 2I], apply swiglu in float32, and quantise to int8 [n, I] with one scale for each row [n].

    `counts` gives the rows of each expert. Rows after the last expert's get the emulated device's undefined values. `added`
    [experts, 2I] float32 is added between the weight's scale and the row's. A positive `limit` bounds the gate above, and the
    other half on both sides. `alpha` is the factor in the sigmoid of the gate, and `bias` is added to the other half.
    """
    zeros = envs.EMULATOR_UNDEFINED.read() == "zero"
    ends = counts.cumsum(0)
    places = torch.arange(len(sums), device=sums.device)
    experts = torch.searchsorted(ends, places, right=True).clamp(max=len(counts) - 1)
    scaled = sums.float() * weight_scale.float()[experts]
    if added is not None:
        scaled = scaled + added[experts]
    scaled = scaled * row_scale.float().unsqueeze(-1)
    gate, up = scaled.chunk(2, -1)
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    rows = gate * torch.sigmoid(alpha * gate) * (up + bias)
    scales = rows.abs().amax(-1) / 127
    divisor = scales.unsqueeze(-1)
    values = torch.where(divisor > 0, rows / divisor, 0.0).round()
    is_used = places < ends[-1]
    values = torch.where(is_used.unsqueeze(-1), values, 0.0 if zeros else -128.0).to(torch.int8)
    return values, torch.where(is_used, scales, 0.0 if zeros else torch.nan)


def grouped_matmul_swiglu_quant_weight_nz(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    swiglu_limit: float = 0.0,
) -> Tensors:
    """Multiply int8 rows by the gate and up weights of their experts, apply swiglu, and quantise to int8.

    `group_list` has running sums of the rows of experts. The emulated device has plain formats only. A positive `swiglu_limit`
    clamps the activation: `limited` of csrc/gmm/grouped_matmul_swiglu_quant.
    """
    import torch_npu

    if bias is not None or offset is not None:
        raise NotImplementedError("grouped_matmul_swiglu_quant_weight_nz: bias and offset are not emulated")
    sums = torch_npu.npu_grouped_matmul(
        [x], [weight], group_list=group_list, split_item=2, group_type=0, group_list_type=0, output_dtype=torch.int32
    )[0]
    counts = torch.diff(group_list, prepend=group_list.new_zeros(1))
    return *_swiglu_quantised(sums, counts, weight_scale, x_scale, limit=swiglu_limit), x_scale.new_empty(0)


def grouped_matmul_swiglu_quant_weight_nz_tensor_list(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    weight_scale: Sequence[torch.Tensor],
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    **options: Any,
) -> Tensors:
    """The operator above, with a tensor for each expert: weights [K, 2I] and scales [2I]. Balanced experts are such lists.

    Source: csrc/gmm/grouped_matmul_swiglu_quant_weight_nz_tensor_list. The kernel reads running sums too.
    """
    values, scales, _ = grouped_matmul_swiglu_quant_weight_nz(
        x, torch.stack(list(weight)), torch.stack(list(weight_scale)), x_scale, group_list, **options
    )
    return values, scales, torch.empty_like(scales)


def grouped_matmul_swiglu_quant_v2(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    weight_scale: Sequence[torch.Tensor],
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    smooth_scale: torch.Tensor | None = None,
    weight_assist_matrix: Sequence[torch.Tensor] | None = None,
    bias: torch.Tensor | None = None,
    dequant_mode: int | None = 0,
    dequant_dtype: int | None = 0,
    quant_mode: int | None = 0,
    quant_dtype: int | None = 0,
    transpose_weight: bool = False,
    group_list_type: int = 0,
    tuning_config: Sequence[int] = (),
    swiglu_limit: float = 0.0,
) -> Tensors:
    """Multiply int8 rows [n, K] by the int4 gate and up weights of their experts, apply swiglu, and quantise to int8.

    weight: one [E, K, 2I / 8] int32, or E of [K, 2I / 8]. weight_scale: [E, 2I] int64 with a float32 in the low half, or E of
    [2I]. weight_assist_matrix: [E, 2I] float32, or E of [2I]. group_list: running sums of rows, or with group_list_type 1 the
    rows of each expert. Source: csrc/gmm/grouped_matmul_swiglu_quant_v2, its A8W4 kernels: a row enters the product as two int4
    halves, of which the low one lacks 8, so the result lacks 8 * the sum of a column of weights. The assist matrix brings it
    back. The kernel rounds both halves' products to float16, and this function does not.
    """
    import torch_npu

    given = {"smooth_scale": smooth_scale is not None, "bias": bias is not None, "dequant_mode": dequant_mode}
    given |= {"quant_mode": quant_mode, "transpose_weight": transpose_weight}
    kinds = x.dtype, weight[0].dtype, weight_scale[0].dtype
    if any(given.values()) or weight_assist_matrix is None or kinds != (torch.int8, torch.int32, torch.int64):
        raise NotImplementedError(
            f"grouped_matmul_swiglu_quant_v2 is emulated for int8 rows, int4 weights in int32, int64 scales and an assist "
            f"matrix; it got {kinds}, {given}, weight_assist_matrix={weight_assist_matrix is not None}"
        )
    values = _unpacked_int4(_stacked(weight, 3))
    scales = _stacked(weight_scale, 2).to(torch.int32).view(torch.float32)
    counts = group_list if group_list_type else torch.diff(group_list, prepend=group_list.new_zeros(1))
    sums = torch_npu.npu_grouped_matmul(
        [x], [values], group_list=counts, split_item=2, group_type=0, group_list_type=1, output_dtype=torch.int32
    )[0]
    added = _stacked(weight_assist_matrix, 2) - 8 * values.sum(1, dtype=torch.float32) * scales
    return _swiglu_quantised(sums, counts, scales, x_scale, added=added, limit=swiglu_limit)


def _stacked(tensors: Sequence[torch.Tensor], dimensions: int) -> torch.Tensor:
    """A list with one tensor of all experts, or with one for each, as one tensor of so many dimensions."""
    return tensors[0] if tensors[0].dim() == dimensions else torch.stack(list(tensors))


def _unpacked_int4(packed: torch.Tensor) -> torch.Tensor:
    """[..., n / 8] int32 to [..., n] int8 from -8 to 7. The first of eight values has the lowest bits."""
    shifts = 4 * torch.arange(8, dtype=torch.int32, device=packed.device)
    nibbles = (packed.unsqueeze(-1) >> shifts) & 15
    return torch.where(nibbles > 7, nibbles - 16, nibbles).to(torch.int8).flatten(-2)


def npu_dequant_swiglu_quant(
    x: torch.Tensor,
    *,
    weight_scale: torch.Tensor | None = None,
    activation_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    quant_scale: torch.Tensor | None = None,
    quant_offset: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    activate_left: bool = True,
    quant_mode: int = 0,
    swiglu_mode: int = 0,
    clamp_limit: float = 0.0,
    glu_alpha: float = 1.0,
    glu_bias: float = 0.0,
) -> Tensors:
    """Apply swiglu to int32 sums of gate and up weights, and quantise to int8 with one scale for each row.

    `group_index` has the number of rows of each expert; without it, all rows are of one. swiglu_mode 1 takes the last three
    arguments. Source: csrc/moe/dequant_swiglu_quant, whose mode 1 halves each row, as mode 0 does. CANN's own operator of this
    name takes every other element in mode 1.
    """
    if x.dtype != torch.int32 or weight_scale is None or activation_scale is None:
        raise NotImplementedError("npu_dequant_swiglu_quant is emulated for int32 with both scales")
    tensors = {"bias": bias, "quant_scale": quant_scale, "quant_offset": quant_offset}
    given = {name: value.shape for name, value in tensors.items() if value is not None}
    shape = {"clamp_limit": clamp_limit, "glu_alpha": glu_alpha, "glu_bias": glu_bias}
    changed = swiglu_mode == 0 and (clamp_limit, glu_alpha, glu_bias) != (0.0, 1.0, 0.0)
    if not activate_left or quant_mode != 1 or given or changed:
        raise NotImplementedError(
            f"npu_dequant_swiglu_quant: activate_left={activate_left}, quant_mode={quant_mode}, swiglu_mode={swiglu_mode}, "
            f"{given}, {shape} are not emulated together"
        )
    counts = torch.full((1,), len(x), device=x.device) if group_index is None else group_index
    weight_scales = weight_scale.view(len(counts), -1)
    return _swiglu_quantised(
        x, counts, weight_scales, activation_scale.view(-1), limit=clamp_limit, alpha=glu_alpha, bias=glu_bias
    )


def dispatch_ffn_combine(
    x: torch.Tensor,
    weight1: Sequence[torch.Tensor],
    weight2: Sequence[torch.Tensor],
    expert_idx: torch.Tensor,
    scale1: Sequence[torch.Tensor],
    scale2: Sequence[torch.Tensor],
    bias1: Sequence[torch.Tensor],
    bias2: Sequence[torch.Tensor],
    probs: torch.Tensor,
    group: str,
    max_output_size: int,
    out: torch.Tensor,
    expert_token_nums: torch.Tensor,
    x_active_mask: torch.Tensor | None = None,
    swiglu_limit: float = 1000000.0,
    world_size: int = 0,
) -> Tensors:
    """Dispatch, the experts and combine (csrc_npu/emulator/aclnn/dispatch_ffn_combine.cpp).

    As vllm-ascend's adapter, which drops the mask and the limit for 16-bit weights and the biases for all but 4-bit ones.
    world_size is not read: the group has a size.
    """
    if x.is_meta:
        return out, expert_token_nums
    if weight1[0].dtype == torch.int8:
        aclnn.call(
            "aclnnDispatchFFNCombine",
            *(x, weight1, weight2, expert_idx, scale1, scale2, probs, x_active_mask, group, max_output_size),
            *(float(swiglu_limit), out, expert_token_nums),
        )
    elif weight1[0].is_floating_point():
        # The kernel does not read the scales. vllm-ascend passes a tensor without elements, which lies on the host.
        aclnn.call(
            "aclnnDispatchFFNCombineBF16",
            *(x, weight1, weight2, expert_idx, [], [], probs, group, max_output_size, out, expert_token_nums),
        )
    else:
        raise NotImplementedError(f"dispatch_ffn_combine is not emulated for weights of {weight1[0].dtype}")
    return out, expert_token_nums


def dispatch_gmm_combine_decode(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    gmm1_permuted_weight: Sequence[torch.Tensor],
    gmm1_permuted_weight_scale: Sequence[torch.Tensor],
    gmm2_weight: Sequence[torch.Tensor],
    gmm2_weight_scale: Sequence[torch.Tensor],
    expert_scales: torch.Tensor,
    expert_smooth_scales: torch.Tensor | None = None,
    x_active_mask: torch.Tensor | None = None,
    group_ep: str = "",
    ep_rank_size: int = 0,
    ep_rank_id: int = 0,
    moe_expert_num: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    quant_mode: int = 0,
    global_bs: int = 0,
) -> Tensors:
    """Dispatch, the experts and combine, for decode steps (csrc_npu/emulator/aclnn/dispatch_gmm_combine_decode.cpp).

    As vllm-ascend 0.23's adapter, which makes both results.
    """
    is_shared = ep_rank_id < shared_expert_rank_num
    num_local_experts = 1 if is_shared else moe_expert_num // (ep_rank_size - shared_expert_rank_num)
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    expert_token_nums = torch.empty(num_local_experts, dtype=torch.int64, device=x.device)
    if not x.is_meta:
        aclnn.call(
            "aclnnDispatchGmmCombineDecode",
            *(x, expert_ids, gmm1_permuted_weight, gmm1_permuted_weight_scale, gmm2_weight, gmm2_weight_scale),
            *(expert_scales, expert_smooth_scales, x_active_mask, group_ep, ep_rank_size, ep_rank_id, moe_expert_num),
            *(shared_expert_num, shared_expert_rank_num, quant_mode, global_bs, output, expert_token_nums),
        )
    return output, expert_token_nums


OPERATORS: dict[str, Callable[..., Tensors | None]] = {
    "moe_gating_top_k(Tensor x, int k, int k_group, int group_count, int group_select_mode, int renorm, int norm_type, "
    "bool out_flag, float routed_scaling_factor, float eps, Tensor? bias_opt=None) "
    "-> (Tensor y, Tensor expert_idx, Tensor out)": moe_gating_top_k,
    # The last three arguments are those of 0.30.
    "moe_gating_top_k_hash(Tensor x, int k, Tensor? bias=None, Tensor? input_ids=None, Tensor? tid2eid=None, int k_group=1, "
    "int group_count=1, float routed_scaling_factor=1.0, float eps=1e-20, int group_select_mode=0, int renorm=0, "
    "int norm_type=0, bool out_flag=False, Tensor? bias_vl=None, int image_sentinel_lo=0, int image_sentinel_count=0) "
    "-> (Tensor y, Tensor expert_idx, Tensor out)": moe_gating_top_k_hash,
    "npu_moe_init_routing_custom(Tensor x, Tensor expert_idx, *, Tensor? scale=None, Tensor? offset=None, "
    "int active_num=-1, int expert_capacity=-1, int expert_num=-1, int drop_pad_mode=0, int expert_tokens_num_type=0, "
    "bool expert_tokens_num_flag=False, int quant_mode=0, int[2] active_expert_range=[], int row_idx_type=0) "
    "-> (Tensor, Tensor, Tensor, Tensor)": npu_moe_init_routing_custom,
    "npu_add_rms_norm_bias(Tensor x1, Tensor x2, Tensor gamma, Tensor? beta=None, float epsilon=1e-6) "
    "-> (Tensor y, Tensor rstd, Tensor x)": npu_add_rms_norm_bias,
    "grouped_matmul_swiglu_quant_weight_nz(Tensor x, Tensor weight, Tensor weight_scale, Tensor x_scale, Tensor group_list, "
    "*, Tensor? bias=None, Tensor? offset=None, float swiglu_limit=0.0) "
    "-> (Tensor output, Tensor output_scale, Tensor output_offset)": grouped_matmul_swiglu_quant_weight_nz,
    "grouped_matmul_swiglu_quant_weight_nz_tensor_list(Tensor x, Tensor[] weight, Tensor[] weight_scale, Tensor x_scale, "
    "Tensor group_list, *, Tensor? bias=None, Tensor? offset=None, float swiglu_limit=0.0) "
    "-> (Tensor output, Tensor output_scale, Tensor output_offset)": grouped_matmul_swiglu_quant_weight_nz_tensor_list,
    "grouped_matmul_swiglu_quant_v2(Tensor x, Tensor[] weight, Tensor[] weight_scale, Tensor x_scale, Tensor group_list, "
    "Tensor? smooth_scale=None, Tensor[]? weight_assist_matrix=None, Tensor? bias=None, int? dequant_mode=0, "
    "int? dequant_dtype=0, int? quant_mode=0, int? quant_dtype=0, bool transpose_weight=False, int group_list_type=0, "
    "int[2] tuning_config=[], float swiglu_limit=0.0) "
    "-> (Tensor output, Tensor output_scale)": grouped_matmul_swiglu_quant_v2,
    "npu_dequant_swiglu_quant(Tensor x, *, Tensor? weight_scale=None, Tensor? activation_scale=None, Tensor? bias=None, "
    "Tensor? quant_scale=None, Tensor? quant_offset=None, Tensor? group_index=None, bool activate_left=True, "
    "int quant_mode=0, int swiglu_mode=0, float clamp_limit=0.0, float glu_alpha=1.0, float glu_bias=0.0) "
    "-> (Tensor y, Tensor scale)": npu_dequant_swiglu_quant,
    # world_size is an argument of 0.30, whose tiling takes the number of ranks from it. 0.23 does not have it.
    "dispatch_ffn_combine(Tensor x, Tensor[] weight1, Tensor[] weight2, Tensor expert_idx, Tensor[] scale1, Tensor[] scale2, "
    "Tensor[] bias1, Tensor[] bias2, Tensor probs, str group, int max_output_size, Tensor(a!) out, "
    "Tensor(b!) expert_token_nums, Tensor? x_active_mask=None, float swiglu_limit=1000000.0, int world_size=0) "
    "-> (Tensor(a!), Tensor(b!))": dispatch_ffn_combine,
    # Of 0.23 alone.
    "dispatch_gmm_combine_decode(Tensor x, Tensor expert_ids, Tensor[] gmm1_permuted_weight, "
    "Tensor[] gmm1_permuted_weight_scale, Tensor[] gmm2_weight, Tensor[] gmm2_weight_scale, Tensor expert_scales, "
    "Tensor? expert_smooth_scales=None, Tensor? x_active_mask=None, str group_ep='', int ep_rank_size=0, int ep_rank_id=0, "
    "int moe_expert_num=0, int shared_expert_num=1, int shared_expert_rank_num=0, int quant_mode=0, int global_bs=0) "
    "-> (Tensor output, Tensor expert_token_nums)": dispatch_gmm_combine_decode,
    draft_inputs.SCHEMA: draft_inputs.npu_copy_and_expand_eagle_inputs,
    kv_blocks.SCHEMA: kv_blocks.transpose_kv_cache_by_block,
}

# vllm-ascend registers FakeTensor functions or effects for these operators. They have no kernel here, so a call raises.
DECLARED = (
    "device_print(str msg) -> ()",
    "device_print_tensor(Tensor tensor) -> ()",
    "get_masked_input_and_mask(Tensor input, int org_vocab_start_index, int org_vocab_end_index, int num_org_vocab_padding, "
    "int added_vocab_start_index, int added_vocab_end_index) -> (Tensor masked_input, Tensor mask)",
)

ACL_FORMAT_ND, ACL_FORMAT_FRACTAL_NZ = 2, 29


def npu_format_cast(
    tensor: torch.Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> torch.Tensor:
    """torch_npu's cast of weights to the format NZ: here a copy in the plain format.

    A format is a layout in memory and changes no value. All memory of the emulated device is plain. get_npu_format reports
    that, and op-plugin then calls the functions for plain weights.
    """
    if (
        acl_format not in (ACL_FORMAT_ND, ACL_FORMAT_FRACTAL_NZ)
        or customize_dtype is not None
        or input_dtype is not None
    ):
        raise NotImplementedError(
            f"npu_format_cast: acl_format={acl_format}, customize_dtype={customize_dtype}, input_dtype={input_dtype} are not "
            "emulated; there are the formats ND (2) and FRACTAL_NZ (29)"
        )
    return tensor if acl_format == ACL_FORMAT_ND else tensor.clone()


# An operator exists as long as its library object. The caches below keep these objects.


@cache
def keep_formats_plain() -> torch.library.Library:
    """Replace torch_npu's npu_format_cast by the one above: op-plugin refuses grouped matmuls of NZ weights, because the
    functions for them are not emulated."""
    library = torch.library.Library("npu", "IMPL")
    library.impl("npu_format_cast", npu_format_cast, "PrivateUse1", allow_override=True)
    return library


@cache
def register() -> torch.library.Library:
    """Define the operators once in a process, for the device and for the shapes that torch.compile asks for."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for schema in DECLARED:
        library.define(schema)
    for schema in lora_ops.SCHEMAS:
        library.define(schema)
        name = schema.partition("(")[0]
        library.impl(name, getattr(lora_ops, name), "PrivateUse1")
    for schema, function in OPERATORS.items():
        library.define(schema)
        for key in ("PrivateUse1", "Meta"):
            library.impl(schema.partition("(")[0], function, key)
    return library
