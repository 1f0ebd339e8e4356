"""Ascend's ops, through torch_npu: the only module that calls them. portable_ops defines what each computes.

Contracts: op-plugin's documents of the functions named (torch_npu 2.13).
"""

from functools import cache
from typing import Any

import torch

from vllm_npu.device import portable_ops
from vllm_npu.device.portable_ops import Counts, DistributeDispatchOutput, GroupList, InitRoutingOutput, PrefixSums
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.limits import DEVICES, BalanceMode, DeviceLimits, MoELayer
from vllm_npu.transport.base import Transport

try:
    import torch_npu
except ImportError as error:
    raise UnsupportedConfigError(
        f"NPU tensors need torch_npu, and importing it fails ({error}); install torch_npu and CANN, or run under the emulated "
        "Ascend device: python -m vllm_npu.emulator run"
    ) from error

GROUP_LIST_TYPES = {PrefixSums: 0, Counts: 1}  # group_list_type of npu_grouped_matmul
TOKEN_MAJOR_WITH_DROPPED_ROWS = 3  # drop_pad_mode: rows [E, C, H], and the one whose indices may be -1


@cache
def device_limits() -> DeviceLimits:
    """What this process's NPU can run. Raises UnsupportedConfigError for a chip of no known family."""
    name = str(torch_npu.npu.get_device_name())
    for limits in DEVICES.values():
        if name.startswith(limits.socs):
            return limits
    known = ", ".join(f"{limits.family} ({'*, '.join(limits.socs)}*)" for limits in DEVICES.values())
    raise UnsupportedConfigError(f"this NPU is a {name}, which is of no family that is known here: {known}")


def init_routing(
    x: torch.Tensor, local_ids: torch.Tensor, num_local_experts: int, scale: torch.Tensor | None = None
) -> InitRoutingOutput:
    """npu_moe_init_routing_v2: as portable_ops.init_routing, but with N * K rows whatever the routing. LOCAL. Host sync: no.
    Graph capture: yes."""
    if not device_limits().routing_ops:
        return portable_ops.init_routing(x, local_ids, num_local_experts, scale)
    if local_ids.numel() == 0:  # the op takes no empty tensors
        counts = torch.zeros(num_local_experts, dtype=torch.int64, device=x.device)
        return InitRoutingOutput(
            x.new_empty((0, x.shape[1])), local_ids, counts, None if scale is None else scale[:0, 0]
        )
    # Ids outside of the active range are dropped; one past the last stands for them, since the op takes no negative ones.
    ids = torch.where(local_ids < 0, num_local_experts, local_ids).int()
    expanded_x, row_idx, counts, expanded_scale = torch_npu.npu_moe_init_routing_v2(
        x.contiguous(),
        ids,
        scale=None if scale is None else scale.flatten(),
        active_num=ids.numel(),
        expert_num=num_local_experts + 1,
        expert_tokens_num_type=1,  # counts
        expert_tokens_num_flag=True,
        active_expert_range=[0, num_local_experts],
        row_idx_type=0,  # row of each pair
    )
    return InitRoutingOutput(
        expanded_x, row_idx.view(ids.shape), counts, None if scale is None else expanded_scale.flatten()
    )


def finalize_routing(
    rows: torch.Tensor, row_of_pair: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """npu_moe_finalize_routing: as portable_ops.finalize_routing, weights rounded to the rows' dtype, which the op demands.
    LOCAL. Host sync: no. Graph capture: yes."""
    if not device_limits().routing_ops:
        return portable_ops.finalize_routing(rows, row_of_pair, weights)
    if row_of_pair.numel() == 0 or rows.shape[0] == 0:
        return rows.new_zeros((row_of_pair.shape[0], rows.shape[1]))
    scales = rows.new_ones(row_of_pair.shape) if weights is None else weights.to(rows.dtype)
    summed: torch.Tensor = torch_npu.npu_moe_finalize_routing(
        rows.unsqueeze(1), None, None, None, scales, row_of_pair.int().flatten(), None, TOKEN_MAJOR_WITH_DROPPED_ROWS
    )
    return summed


def npu_dynamic_quant(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As portable_ops has it. LOCAL. Host sync: no. Graph capture: yes."""
    if not device_limits().routing_ops or x.numel() == 0:
        return portable_ops.npu_dynamic_quant(x)
    values, scales = torch_npu.npu_dynamic_quant(x)
    return values, scales.unsqueeze(1)


def npu_grouped_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    group_list: GroupList,
    *,
    scale: torch.Tensor | None = None,
    per_token_scale: torch.Tensor | None = None,
    output_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """As portable_ops has it, for one stacked weight. LOCAL. Host sync: no. Graph capture: yes."""
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
        group_list=group_list.values,
        split_item=2,  # one output for all groups
        group_type=0,  # groups of rows
        group_list_type=GROUP_LIST_TYPES[type(group_list)],
        output_dtype=output_dtype,
    )[0]
    return product


def npu_moe_update_expert(
    expert_ids: torch.Tensor,
    eplb_table: torch.Tensor,
    *,
    expert_scales: torch.Tensor | None = None,
    pruning_threshold: torch.Tensor | None = None,
    active_mask: torch.Tensor | None = None,
    local_rank_id: int,
    world_size: int,
    balance_mode: BalanceMode = BalanceMode.BY_RANK,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As portable_ops has it. LOCAL. Host sync: no. Graph capture: yes."""
    arguments: dict[str, Any] = {
        "expert_scales": expert_scales,
        "pruning_threshold": pruning_threshold,
        "active_mask": active_mask,
        "local_rank_id": local_rank_id,
        "world_size": world_size,
        "balance_mode": balance_mode,
    }
    # The op takes no empty tensors and no group of one rank.
    if not device_limits().update_expert or expert_ids.numel() == 0 or world_size < 2:
        return portable_ops.npu_moe_update_expert(expert_ids, eplb_table, **arguments)
    arguments["balance_mode"] = int(balance_mode)
    physical, kept = torch_npu.npu_moe_update_expert(expert_ids, eplb_table, **arguments)
    return physical, None if expert_scales is None else kept


def npu_moe_distribute_dispatch_v2(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    *,
    group_ep: Transport,
    moe_expert_num: int,
    expert_scales: torch.Tensor | None = None,
    x_active_mask: torch.Tensor | None = None,
    expert_token_nums_type: int = 1,
    shared_expert_rank_num: int = 0,
    quant_mode: int = 0,
    global_bs: int = 0,
) -> DistributeDispatchOutput:
    """As portable_ops has it, by the full mesh, or by the hierarchy where only that takes the sizes. COLLECTIVE over
    group_ep, in one kernel. Host sync: no. Graph capture: yes."""
    comm_alg = _comm_alg(
        MoELayer(
            num_experts=moe_expert_num,
            top_k=expert_ids.shape[1],
            hidden_size=x.shape[1],
            dtype=x.dtype,
            shared_expert_ranks=shared_expert_rank_num,
        ),
        group_ep.size,
    )
    group_ep.note_op("dispatch", expert_ids.numel() * x.shape[1] * (1 if quant_mode else x.element_size()))
    expand_x, dynamic_scales, assist_info, expert_token_nums, ep_recv_counts, _, expand_scales = (
        torch_npu.npu_moe_distribute_dispatch_v2(
            x,
            expert_ids.int(),
            group_ep=group_ep.name_for_ops,
            ep_world_size=group_ep.size,
            ep_rank_id=group_ep.rank,
            moe_expert_num=moe_expert_num,
            expert_scales=expert_scales if comm_alg else None,
            x_active_mask=x_active_mask,
            comm_alg=comm_alg,
            shared_expert_rank_num=shared_expert_rank_num,
            quant_mode=quant_mode,
            global_bs=global_bs,
            expert_token_nums_type=expert_token_nums_type,
        )
    )
    return DistributeDispatchOutput(
        expand_x=expand_x,
        assist_info_for_combine=assist_info,
        expert_token_nums=expert_token_nums,
        ep_recv_counts=ep_recv_counts,
        dynamic_scales=dynamic_scales if quant_mode else None,
        expand_scales=expand_scales,
        comm_alg=comm_alg,
    )


@cache
def _comm_alg(layer: MoELayer, ep_size: int) -> str:
    mc2 = device_limits().for_layer(layer, ep_size).mc2
    return "" if mc2 is None else mc2.comm_alg


def npu_moe_distribute_combine_v2(
    expand_x: torch.Tensor,
    expert_ids: torch.Tensor,
    assist_info_for_combine: torch.Tensor,
    ep_send_counts: torch.Tensor,
    expert_scales: torch.Tensor,
    *,
    group_ep: Transport,
    moe_expert_num: int,
    x_active_mask: torch.Tensor | None = None,
    expand_scales: torch.Tensor | None = None,
    comm_alg: str = "",
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
) -> torch.Tensor:
    """As portable_ops has it. COLLECTIVE over group_ep, in one kernel. Host sync: no. Graph capture: yes."""
    group_ep.note_op("combine", expert_ids.numel() * expand_x.shape[1] * expand_x.element_size())
    combined: torch.Tensor = torch_npu.npu_moe_distribute_combine_v2(
        expand_x,
        expert_ids.int(),
        assist_info_for_combine,
        ep_send_counts,
        expert_scales,
        group_ep=group_ep.name_for_ops,
        ep_world_size=group_ep.size,
        ep_rank_id=group_ep.rank,
        moe_expert_num=moe_expert_num,
        x_active_mask=x_active_mask,
        expand_scales=expand_scales,
        comm_alg=comm_alg,
        shared_expert_rank_num=shared_expert_rank_num,
        global_bs=global_bs,
    )
    return combined
