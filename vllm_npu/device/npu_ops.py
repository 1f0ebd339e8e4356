"""Ascend's ops, through torch_npu: the only module that calls them. portable_ops defines what each computes.

Contracts: op-plugin's documents of the functions named (torch_npu 2.13).
"""

import logging
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch

from vllm_npu.core.limits import BalanceMode, DeviceLimits, MC2Limits, MoELayer
from vllm_npu.device import portable_ops
from vllm_npu.device.portable_ops import Counts, DistributeDispatchOutput, GroupList, InitRoutingOutput, PrefixSums
from vllm_npu.errors import InvalidInputError, UnsupportedConfigError
from vllm_npu.transport.base import Transport
from vllm_npu.transport.hccl_direct.chip import limits_of_this_chip

try:
    import torch_npu
except ImportError as error:
    raise UnsupportedConfigError(
        f"NPU tensors need torch_npu, and importing it fails ({error}); install torch_npu and CANN, or run under the emulated "
        "Ascend device: python -m vllm_npu.emulator run"
    ) from error

logger = logging.getLogger("vllm.npu.device")


class DistributeOps(NamedTuple):
    """Names of a version of MC2's two ops in torch_npu."""

    dispatch: str
    combine: str


DISTRIBUTE_OPS = {  # the first that torch_npu has is taken
    2: DistributeOps("npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2"),
    1: DistributeOps("npu_moe_distribute_dispatch", "npu_moe_distribute_combine"),
}
# By HCCL group: what the combine of its last dispatch needs, for as long as somebody can still combine.
_UNCOMBINED: "WeakValueDictionary[str, torch.Tensor]" = WeakValueDictionary()
GROUP_LIST_TYPES = {PrefixSums: 0, Counts: 1}  # group_list_type of npu_grouped_matmul
TOKEN_MAJOR_WITH_DROPPED_ROWS = 3  # drop_pad_mode: rows [E, C, H], and the one whose indices may be -1


@cache
def device_limits() -> DeviceLimits:
    """What this process's NPU and this torch_npu can run. Raises UnsupportedConfigError for a chip of no known family."""
    return limits_of_this_chip().of_version(distribute_version())


@cache
def distribute_version() -> int:
    """The version of MC2's ops that is taken: the newest of which this torch_npu has both; 0: it has none. LOCAL."""
    for version, ops in DISTRIBUTE_OPS.items():
        if all(hasattr(torch_npu, op) for op in ops):
            logger.info(
                "MC2 goes by version %d of its ops: torch_npu %s has %s", version, torch_npu.__version__, ops.dispatch
            )
            return version
    logger.info("torch_npu %s has none of MC2's ops", torch_npu.__version__)
    return 0


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


def distribute_dispatch(
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
    """As portable_ops has it, by the newest version of the op that torch_npu has: the full mesh, or the hierarchy where only
    that takes the sizes. COLLECTIVE over group_ep, in one kernel. Host sync: no. Graph capture: yes.

    Raises UnsupportedConfigError for a chip without the op, and for a mask where the op takes none; InvalidInputError where
    the group's last dispatch still waits for its combine. The kernels of a group share one window, which each flips: op-
    plugin's documents have the two ops in pairs.
    """
    layer = MoELayer(
        num_experts=moe_expert_num,
        top_k=expert_ids.shape[1],
        hidden_size=x.shape[1],
        dtype=x.dtype,
        shared_expert_ranks=shared_expert_rank_num,
    )
    mc2 = _mc2_of(layer, group_ep.size)
    if x_active_mask is not None and not mc2.takes_mask:
        raise UnsupportedConfigError(
            f"{mc2.name} takes no mask, which a step needs where a rank has no tokens or TP ranks have different numbers; "
            "send such a step by all2all or allgather"
        )
    group = group_ep.name_for_ops
    if group in _UNCOMBINED:
        raise InvalidInputError(
            f"a second dispatch of mc2 on group '{group_ep.group}' (HCCL's {group}) before the combine of the first: Ascend's "
            "ops alternate on a group; combine the first micro-batch before, or give the other one a group of its own"
        )
    of_version_2 = {"comm_alg": mc2.comm_alg} if mc2.version == 2 else {}
    group_ep.note_op("dispatch", expert_ids.numel() * x.shape[1] * (1 if quant_mode else x.element_size()))
    expand_x, dynamic_scales, combine_index, expert_token_nums, ep_recv_counts, _, expand_scales = getattr(
        torch_npu, DISTRIBUTE_OPS[mc2.version].dispatch
    )(
        x,
        expert_ids.int(),
        group_ep=group,
        ep_world_size=group_ep.size,
        ep_rank_id=group_ep.rank,
        moe_expert_num=moe_expert_num,
        expert_scales=expert_scales if mc2.takes_weights else None,
        x_active_mask=x_active_mask,
        shared_expert_rank_num=shared_expert_rank_num,
        quant_mode=quant_mode,
        global_bs=global_bs,
        expert_token_nums_type=expert_token_nums_type,
        **of_version_2,
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
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
) -> torch.Tensor:
    """As portable_ops has it, by the version of the dispatch. COLLECTIVE over group_ep, in one kernel. Host sync: no. Graph
    capture: yes."""
    version = distribute_version()
    of_version_2 = {"comm_alg": comm_alg} if version == 2 else {}
    group = group_ep.name_for_ops
    group_ep.note_op("combine", expert_ids.numel() * expand_x.shape[1] * expand_x.element_size())
    combined: torch.Tensor = getattr(torch_npu, DISTRIBUTE_OPS[version].combine)(
        expand_x,
        expert_ids.int(),
        combine_index,
        ep_send_counts,
        expert_scales,
        group_ep=group,
        ep_world_size=group_ep.size,
        ep_rank_id=group_ep.rank,
        moe_expert_num=moe_expert_num,
        x_active_mask=x_active_mask,
        expand_scales=expand_scales,
        shared_expert_rank_num=shared_expert_rank_num,
        global_bs=global_bs,
        **of_version_2,
    )
    _UNCOMBINED.pop(group, None)
    return combined


@cache
def _mc2_of(layer: MoELayer, ep_size: int) -> MC2Limits:
    limits = device_limits()
    mc2 = limits.for_layer(layer, ep_size).mc2
    if mc2 is None:
        raise UnsupportedConfigError(
            f"{limits.family} has no MC2, or this torch_npu none for it; use all2all or allgather"
        )
    return mc2
