"""Ascend's MoE ops in plain torch over any transport: what they compute, where they run without an NPU.

Names, arguments and layouts are torch_npu's (op-plugin's documents of npu_moe_distribute_dispatch_v2 and
npu_moe_distribute_combine_v2, and the A3 kernels in CANN's ops-transformer). Rows that the device leaves unwritten are NaN
here, or UNDEFINED in integer tensors, so that reading one shows.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_npu.core.limits import PORTABLE, BalanceMode, DeviceLimits, QuantMode
from vllm_npu.core.routing import ExpertPermutation, expert_ranges, local_expert_ids, sum_rows
from vllm_npu.core.token_layout import RowFormat, ceil_div, pad_rows
from vllm_npu.core.topology import ExpertPlacement
from vllm_npu.errors import InvalidInputError
from vllm_npu.transport.base import Transport, sum_in_rank_order

ASSIST_CELLS = 128  # int32 cells that combine_index has for each row of expand_x
UNDEFINED = torch.iinfo(torch.int32).min
INT8_MAX = 127


def device_limits() -> DeviceLimits:
    """What these ops can run."""
    return PORTABLE


class DistributeDispatchOutput(NamedTuple):
    """What distribute_dispatch returns: npu_moe_distribute_dispatch_v2's outputs without those for tensor parallelism."""

    # [A, H]: by local expert, then source rank, then token; rows past the last count are NaN (-128 in int8)
    expand_x: torch.Tensor
    # For combine alone. Here and in version 2 of the op assist_info_for_combine: [A * 128] int32, row i has (source rank,
    # token, k) at 3 * i. In its version 1 expand_idx: [B * K] int32, the earlier pairs of this rank for the same expert
    combine_index: torch.Tensor
    # [num_local_experts] int64, counts or prefix sums
    expert_token_nums: torch.Tensor
    # [num_local_experts * W] int32: inclusive prefix sums, local expert major, source rank minor
    ep_recv_counts: torch.Tensor
    # [A] float32, of quantised rows: value = int8 * scale; None without quantisation
    dynamic_scales: torch.Tensor | None
    # what A2's combine takes beside; None where there is none
    expand_scales: torch.Tensor | None = None
    comm_alg: str = ""  # the algorithm that combine must take too


class InitRoutingOutput(NamedTuple):
    """What init_routing returns."""

    expanded_x: (
        torch.Tensor
    )  # [rows, H], expert-major, inside an expert by token; rows past the counts' sum are undefined
    expanded_row_idx: torch.Tensor  # [N, K] integer: row of each (token, k) pair, -1 for a pair of no local expert
    tokens_per_expert: torch.Tensor  # [num_local_experts] int64: counts
    expanded_scale: torch.Tensor | None  # [rows] float32: of each row, where x has scales


def init_routing(
    x: torch.Tensor,  # [N, H]
    local_ids: torch.Tensor,  # [N, K] integer, -1 for a pair of no local expert
    num_local_experts: int,
    scale: torch.Tensor | None = None,  # [N, 1] float32: travels with its row
) -> InitRoutingOutput:
    """The rows of the local experts, one for each pair. LOCAL. Host sync on accelerators: yes (the number of pairs)."""
    permutation = ExpertPermutation.build(local_ids, num_local_experts)
    return InitRoutingOutput(
        x[permutation.source_rows],
        permutation.row_of_pair,
        permutation.tokens_per_expert,
        None if scale is None else scale.flatten()[permutation.source_rows],
    )


finalize_routing = sum_rows  # the inverse of init_routing, and the sum of any rows of a token


def npu_dynamic_quant(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, H] -> int8 [n, H] and float32 scales [n, 1]: scale = max|x| / 127, rint(x / scale); zeros for a row of zeros.

    Not the roundings of dispatch's quant_mode 2, which multiplies: quantize_per_token. LOCAL. Host sync: no.
    """
    values = x.float()
    scales = values.abs().amax(dim=-1, keepdim=True) / INT8_MAX
    return torch.where(scales > 0, values / scales, 0).round().to(torch.int8), scales


@dataclass(frozen=True, slots=True)
class Counts:
    """A group list of rows a group."""

    values: torch.Tensor  # [groups] int64


@dataclass(frozen=True, slots=True)
class PrefixSums:
    """A group list of where each group ends."""

    values: torch.Tensor  # [groups] int64, not falling


GroupList = Counts | PrefixSums


def npu_grouped_matmul(
    x: torch.Tensor,  # [rows, K]: groups one after the other; int8 with scales
    weight: torch.Tensor,  # [groups, K, N], dtype of x
    group_list: GroupList,
    *,
    scale: torch.Tensor | None = None,  # [groups, N] bfloat16, or float32 with float16 outputs: of int8 weights
    per_token_scale: torch.Tensor | None = None,  # [rows] float32: of int8 rows
    output_dtype: torch.dtype | None = None,  # of int8 rows; else x's
) -> torch.Tensor:  # [rows, N]; rows past the last group are undefined (NaN)
    """Each group's rows times its matrix. LOCAL. Host sync: yes (the groups' sizes). Raises InvalidInputError unless there is
    one matrix a group."""
    if group_list.values.shape != weight.shape[:1]:
        raise InvalidInputError(
            f"npu_grouped_matmul: group_list has {group_list.values.numel()} groups, weight {weight.shape[0]}; "
            "give one matrix a group"
        )
    counts = (
        group_list.values
        if isinstance(group_list, Counts)
        else group_list.values.diff(prepend=group_list.values[:1] * 0)
    )
    dtype = x.dtype if output_dtype is None else output_dtype
    output = x.new_full((x.shape[0], weight.shape[2]), float("nan"), dtype=dtype)
    for group, start, stop in expert_ranges(counts.tolist()):
        if scale is None or per_token_scale is None:
            output[start:stop] = x[start:stop] @ weight[group]
        else:
            product = _int8_product(x[start:stop], weight[group])
            output[start:stop] = product.float() * scale[group].float() * per_token_scale[start:stop, None]
    return output


def _int8_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight in int32, by float32 products of so few columns that each is exact: fast everywhere, float64 not needed."""
    columns = 2**24 // 128**2
    parts = zip(x.split(columns, dim=1), weight.split(columns, dim=0), strict=True)
    return sum_in_rank_order([(left.float() @ right.float()).int() for left, right in parts])


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, H] -> int8 [n, H] and float32 scales [n], as quant_mode 2 of dispatch: rint(x * f) and 1 / f, f = 127 / max|x|.

    A row of zeros, which the kernel turns into 0 * inf, is defined here: zeros, with scale 0. LOCAL. Host sync: no.
    """
    values = x.float()
    largest = values.abs().amax(dim=-1, keepdim=True)
    nonzero = largest > 0
    # A quotient of two tensors: torch takes 127 / tensor as 127 * (1 / tensor), which rounds twice.
    factor = torch.where(nonzero, torch.full_like(largest, INT8_MAX) / largest, 0)
    return (values * factor).round().to(torch.int8), torch.where(nonzero, 1 / factor, 0).squeeze(-1)


def npu_moe_update_expert(
    expert_ids: torch.Tensor,  # [B, K] int32 or int64, logical ids
    eplb_table: torch.Tensor,  # [logical experts, F] int32: replica count of 1..F-1, physical ids, padding
    *,
    expert_scales: torch.Tensor | None = None,  # [B, K]: the top-k weights; for pruning only
    pruning_threshold: torch.Tensor | None = None,  # [K] float32
    active_mask: torch.Tensor | None = None,  # [B] bool, a prefix; with pruning only
    local_rank_id: int,
    world_size: int,
    balance_mode: BalanceMode = BalanceMode.BY_RANK,
) -> tuple[
    torch.Tensor, torch.Tensor | None
]:  # [B, K] physical ids of the same dtype; [B, K] bool, None without pruning
    """Logical to physical expert ids, for every strategy: a replica by rank or by token (BalanceMode).

    With pruning, a choice stays where its weight is at least pruning_threshold[k] times the sum of its token's weights, in
    float32, and its token is active. LOCAL. Host sync: no. Graph capture: yes. Raises InvalidInputError for arguments that do
    not fit, and on CPU tensors for ids and replica counts that the table does not have. Source: op-plugin's test of
    npu_moe_update_expert (its document leaves out the first column's offset in mode 1).
    """
    if expert_ids.dim() != 2 or eplb_table.dim() != 2 or eplb_table.dtype != torch.int32:
        raise InvalidInputError(
            f"npu_moe_update_expert: expert_ids is {tuple(expert_ids.shape)} and eplb_table {eplb_table.dtype} "
            f"{tuple(eplb_table.shape)}; they must be [tokens, top_k] and int32 [logical experts, 1 + replicas]"
        )
    if (expert_scales is None) != (pruning_threshold is None) or (active_mask is not None and expert_scales is None):
        raise InvalidInputError(
            "npu_moe_update_expert: expert_scales and pruning_threshold go together, and active_mask with both"
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
    physical = rows.gather(2, (replica + 1)[..., None]).squeeze(2).to(expert_ids.dtype)
    if expert_scales is None or pruning_threshold is None:
        return physical, None
    scales = expert_scales.float()
    kept = scales >= pruning_threshold * scales.sum(1, keepdim=True)
    return physical, kept & _active_tokens(ids, active_mask)[:, None]


def distribute_dispatch(
    x: torch.Tensor,  # [B, H]
    expert_ids: torch.Tensor,  # [B, K] int32, global ids, distinct in a row
    *,
    group_ep: Transport,
    moe_expert_num: int,
    expert_scales: torch.Tensor | None = None,  # [B, K] float32: the top-k weights, for the hierarchy's kernels only
    x_active_mask: torch.Tensor | None = None,  # [B] bool, a prefix
    expert_token_nums_type: int = 1,  # 1 counts, 0 prefix sums
    shared_expert_rank_num: int = 0,  # the first ranks have the shared expert, a copy each, and no other
    quant_mode: int = 0,  # QuantMode
    global_bs: int = 0,  # rows of the fullest rank, times W; 0: every rank brings B
) -> DistributeDispatchOutput:
    """Send each active token to the ranks of its experts, and to one of the shared expert's, in slots of fixed size.

    A = G * min(num_local_experts, K), G = global_bs or B * W; with the shared expert, rows of as many ranks as share its
    copy. The shared expert is column K of combine_index. global_bs, K, H, the dtype and quant_mode must be equal
    on all ranks, and without global_bs B too (not checked here: the plan's vote does). COLLECTIVE over group_ep: one all-
    to-all of G / W slots a pair of ranks; a token takes one slot however many of the rank's experts it chose. Host sync:
    no. Graph capture: yes. Raises InvalidInputError for another quant_mode, a mask that is not a prefix (read on CPU
    tensors only), and a global_bs that W does not divide, that is too small for B, or that comes with a mask.
    """
    if quant_mode not in list(QuantMode):
        raise InvalidInputError(f"quant_mode={quant_mode} is not supported; there are 0 (none) and 2 (int8 a token)")
    top_k = expert_ids.shape[1]
    num_tokens = _slots_of_a_rank(expert_ids.shape[0], group_ep.size, global_bs, x_active_mask)
    placement = ExpertPlacement(moe_expert_num, group_ep.size, shared_expert_rank_num)
    active = pad_rows(_active_tokens(x, x_active_mask)[:, None], num_tokens, 0)
    ids = pad_rows(expert_ids, num_tokens)
    x = pad_rows(x, num_tokens)
    ranks = torch.arange(group_ep.size, device=x.device)[:, None, None]
    first_experts = ((ranks - shared_expert_rank_num) * placement.experts_per_rank).to(ids.dtype)
    slots = local_expert_ids(ids - first_experts, 0, placement.experts_per_rank).int()  # [W, B, K]
    if shared_expert_rank_num:
        serves = ranks == group_ep.rank % shared_expert_rank_num
        slots = torch.cat([slots, torch.where(serves, 0, -1).int().expand(-1, num_tokens, 1)], dim=-1)
    slots = torch.where(active, slots, -1)
    columns = slots.shape[2]
    goes = (slots >= 0).any(-1, keepdim=True)  # [W, B, 1]

    payload = (x,) if quant_mode == 0 else quantize_per_token(x)
    outgoing = [torch.where(goes, part.view(num_tokens, -1), 0).flatten(0, 1) for part in payload] + [
        slots.flatten(0, 1)
    ]
    message = RowFormat.of(outgoing)
    sizes = [num_tokens] * group_ep.size
    *received, received_ids = message.unpack(group_ep.all_to_all(message.pack(outgoing), sizes, sizes))

    # Pairs are numbered (source rank, token, k); a stable sort by local expert gives the op's order.
    num_local = placement.num_local_experts(group_ep.rank)
    pair_experts = torch.where(received_ids >= 0, received_ids, num_local).flatten().long()
    if placement.holds_shared_expert(group_ep.rank):
        rows = num_tokens * ceil_div(group_ep.size, shared_expert_rank_num)
    else:
        rows = num_tokens * group_ep.size * min(num_local, top_k)
    order = pair_experts.argsort(stable=True)[:rows]
    valid = pair_experts[order] < num_local
    expand_x, *scales = (
        torch.where(valid[:, None], part[order // columns], -128 if part.dtype == torch.int8 else float("nan"))
        for part in received
    )

    triples = torch.stack(
        [order // (num_tokens * columns), order // columns % num_tokens, order % columns], dim=1
    ).int()
    assist_info = torch.full((rows * ASSIST_CELLS,), UNDEFINED, dtype=torch.int32, device=x.device)
    assist_info[: 3 * rows] = torch.where(valid[:, None], triples, UNDEFINED).flatten()

    per_source = torch.zeros(group_ep.size, num_local + 1, dtype=torch.int64, device=x.device)
    per_source.scatter_add_(
        1, pair_experts.view(group_ep.size, -1), torch.ones_like(pair_experts).view(group_ep.size, -1)
    )
    counts = per_source[:, :num_local].t()  # [L, W]
    token_nums = counts.sum(1)
    return DistributeDispatchOutput(
        expand_x=expand_x,
        combine_index=assist_info,
        expert_token_nums=token_nums if expert_token_nums_type == 1 else token_nums.cumsum(0),
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
    expand_scales: torch.Tensor | None = None,  # as dispatch returned it: for A2's kernel only
    comm_alg: str = "",  # as dispatch returned it: for Ascend's kernels only
    shared_expert_rank_num: int = 0,  # as given to dispatch
    global_bs: int = 0,  # as given to dispatch
) -> torch.Tensor:  # [B, H], dtype of expand_x; rows of inactive tokens are NaN
    """Send each row back to its token and add a token's rows: float32, k ascending, a multiply and an add rounded apart; the
    shared expert's row last, unweighted.

    COLLECTIVE over group_ep: one all-to-all of G / W * K rows a pair of ranks. Host sync: no. Graph capture: yes.
    """
    num_tokens, top_k = expert_ids.shape
    width = expand_x.shape[1]
    placement = ExpertPlacement(moe_expert_num, group_ep.size, shared_expert_rank_num)
    columns = top_k + (1 if shared_expert_rank_num else 0)
    rows_of_a_rank = _slots_of_a_rank(num_tokens, group_ep.size, global_bs, x_active_mask)
    slots_per_rank = rows_of_a_rank * columns

    rows = torch.arange(expand_x.shape[0], device=expand_x.device)
    valid = rows < ep_send_counts[-1]
    source, token, k = combine_index[: 3 * expand_x.shape[0]].view(-1, 3).long().unbind(1)
    slot = torch.where(valid, source * slots_per_rank + token * columns + k, group_ep.size * slots_per_rank)
    window = expand_x.new_zeros(group_ep.size * slots_per_rank + 1, width)  # one slot more, for rows that go nowhere
    window[slot] = torch.where(valid[:, None], expand_x, 0)
    sizes = [slots_per_rank] * group_ep.size
    returned = group_ep.all_to_all(window[:-1], sizes, sizes).view(group_ep.size, rows_of_a_rank, columns, width)

    active = _active_tokens(expand_x, x_active_mask, num_tokens)
    owner = (expert_ids.long() // placement.experts_per_rank + shared_expert_rank_num).clamp(0, group_ep.size - 1)
    tokens = torch.arange(num_tokens, device=expand_x.device)
    total = torch.zeros(num_tokens, width, device=expand_x.device)
    for k_index in range(top_k):
        row = returned[owner[:, k_index], tokens, k_index].float()
        total = total + row * expert_scales[:, k_index, None]
    if shared_expert_rank_num:
        total = total + returned[group_ep.rank % shared_expert_rank_num, :num_tokens, top_k].float()
    return torch.where(active[:, None], total, float("nan")).to(expand_x.dtype)


def _slots_of_a_rank(num_tokens: int, num_ranks: int, global_bs: int, mask: torch.Tensor | None) -> int:
    if global_bs == 0:
        return num_tokens
    if global_bs % num_ranks or global_bs < num_tokens * num_ranks:
        raise InvalidInputError(
            f"global_bs={global_bs} must be the rows of the fullest rank times {num_ranks} ranks; this rank has {num_tokens}"
        )
    if mask is not None:
        raise InvalidInputError(f"x_active_mask needs as many rows on all ranks; leave out global_bs={global_bs}")
    return global_bs // num_ranks


def _active_tokens(x: torch.Tensor, mask: torch.Tensor | None, num_tokens: int | None = None) -> torch.Tensor:
    length = x.shape[0] if num_tokens is None else num_tokens
    if mask is None:
        return torch.ones(length, dtype=torch.bool, device=x.device)
    if mask.shape != (length,) or mask.dtype != torch.bool:
        raise InvalidInputError(f"x_active_mask is {mask.dtype} {tuple(mask.shape)}; it must be bool [{length}]")
    if mask.device.type == "cpu" and bool((mask[1:] & ~mask[:-1]).any()):
        raise InvalidInputError("x_active_mask has a hole: active tokens must be a prefix (the op only counts them)")
    return mask
