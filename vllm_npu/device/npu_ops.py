"""Ascend's ops through torch_npu. No other module calls them. portable_ops defines the result and the arguments of each op.

Source: op-plugin's documents of the torch_npu functions (torch_npu 2.13).
"""

import logging
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch

from vllm_npu.core.ascend_recipes import ASKED_NOTHING, INT8_GROUPS, MC2Asked
from vllm_npu.core.limits import INT8_GROUP, UNPERMUTE_MAX_TOP_K, BalanceMode, DeviceLimits, MC2Limits, MoELayer
from vllm_npu.device import portable_ops
from vllm_npu.device.portable_ops import DistributeDispatchOutput, InitRoutingOutput
from vllm_npu.errors import InvalidInputError, UnsupportedConfigError
from vllm_npu.transport.base import Transport
from vllm_npu.transport.hccl_direct.chip import limits_of_this_chip, torch_npu

logger = logging.getLogger("vllm.npu.device")


class DistributeOps(NamedTuple):
    """Names of MC2's two ops in torch_npu, for one version of them."""

    dispatch: str
    combine: str


DISTRIBUTE_OPS = {  # by version, newest first
    2: DistributeOps("npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2"),
    1: DistributeOps("npu_moe_distribute_dispatch", "npu_moe_distribute_combine"),
}
# combine_index of the last dispatch on each HCCL group, until the combine. An entry also goes when nobody holds the tensor any
# more, since nobody can combine then.
_UNCOMBINED: "WeakValueDictionary[str, torch.Tensor]" = WeakValueDictionary()
INT32_MAX = torch.iinfo(torch.int32).max
COUNTS = 1  # group_list_type and expert_token_nums_type: a count of rows for each expert, not prefix sums


@cache
def device_limits() -> DeviceLimits:
    """Limits of this process's NPU with this torch_npu. Raises UnsupportedConfigError for a chip of no known family."""
    return limits_of_this_chip().of_version(distribute_version())


@cache
def distribute_version() -> int:
    """The newest version of which this torch_npu has both of MC2's ops. 0: it has none. LOCAL."""
    for version, ops in DISTRIBUTE_OPS.items():
        if all(hasattr(torch_npu, op) for op in ops):
            logger.info(
                "MC2 uses version %d of its ops: torch_npu %s has %s", version, torch_npu.__version__, ops.dispatch
            )
            return version
    logger.info("torch_npu %s has none of MC2's ops", torch_npu.__version__)
    return 0


def init_routing(
    x: torch.Tensor, ids: torch.Tensor, num_experts: int, local_experts: range, scale: torch.Tensor | None = None
) -> InitRoutingOutput:
    """portable_ops.init_routing by npu_moe_init_routing_v2, but always with N * K rows. LOCAL. Host sync: no. Graph capture:
    yes."""
    if not device_limits().routing_ops:
        return portable_ops.init_routing(x, ids, num_experts, local_experts, scale)
    if ids.numel() == 0:  # the op takes no empty tensors
        counts = torch.zeros(len(local_experts), dtype=torch.int64, device=x.device)
        return InitRoutingOutput(x.new_empty((0, x.shape[1])), ids, counts, None if scale is None else scale[:0, 0])
    expanded_x, row_idx, counts, expanded_scale = torch_npu.npu_moe_init_routing_v2(
        x.contiguous(),
        ids.int().contiguous(),
        scale=None if scale is None else scale.flatten(),
        active_num=ids.numel(),
        expert_num=num_experts,
        expert_tokens_num_type=COUNTS,
        expert_tokens_num_flag=True,
        active_expert_range=[local_experts.start, local_experts.stop],
        row_idx_type=0,  # row_idx holds the row of each pair
    )
    return InitRoutingOutput(
        expanded_x, row_idx.view(ids.shape), counts, None if scale is None else expanded_scale.flatten()
    )


def finalize_routing(
    rows: torch.Tensor, row_of_pair: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """portable_ops.finalize_routing by npu_moe_token_unpermute, which adds up in float32 and takes float32 weights.

    limits.DeviceLimits.routing_ops says why it is not npu_moe_finalize_routing. LOCAL. Host sync: no, but for more columns than
    UNPERMUTE_MAX_TOP_K yes. Graph capture: yes where there is no host sync.
    """
    if not device_limits().routing_ops or row_of_pair.shape[1] > UNPERMUTE_MAX_TOP_K:
        return portable_ops.finalize_routing(rows, row_of_pair, weights)
    if row_of_pair.numel() == 0 or rows.shape[0] == 0:
        return rows.new_zeros((row_of_pair.shape[0], rows.shape[1]))
    # The kernels of all chips leave out an index past the last row. -1 they read, or not, or refuse: see limits. Without its
    # sign bit, -1 is the largest index.
    index = row_of_pair.int().bitwise_and(INT32_MAX)
    probs = rows.new_ones(index.shape, dtype=torch.float32) if weights is None else weights
    summed: torch.Tensor = torch_npu.npu_moe_token_unpermute(rows, index.flatten(), probs)
    return summed


def npu_dynamic_quant(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """portable_ops.npu_dynamic_quant by the op of this name. LOCAL. Host sync: no. Graph capture: yes."""
    if not device_limits().routing_ops or x.numel() == 0:
        return portable_ops.npu_dynamic_quant(x)
    values, scales = torch_npu.npu_dynamic_quant(x)
    return values, scales.unsqueeze(1)


def npu_grouped_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    group_list: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    per_token_scale: torch.Tensor | None = None,
    output_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """portable_ops.npu_grouped_matmul by the op of this name. LOCAL. Host sync: no. Graph capture: yes."""
    if not device_limits().routing_ops:
        return portable_ops.npu_grouped_matmul(
            x, weight, group_list, scale=scale, per_token_scale=per_token_scale, output_dtype=output_dtype
        )
    output_dtype = x.dtype if output_dtype is None else output_dtype
    if x.shape[0] == 0:  # the op takes no empty tensors
        return x.new_empty((0, weight.shape[2]), dtype=output_dtype)
    product: torch.Tensor = torch_npu.npu_grouped_matmul(
        [x],
        [weight],
        scale=None if scale is None else [scale],
        per_token_scale=None if per_token_scale is None else [per_token_scale],
        group_list=group_list,
        split_item=2,  # one output for all groups
        group_type=0,  # groups of rows
        group_list_type=COUNTS,
        output_dtype=output_dtype,
    )[0]
    return product


def npu_moe_update_expert(
    expert_ids: torch.Tensor,
    eplb_table: torch.Tensor,
    *,
    local_rank_id: int,
    world_size: int,
    balance_mode: BalanceMode = BalanceMode.BY_RANK,
) -> torch.Tensor:
    """portable_ops.npu_moe_update_expert by the op of this name. LOCAL. Host sync: no. Graph capture: yes."""
    # The op takes no empty tensors and no group of one rank.
    if not device_limits().update_expert or expert_ids.numel() == 0 or world_size < 2:
        return portable_ops.npu_moe_update_expert(
            expert_ids, eplb_table, local_rank_id=local_rank_id, world_size=world_size, balance_mode=balance_mode
        )
    physical: torch.Tensor
    physical, _ = torch_npu.npu_moe_update_expert(
        expert_ids, eplb_table, local_rank_id=local_rank_id, world_size=world_size, balance_mode=int(balance_mode)
    )
    return physical


def distribute_dispatch(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    *,
    group_ep: Transport,
    moe_expert_num: int,
    expert_scales: torch.Tensor | None = None,
    x_active_mask: torch.Tensor | None = None,
    quant_mode: int = 0,
    global_bs: int = 0,
    asked: MC2Asked = ASKED_NOTHING,
) -> DistributeDispatchOutput:
    """portable_ops.distribute_dispatch by the newest version of the op that torch_npu has.

    The op's algorithm is the one that was asked for. If none was, it is the full mesh, or the hierarchy for a layer that only
    the hierarchy takes. COLLECTIVE over group_ep, in one kernel. Host sync: no. Graph capture: yes. Raises
    UnsupportedConfigError for a chip without the op or the algorithm, for a mask where the op takes none, and for ranks that
    differ where the op wants as many rows from each. Raises InvalidInputError where the last dispatch of the group still waits
    for its combine: the kernels of a group share one window and switch its halves at each call, so op-plugin's documents call
    the two ops in pairs.
    """
    mc2 = _mc2_of(moe_expert_num, expert_ids.shape[1], x.shape[1], x.dtype, group_ep.size, asked)
    if global_bs and not mc2.takes_uneven_ranks:
        raise UnsupportedConfigError(
            f"{mc2.name} takes as many rows from each rank, and these ranks bring up to {global_bs // group_ep.size}; pad the "
            "rows, or send such a step by all2all or allgather"
        )
    if x_active_mask is not None and not mc2.takes_mask:
        raise UnsupportedConfigError(
            f"{mc2.name} takes no mask, and a step needs one where a rank has no token or TP ranks have different numbers of "
            "tokens; send such a step by all2all or allgather"
        )
    group = group_ep.name_for_ops
    if group in _UNCOMBINED:
        raise InvalidInputError(
            f"a second dispatch of mc2 on group '{group_ep.group}' (HCCL's {group}) before the combine of the first: Ascend's "
            "ops alternate on a group; combine the first micro-batch before, or give the second one a group of its own"
        )
    group_ep.note_op("dispatch", expert_ids.numel() * x.shape[1] * (1 if quant_mode else x.element_size()))
    expand_x, dynamic_scales, combine_index, expert_token_nums, ep_recv_counts, _, expand_scales = getattr(
        torch_npu, DISTRIBUTE_OPS[mc2.version].dispatch
    )(
        x,
        expert_ids.int(),
        **_arguments_of_group(group_ep, group, mc2.version, mc2.comm_alg),
        moe_expert_num=moe_expert_num,
        expert_scales=expert_scales if mc2.takes_weights else None,
        x_active_mask=x_active_mask,
        quant_mode=quant_mode,
        global_bs=global_bs,
        expert_token_nums_type=COUNTS,
    )
    _UNCOMBINED[group] = combine_index
    return DistributeDispatchOutput(
        expand_x=expand_x,
        combine_index=combine_index,
        expert_token_nums=expert_token_nums,
        ep_recv_counts=ep_recv_counts,
        dynamic_scales=dynamic_scales if quant_mode else None,
        expand_scales=expand_scales,
        comm_alg=mc2.comm_alg,
    )


def distribute_combine(
    expand_x: torch.Tensor,
    expert_ids: torch.Tensor,
    combine_index: torch.Tensor,
    ep_send_counts: torch.Tensor,
    expert_scales: torch.Tensor,
    *,
    group_ep: Transport,
    moe_expert_num: int,
    x_active_mask: torch.Tensor | None = None,
    expand_scales: torch.Tensor | None = None,
    comm_alg: str = "",
    comm_quant_mode: int = 0,
    global_bs: int = 0,
) -> torch.Tensor:
    """portable_ops.distribute_combine by the same version of the op as the dispatch. COLLECTIVE over group_ep, in one kernel.
    Host sync: no. Graph capture: yes."""
    version = distribute_version()
    group = group_ep.name_for_ops
    _UNCOMBINED.pop(group, None)  # also where the op raises: its handle is used up then
    row_bytes = expand_x.shape[1] * expand_x.element_size()
    if comm_quant_mode == INT8_GROUPS:
        row_bytes = expand_x.shape[1] + row_bytes // INT8_GROUP
    group_ep.note_op("combine", expert_ids.numel() * row_bytes)
    combined: torch.Tensor = getattr(torch_npu, DISTRIBUTE_OPS[version].combine)(
        expand_x,
        expert_ids.int(),
        combine_index,
        ep_send_counts,
        expert_scales,
        **_arguments_of_group(group_ep, group, version, comm_alg),
        moe_expert_num=moe_expert_num,
        x_active_mask=x_active_mask,
        expand_scales=expand_scales,
        global_bs=global_bs,
        comm_quant_mode=comm_quant_mode,
    )
    return combined


def forget_dispatch(combine_index: torch.Tensor, *, group_ep: Transport) -> None:
    """Let the group dispatch again, if the dispatch that returned `combine_index` still waits for its combine. LOCAL."""
    if _UNCOMBINED.get(group_ep.name_for_ops) is combine_index:
        del _UNCOMBINED[group_ep.name_for_ops]


TensorLists = tuple[list[torch.Tensor], list[torch.Tensor]]
"""A list for the first product and one for the second. A list has one tensor for all experts, or one for each."""


def dispatch_ffn_combine(
    x: torch.Tensor,  # [num_tokens, hidden_size], at least one row
    expert_idx: torch.Tensor,  # [num_tokens, top_k] int32; with a mask, the operator writes into the rows that are masked
    probs: torch.Tensor,  # [num_tokens, top_k] float32
    *,
    weights: TensorLists,
    scales: TensorLists,
    biases: TensorLists,
    group_ep: Transport,
    num_local_experts: int,
    max_output_size: int,  # rows that a rank has room for; the operator drops more without an error
    x_active_mask: torch.Tensor | None = None,  # [num_tokens] bool; the operator for 16-bit weights ignores it
    swiglu_limit: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """vllm-ascend's operator of this name. Returns the weighted sum of each token's experts, as x, and the rows that arrived
    for each expert of this rank, [num_local_experts] int32. COLLECTIVE over group_ep, in one kernel. Host sync: no. Graph
    capture: yes. Source: vllm-ascend, csrc/torch_binding.cpp. No portable op defines it.
    """
    operator = torch.ops._C_ascend.dispatch_ffn_combine
    there = expert_idx.numel() * x.shape[1] * (1 if weights[0][0].dtype == torch.int8 else x.element_size())
    group_ep.note_op("dispatch_ffn_combine", there + expert_idx.numel() * x.shape[1] * x.element_size())
    out = torch.empty_like(x)
    expert_token_nums = torch.empty(num_local_experts, dtype=torch.int32, device=x.device)
    operator(
        x=x,
        weight1=weights[0],
        weight2=weights[1],
        expert_idx=expert_idx,
        scale1=scales[0],
        scale2=scales[1],
        bias1=biases[0],
        bias2=biases[1],
        probs=probs,
        group=group_ep.name_for_ops,
        max_output_size=max_output_size,
        out=out,
        expert_token_nums=expert_token_nums,
        x_active_mask=x_active_mask,
        swiglu_limit=swiglu_limit,
        **_world_size_if_taken(group_ep.size),
    )
    return out, expert_token_nums


def dispatch_gmm_combine_decode(
    x: torch.Tensor,  # [num_tokens, hidden_size], at least one row
    expert_ids: torch.Tensor,  # [num_tokens, top_k] int32
    expert_scales: torch.Tensor,  # [num_tokens, top_k] float32
    *,
    weights: TensorLists,  # int8
    scales: TensorLists,
    group_ep: Transport,
    moe_expert_num: int,  # over all ranks
    global_bs: int = 0,  # the most rows of a rank times the ranks; 0: all ranks bring as many
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator of this name of vllm-ascend 0.23. Returns the weighted sum of each token's experts, as x, and the rows that
    arrived for each expert of this rank, int64. COLLECTIVE over group_ep, in one kernel. Host sync: no. Graph capture: yes.
    Source: vllm-ascend, csrc/torch_binding.cpp. No portable op defines it.
    """
    rows = expert_ids.numel()
    group_ep.note_op("dispatch_gmm_combine_decode", rows * x.shape[1] * (1 + x.element_size()))
    output: tuple[torch.Tensor, torch.Tensor] = torch.ops._C_ascend.dispatch_gmm_combine_decode(
        x=x,
        expert_ids=expert_ids,
        gmm1_permuted_weight=weights[0],
        gmm1_permuted_weight_scale=scales[0],
        gmm2_weight=weights[1],
        gmm2_weight_scale=scales[1],
        expert_scales=expert_scales,
        group_ep=group_ep.name_for_ops,
        ep_rank_size=group_ep.size,
        ep_rank_id=group_ep.rank,
        moe_expert_num=moe_expert_num,
        global_bs=global_bs,
    )
    return output


def _world_size_if_taken(size: int) -> dict[str, int]:
    """The argument of vllm-ascend 0.30 that 0.23 does not have."""
    schema = torch.ops._C_ascend.dispatch_ffn_combine.default._schema
    return {"world_size": size} if any(argument.name == "world_size" for argument in schema.arguments) else {}


def _arguments_of_group(group_ep: Transport, group: str, version: int, comm_alg: str) -> dict[str, Any]:
    """The arguments of both ops that name the group and the algorithm. Version 1 has no comm_alg."""
    arguments = {"group_ep": group, "ep_world_size": group_ep.size, "ep_rank_id": group_ep.rank}
    return arguments if version == 1 else {**arguments, "comm_alg": comm_alg}


@cache
def _mc2_of(
    num_experts: int, top_k: int, hidden_size: int, dtype: torch.dtype, ep_size: int, asked: MC2Asked
) -> MC2Limits:
    """Limits of the MC2 algorithm that takes a layer of these sizes. Raises UnsupportedConfigError where there is no MC2, and
    as DeviceLimits.with_mc2."""
    layer = MoELayer(num_experts=num_experts, top_k=top_k, hidden_size=hidden_size, dtype=dtype)
    limits = device_limits().with_mc2(asked)
    mc2 = limits.for_layer(layer, ep_size).mc2
    if mc2 is None:
        raise UnsupportedConfigError(
            f"{limits.family} has no MC2, or this torch_npu has no op for it; use all2all or allgather"
        )
    return mc2
