"""Ascend's MoE ops in plain torch over any transport. They define what npu_ops computes, and run where there is no NPU.

Names, arguments and layouts are torch_npu's (op-plugin's documents of npu_moe_distribute_dispatch_v2 and
npu_moe_distribute_combine_v2, and the A3 kernels in CANN's ops-transformer). Rows that the device leaves unwritten are NaN
here, or UNDEFINED in integer tensors, so that a caller who reads one notices.
"""

from typing import NamedTuple

import torch

from vllm_npu.core.ascend_recipes import ASKED_NOTHING, INT8_GROUPS, MC2Asked
from vllm_npu.core.limits import INT8_GROUP, PORTABLE, BalanceMode, DeviceLimits, QuantMode
from vllm_npu.core.routing import ExpertPermutation, expert_ranges, local_expert_ids, sum_rows
from vllm_npu.core.token_layout import pack, pad_rows
from vllm_npu.core.topology import ExpertPlacement
from vllm_npu.errors import InvalidInputError
from vllm_npu.transport.base import Transport, sum_in_rank_order

ASSIST_CELLS = 128  # int32 cells of combine_index for each row of expand_x
UNDEFINED = torch.iinfo(torch.int32).min
INT8_MAX = 127


def device_limits() -> DeviceLimits:
    """Limits of these ops."""
    return PORTABLE


class DistributeDispatchOutput(NamedTuple):
    """Outputs of npu_moe_distribute_dispatch_v2, without those for tensor parallelism."""

    # [A, H]: by local expert, then source rank, then token; rows past the last count are NaN (-128 in int8)
    expand_x: torch.Tensor
    # Read by combine only. Here and in version 2 of the op it is assist_info_for_combine: [A * 128] int32, with (source rank,
    # token, k) of row i at 3 * i. In version 1 it is expand_idx: [B * K] int32, the number of earlier pairs of this rank with
    # the same expert
    combine_index: torch.Tensor
    # [num_local_experts] int64: counts
    expert_token_nums: torch.Tensor
    # [num_local_experts * W] int32: inclusive prefix sums, local expert major, source rank minor
    ep_recv_counts: torch.Tensor
    # [A] float32, of quantised rows: value = int8 * scale; None without quantisation
    dynamic_scales: torch.Tensor | None
    # a further argument of A2's combine; None elsewhere
    expand_scales: torch.Tensor | None = None
    comm_alg: str = ""  # the algorithm of this dispatch, which its combine must take too


class InitRoutingOutput(NamedTuple):
    """Outputs of init_routing."""

    # [rows, H]: by local expert, then token; rows past the sum of the counts are undefined
    expanded_x: torch.Tensor
    expanded_row_idx: torch.Tensor  # [N, K] integer: row of each (token, k) pair, -1 for a pair of no local expert
    tokens_per_expert: torch.Tensor  # [num_local_experts] int64: counts
    expanded_scale: torch.Tensor | None  # [rows] float32: the scale of each row; None where x has none


def init_routing(
    x: torch.Tensor,  # [N, H]
    ids: torch.Tensor,  # [N, K] integer, global ids from 0 to num_experts - 1
    num_experts: int,
    local_experts: range,  # the ids of this rank's experts
    scale: torch.Tensor | None = None,  # [N, 1] float32: the scale of each row of x
) -> InitRoutingOutput:
    """Copy the rows of the local experts, one for each pair. LOCAL. Host sync on accelerators: yes (the number of pairs)."""
    local_ids = local_expert_ids(ids, local_experts.start, len(local_experts))
    permutation = ExpertPermutation.build(local_ids, len(local_experts))
    return InitRoutingOutput(
        x[permutation.source_rows],
        permutation.row_of_pair,
        permutation.tokens_per_expert,
        None if scale is None else scale.flatten()[permutation.source_rows],
    )


finalize_routing = sum_rows  # each token's weighted sum of its rows; it undoes init_routing


def npu_dynamic_quant(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, H] -> int8 [n, H] and float32 scales [n, 1]: scale = max|x| / 127, value = rint(x / scale). Zeros give zeros.

    dispatch's quant_mode 2 rounds differently, since it multiplies: see quantize_per_token. LOCAL. Host sync: no.
    """
    values = x.float()
    scales = values.abs().amax(dim=-1, keepdim=True) / INT8_MAX
    return torch.where(scales > 0, values / scales, 0).round().to(torch.int8), scales


def npu_grouped_matmul(
    x: torch.Tensor,  # [rows, K]: groups one after the other; int8 with scales
    weight: torch.Tensor,  # [groups, K, N], dtype of x
    group_list: torch.Tensor,  # [groups] int64: number of rows of each group
    *,
    scale: torch.Tensor | None = None,  # of int8 weights: [groups, N] bfloat16, or float32 with float16 outputs
    per_token_scale: torch.Tensor | None = None,  # of int8 rows: [rows] float32
    output_dtype: torch.dtype | None = None,  # for int8 rows; None: dtype of x
) -> torch.Tensor:  # [rows, N]; rows past the last group are undefined (NaN)
    """Multiply the rows of each group by the group's matrix. LOCAL. Host sync: yes (the groups' sizes).

    Raises InvalidInputError unless there is one matrix for each group.
    """
    if group_list.shape != weight.shape[:1]:
        raise InvalidInputError(
            f"npu_grouped_matmul: group_list has {group_list.numel()} groups, weight {weight.shape[0]}; give one matrix for "
            "each group"
        )
    dtype = x.dtype if output_dtype is None else output_dtype
    output = x.new_full((x.shape[0], weight.shape[2]), float("nan"), dtype=dtype)
    for group, start, stop in expert_ranges(group_list.tolist()):
        if scale is None or per_token_scale is None:
            output[start:stop] = _product(x[start:stop], weight[group])
        else:
            product = _int8_product(x[start:stop], weight[group])
            output[start:stop] = product.float() * scale[group].float() * per_token_scale[start:stop, None]
    return output


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight with sums in float32, rounded once. torch's own product of 16-bit floats is a plain loop on a CPU without
    AVX-512: 5 s, where float32 takes 0.03 s (150 rows, 2048 x 2048, one thread)."""
    return (x.float() @ weight.float()).to(x.dtype)


def _int8_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight in int32. It adds up float32 products over so few columns that each product is exact."""
    columns = 2**24 // 128**2
    parts = zip(x.split(columns, dim=1), weight.split(columns, dim=0), strict=True)
    return sum_in_rank_order([(left.float() @ right.float()).int() for left, right in parts])


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, H] -> int8 [n, H] and float32 scales [n], as dispatch's quant_mode 2: rint(x * f) and 1 / f with f = 127 / max|x|.

    A row of zeros gives zeros with scale 0; the kernel computes 0 * inf for it. LOCAL. Host sync: no.
    """
    values = x.float()
    largest = values.abs().amax(dim=-1, keepdim=True)
    nonzero = largest > 0
    # Both operands must be tensors: torch computes 127 / tensor as 127 * (1 / tensor), which rounds twice.
    factor = torch.where(nonzero, torch.full_like(largest, INT8_MAX) / largest, 0)
    return (values * factor).round().to(torch.int8), torch.where(nonzero, 1 / factor, 0).squeeze(-1)


def npu_moe_update_expert(
    expert_ids: torch.Tensor,  # [B, K] int32 or int64, logical ids
    eplb_table: torch.Tensor,  # [logical experts, F] int32: replica count of 1..F-1, physical ids, padding
    *,
    local_rank_id: int,
    world_size: int,
    balance_mode: BalanceMode = BalanceMode.BY_RANK,
) -> torch.Tensor:  # [B, K] physical ids, dtype of expert_ids
    """Turn logical expert ids into physical ones, for every strategy. balance_mode chooses the replica by rank or by token.

    The op's pruning is left out. LOCAL. Host sync: no. Graph capture: yes. Raises InvalidInputError for arguments that do not
    fit, and on CPU tensors for ids and replica counts that the table does not have. Source: op-plugin's test of
    npu_moe_update_expert (its document leaves out the first column's offset in mode 1).
    """
    if expert_ids.dim() != 2 or eplb_table.dim() != 2 or eplb_table.dtype != torch.int32:
        raise InvalidInputError(
            f"npu_moe_update_expert: expert_ids is {tuple(expert_ids.shape)} and eplb_table {eplb_table.dtype} "
            f"{tuple(eplb_table.shape)}; they must be [tokens, top_k] and int32 [logical experts, 1 + replicas]"
        )
    if not 0 <= local_rank_id < world_size:
        raise InvalidInputError(f"npu_moe_update_expert: rank {local_rank_id} is not one of {world_size}")
    ids = expert_ids.long()
    if ids.device.type == "cpu" and ids.numel():
        if int(ids.min()) < 0 or int(ids.max()) >= eplb_table.shape[0]:
            raise InvalidInputError(
                f"npu_moe_update_expert: expert_ids lie in [{int(ids.min())}, {int(ids.max())}]; the table has experts "
                f"0..{eplb_table.shape[0] - 1}"
            )
        counts = eplb_table[:, 0]
        if int(counts.min()) < 1 or int(counts.max()) >= eplb_table.shape[1]:
            raise InvalidInputError(
                f"npu_moe_update_expert: replica counts lie in [{int(counts.min())}, {int(counts.max())}]; with "
                f"{eplb_table.shape[1]} columns they must lie in [1, {eplb_table.shape[1] - 1}]"
            )
    rows = eplb_table.long()[ids]  # [B, K, F]
    replicas = rows[..., 0]
    if balance_mode is BalanceMode.BY_RANK:
        replica = local_rank_id // ((world_size + replicas - 1) // replicas)
    else:
        replica = torch.arange(ids.shape[0], device=ids.device)[:, None] % replicas
    return rows.gather(2, (replica + 1)[..., None]).squeeze(2).to(expert_ids.dtype)


def distribute_dispatch(
    x: torch.Tensor,  # [B, H]
    expert_ids: torch.Tensor,  # [B, K] int32, global ids, distinct in a row
    *,
    group_ep: Transport,
    moe_expert_num: int,
    expert_scales: torch.Tensor
    | None = None,  # [B, K] float32: the top-k weights; only the hierarchy's kernels read them
    x_active_mask: torch.Tensor | None = None,  # [B] bool, True for active tokens, which come first
    quant_mode: int = 0,  # QuantMode
    global_bs: int = 0,  # the most rows of any rank, times W; 0: every rank brings B rows
    asked: MC2Asked = ASKED_NOTHING,  # The way that rows take; only Ascend's kernels read it
) -> DistributeDispatchOutput:
    """Send each active token to the ranks of its experts, in slots of fixed size.

    W is the number of ranks. A = G * min(num_local_experts, K) with G = global_bs or B * W.

    global_bs, K, H, the dtype and quant_mode must be equal on all ranks; without global_bs, B must be equal too. This is not
    checked here, but by the vote on the step plan. COLLECTIVE over group_ep: one all-to-all of G / W slots for each pair of
    ranks. A token takes one slot of a rank, even where it chose several experts there. Host sync: no. Graph capture: yes.
    Raises InvalidInputError for an unknown quant_mode, and for a mask with a hole (read on CPU tensors only). Raises it also
    for a global_bs that W does not divide, that is too small for B, or that comes with a mask.
    """
    if quant_mode not in list(QuantMode):
        raise InvalidInputError(
            f"quant_mode={quant_mode} is not supported; there are 0 (none) and 2 (int8, one scale for each token)"
        )
    top_k = expert_ids.shape[1]
    num_tokens = _slots_of_a_rank(expert_ids.shape[0], group_ep.size, global_bs, x_active_mask)
    placement = ExpertPlacement(moe_expert_num, group_ep.size)
    active = pad_rows(_active_tokens(x_active_mask, expert_ids.shape[0], x.device)[:, None], num_tokens, 0)
    ids = pad_rows(expert_ids, num_tokens)
    x = pad_rows(x, num_tokens)
    ranks = torch.arange(group_ep.size, device=x.device)[:, None, None]
    first_experts = (ranks * placement.experts_per_rank).to(ids.dtype)
    slots = local_expert_ids(ids - first_experts, 0, placement.experts_per_rank).int()  # [W, B, K]
    slots = torch.where(active, slots, -1)
    goes = (slots >= 0).any(-1, keepdim=True)  # [W, B, 1]

    payload = (x,) if quant_mode == 0 else quantize_per_token(x)
    outgoing = [torch.where(goes, part.view(num_tokens, -1), 0).flatten(0, 1) for part in payload] + [
        slots.flatten(0, 1)
    ]
    message, unpack = pack(outgoing)
    sizes = [num_tokens] * group_ep.size
    *received, received_ids = unpack(group_ep.all_to_all(message, sizes, sizes))

    # Pairs are numbered (source rank, token, k). A stable sort by local expert gives the order of the op.
    num_local = placement.experts_per_rank
    pair_experts = torch.where(received_ids >= 0, received_ids, num_local).flatten().long()
    rows = num_tokens * group_ep.size * min(num_local, top_k)
    order = pair_experts.argsort(stable=True)[:rows]
    valid = pair_experts[order] < num_local
    expand_x, *scales = (
        torch.where(valid[:, None], part[order // top_k], -128 if part.dtype == torch.int8 else float("nan"))
        for part in received
    )

    triples = torch.stack([order // (num_tokens * top_k), order // top_k % num_tokens, order % top_k], dim=1).int()
    assist_info = torch.full((rows * ASSIST_CELLS,), UNDEFINED, dtype=torch.int32, device=x.device)
    assist_info[: 3 * rows] = torch.where(valid[:, None], triples, UNDEFINED).flatten()

    per_source = torch.zeros(group_ep.size, num_local + 1, dtype=torch.int64, device=x.device)
    per_source.scatter_add_(
        1, pair_experts.view(group_ep.size, -1), torch.ones_like(pair_experts).view(group_ep.size, -1)
    )
    counts = per_source[:, :num_local].t()  # [L, W]
    return DistributeDispatchOutput(
        expand_x=expand_x,
        combine_index=assist_info,
        expert_token_nums=counts.sum(1),
        ep_recv_counts=counts.flatten().cumsum(0).int(),
        dynamic_scales=scales[0].squeeze(-1) if scales else None,
    )


def distribute_combine(
    expand_x: torch.Tensor,  # [A, H]: the experts' output, rows as dispatch gave them
    expert_ids: torch.Tensor,  # [B, K] int32, as given to dispatch
    combine_index: torch.Tensor,  # as dispatch returned it
    ep_send_counts: torch.Tensor,  # dispatch's ep_recv_counts
    expert_scales: torch.Tensor,  # [B, K] float32: the top-k weights
    *,
    group_ep: Transport,
    moe_expert_num: int,
    x_active_mask: torch.Tensor | None = None,  # as given to dispatch
    expand_scales: torch.Tensor | None = None,  # as dispatch returned it; only A2's kernel reads it
    comm_alg: str = "",  # as dispatch returned it; only Ascend's kernels read it
    comm_quant_mode: int = 0,  # 2: rows come back as int8 in groups of INT8_GROUP numbers, each with a scale of x's dtype
    global_bs: int = 0,  # as given to dispatch
) -> torch.Tensor:  # [B, H], dtype of expand_x; rows of inactive tokens are NaN
    """Send each row back to the rank of its token, and return each token's weighted sum in float32, k ascending.

    The product and the sum of each step are rounded separately.
    COLLECTIVE over group_ep: one all-to-all of G / W * K rows for each pair of ranks. Host sync: no. Graph capture: yes. With
    comm_quant_mode 2, the sum has the rows that int8 gives, which travel in x's dtype here. Raises InvalidInputError for
    another comm_quant_mode than 0 and 2.
    """
    if comm_quant_mode not in (0, INT8_GROUPS):
        raise InvalidInputError(
            f"comm_quant_mode={comm_quant_mode} is not supported; there are 0 and {INT8_GROUPS} (int8)"
        )
    if comm_quant_mode == INT8_GROUPS:
        expand_x = _through_int8_groups(expand_x)
    num_tokens, top_k = expert_ids.shape
    width = expand_x.shape[1]
    placement = ExpertPlacement(moe_expert_num, group_ep.size)
    rows_of_a_rank = _slots_of_a_rank(num_tokens, group_ep.size, global_bs, x_active_mask)
    slots_per_rank = rows_of_a_rank * top_k

    rows = torch.arange(expand_x.shape[0], device=expand_x.device)
    valid = rows < ep_send_counts[-1]
    source, token, k = combine_index[: 3 * expand_x.shape[0]].view(-1, 3).long().unbind(1)
    slot = torch.where(valid, source * slots_per_rank + token * top_k + k, group_ep.size * slots_per_rank)
    window = expand_x.new_zeros(
        group_ep.size * slots_per_rank + 1, width
    )  # the last slot takes the rows that go nowhere
    window[slot] = torch.where(valid[:, None], expand_x, 0)
    sizes = [slots_per_rank] * group_ep.size
    returned = group_ep.all_to_all(window[:-1], sizes, sizes).view(group_ep.size, rows_of_a_rank, top_k, width)

    active = _active_tokens(x_active_mask, num_tokens, expand_x.device)
    owner = (expert_ids.long() // placement.experts_per_rank).clamp(0, group_ep.size - 1)
    tokens = torch.arange(num_tokens, device=expand_x.device)
    total = torch.zeros(num_tokens, width, device=expand_x.device)
    for k_index in range(top_k):
        row = returned[owner[:, k_index], tokens, k_index].float()
        total = total + row * expert_scales[:, k_index, None]
    return torch.where(active[:, None], total, float("nan")).to(expand_x.dtype)


def _through_int8_groups(rows: torch.Tensor) -> torch.Tensor:
    """The rows after int8 and back: each group of INT8_GROUP numbers has a scale, a 127th of the largest. A number is divided
    by the float32 scale, and multiplied by the scale in the rows' dtype."""
    groups = rows.float().unflatten(-1, (-1, INT8_GROUP))
    scales = groups.abs().amax(-1, keepdim=True) * (1 / 127)
    values = torch.where(scales > 0, groups / scales, 0.0).half().round()
    return (values.float() * scales.to(rows.dtype).float()).flatten(-2).to(rows.dtype)


def forget_dispatch(combine_index: torch.Tensor, *, group_ep: Transport) -> None:
    """Do nothing: several dispatches of a group may wait for their combines here. Ascend's ops allow one."""


def _slots_of_a_rank(num_tokens: int, num_ranks: int, global_bs: int, mask: torch.Tensor | None) -> int:
    """Slots that each rank has for the rows of one other rank."""
    if global_bs == 0:
        return num_tokens
    if global_bs % num_ranks or global_bs < num_tokens * num_ranks:
        raise InvalidInputError(
            f"global_bs={global_bs} must be the most rows of any rank, times {num_ranks} ranks; this rank has {num_tokens}"
        )
    if mask is not None:
        raise InvalidInputError(f"x_active_mask needs as many rows on all ranks; leave out global_bs={global_bs}")
    return global_bs // num_ranks


def _active_tokens(mask: torch.Tensor | None, num_tokens: int, device: torch.device) -> torch.Tensor:
    """Check the mask and return it. Without a mask, return [num_tokens] bool, all True."""
    if mask is None:
        return torch.ones(num_tokens, dtype=torch.bool, device=device)
    if mask.shape != (num_tokens,) or mask.dtype != torch.bool:
        raise InvalidInputError(f"x_active_mask is {mask.dtype} {tuple(mask.shape)}; it must be bool [{num_tokens}]")
    if mask.device.type == "cpu" and bool((mask[1:] & ~mask[:-1]).any()):
        raise InvalidInputError("x_active_mask has a hole: active tokens must be a prefix (the op only counts them)")
    return mask
