"""Ascend's MoE ops in plain torch over any transport: what they compute, where they run without an NPU.

Names, arguments and layouts are torch_npu's (op-plugin's documents of npu_moe_distribute_dispatch_v2 and
npu_moe_distribute_combine_v2, and the A3 kernels in CANN's ops-transformer). Rows that the device leaves unwritten are NaN
here, or UNDEFINED in integer tensors, so that reading one shows.
"""

from typing import NamedTuple

import torch

from vllm_npu.errors import InvalidInputError
from vllm_npu.limits import PORTABLE, DeviceLimits
from vllm_npu.routing import ExpertPermutation, local_expert_ids, sum_rows
from vllm_npu.token_layout import RowFormat
from vllm_npu.topology import ExpertPlacement
from vllm_npu.transport.base import Transport

ASSIST_CELLS = 128  # int32 cells that assist_info_for_combine has for each row of expand_x
UNDEFINED = torch.iinfo(torch.int32).min


def device_limits() -> DeviceLimits:
    """What these ops can run."""
    return PORTABLE


class DistributeDispatchOutput(NamedTuple):
    """What npu_moe_distribute_dispatch_v2 returns, without its outputs for tensor parallelism and hierarchies."""

    # [A, H]: by local expert, then source rank, then token; rows past the last count are NaN (-128 in int8)
    expand_x: torch.Tensor
    # [A * 128] int32: row i has (source rank, token, k) at 3 * i
    assist_info_for_combine: torch.Tensor
    # [num_local_experts] int64, counts or prefix sums
    expert_token_nums: torch.Tensor
    # [num_local_experts * W] int32: inclusive prefix sums, local expert major, source rank minor
    ep_recv_counts: torch.Tensor
    # [A] float32, of quantised rows: value = int8 * scale; None without quantisation
    dynamic_scales: torch.Tensor | None
    # what A2's combine takes beside; None where there is none
    expand_scales: torch.Tensor | None = None


class InitRoutingOutput(NamedTuple):
    """What init_routing returns."""

    expanded_x: (
        torch.Tensor
    )  # [rows, H], expert-major, inside an expert by token; rows past the counts' sum are undefined
    expanded_row_idx: torch.Tensor  # [N, K] integer: row of each (token, k) pair, -1 for a pair of no local expert
    tokens_per_expert: torch.Tensor  # [num_local_experts] int64: counts


def init_routing(
    x: torch.Tensor,  # [N, H]
    local_ids: torch.Tensor,  # [N, K] integer, -1 for a pair of no local expert
    num_local_experts: int,
) -> InitRoutingOutput:
    """The rows of the local experts, one for each pair. LOCAL. Host sync on accelerators: yes (the number of pairs)."""
    permutation = ExpertPermutation.build(local_ids, num_local_experts)
    return InitRoutingOutput(x[permutation.source_rows], permutation.row_of_pair, permutation.tokens_per_expert)


finalize_routing = sum_rows  # the inverse of init_routing, and the sum of any rows of a token


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, H] -> int8 [n, H] and float32 scales [n], as quant_mode 2 of dispatch: rint(x * f) and 1 / f, f = 127 / max|x|.

    A row of zeros, which the kernel turns into 0 * inf, is defined here: zeros, with scale 0. LOCAL. Host sync: no.
    """
    values = x.float()
    largest = values.abs().amax(dim=-1, keepdim=True)
    nonzero = largest > 0
    # A quotient of two tensors: torch takes 127 / tensor as 127 * (1 / tensor), which rounds twice.
    factor = torch.where(nonzero, torch.full_like(largest, 127) / largest, 0)
    return (values * factor).round().to(torch.int8), torch.where(nonzero, 1 / factor, 0).squeeze(-1)


def npu_moe_distribute_dispatch_v2(
    x: torch.Tensor,  # [B, H]
    expert_ids: torch.Tensor,  # [B, K] int32, global ids, distinct in a row
    *,
    group_ep: Transport,
    moe_expert_num: int,
    x_active_mask: torch.Tensor | None = None,  # [B] bool, a prefix
    expert_token_nums_type: int = 1,  # 1 counts, 0 prefix sums
    quant_mode: int = 0,  # 0 none, 2 int8 with a scale for each token
) -> DistributeDispatchOutput:
    """Send each active token to the ranks of its experts, in slots of fixed size.

    A = B * W * min(num_local_experts, K): B, K and H must be equal on all ranks (not checked here: the plan's vote does).
    COLLECTIVE over group_ep: one all-to-all of B slots a pair of ranks; a token takes one slot however many of the rank's
    experts it chose. Host sync: no. Graph capture: yes. Raises InvalidInputError for another quant_mode, and for a mask
    that is not a prefix (read on CPU tensors only).
    """
    if quant_mode not in (0, 2):
        raise InvalidInputError(f"quant_mode={quant_mode} is not supported; there are 0 (none) and 2 (int8 a token)")
    num_tokens, top_k = expert_ids.shape
    placement = ExpertPlacement(moe_expert_num, group_ep.size)
    active = _active_tokens(x, x_active_mask)
    ids = torch.where(active[:, None], expert_ids, -1)
    ranks = torch.arange(group_ep.size, device=x.device)
    first_experts = (ranks * placement.experts_per_rank).to(ids.dtype)
    slots = local_expert_ids(ids[None] - first_experts[:, None, None], 0, placement.experts_per_rank).int()  # [W, B, K]
    slots = torch.where(ids[None] >= 0, slots, -1)
    goes = (slots >= 0).any(-1, keepdim=True)  # [W, B, 1]

    payload = (x,) if quant_mode == 0 else quantize_per_token(x)
    outgoing = [torch.where(goes, part.view(num_tokens, -1), 0).flatten(0, 1) for part in payload] + [
        slots.flatten(0, 1)
    ]
    message = RowFormat.of(outgoing)
    sizes = [num_tokens] * group_ep.size
    *received, received_ids = message.unpack(group_ep.all_to_all(message.pack(outgoing), sizes, sizes))

    # Pairs are numbered (source rank, token, k); a stable sort by local expert gives the op's order.
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
    token_nums = counts.sum(1)
    return DistributeDispatchOutput(
        expand_x=expand_x,
        assist_info_for_combine=assist_info,
        expert_token_nums=token_nums if expert_token_nums_type == 1 else token_nums.cumsum(0),
        ep_recv_counts=counts.flatten().cumsum(0).int(),
        dynamic_scales=scales[0].squeeze(-1) if scales else None,
    )


def npu_moe_distribute_combine_v2(
    expand_x: torch.Tensor,  # [A, H]: the experts' output, rows as dispatch gave them
    expert_ids: torch.Tensor,  # [B, K] int32, as given to dispatch
    assist_info_for_combine: torch.Tensor,  # as dispatch returned it
    ep_send_counts: torch.Tensor,  # dispatch's ep_recv_counts
    expert_scales: torch.Tensor,  # [B, K] float32: the top-k weights
    *,
    group_ep: Transport,
    moe_expert_num: int,
    x_active_mask: torch.Tensor | None = None,  # as given to dispatch
    expand_scales: torch.Tensor | None = None,  # as dispatch returned it: for A2's kernel only
) -> torch.Tensor:  # [B, H], dtype of expand_x; rows of inactive tokens are NaN
    """Send each row back to its token and add a token's rows: float32, k ascending, a multiply and an add rounded apart.

    COLLECTIVE over group_ep: one all-to-all of B * K rows a pair of ranks. Host sync: no. Graph capture: yes.
    """
    num_tokens, top_k = expert_ids.shape
    width = expand_x.shape[1]
    placement = ExpertPlacement(moe_expert_num, group_ep.size)
    slots_per_rank = num_tokens * top_k

    rows = torch.arange(expand_x.shape[0], device=expand_x.device)
    valid = rows < ep_send_counts[-1]
    source, token, k = assist_info_for_combine[: 3 * expand_x.shape[0]].view(-1, 3).long().unbind(1)
    slot = torch.where(valid, source * slots_per_rank + token * top_k + k, group_ep.size * slots_per_rank)
    window = expand_x.new_zeros(group_ep.size * slots_per_rank + 1, width)  # one slot more, for rows that go nowhere
    window[slot] = torch.where(valid[:, None], expand_x, 0)
    sizes = [slots_per_rank] * group_ep.size
    returned = group_ep.all_to_all(window[:-1], sizes, sizes).view(group_ep.size, num_tokens, top_k, width)

    active = _active_tokens(expand_x, x_active_mask, num_tokens)
    owner = (expert_ids.long() // placement.experts_per_rank).clamp(0, group_ep.size - 1)
    tokens = torch.arange(num_tokens, device=expand_x.device)
    total = torch.zeros(num_tokens, width, device=expand_x.device)
    for k_index in range(top_k):
        row = returned[owner[:, k_index], tokens, k_index].float()
        total = total + row * expert_scales[:, k_index, None]
    return torch.where(active[:, None], total, float("nan")).to(expand_x.dtype)


def _active_tokens(x: torch.Tensor, mask: torch.Tensor | None, num_tokens: int | None = None) -> torch.Tensor:
    length = x.shape[0] if num_tokens is None else num_tokens
    if mask is None:
        return torch.ones(length, dtype=torch.bool, device=x.device)
    if mask.shape != (length,) or mask.dtype != torch.bool:
        raise InvalidInputError(f"x_active_mask is {mask.dtype} {tuple(mask.shape)}; it must be bool [{length}]")
    if mask.device.type == "cpu" and bool((mask[1:] & ~mask[:-1]).any()):
        raise InvalidInputError("x_active_mask has a hole: active tokens must be a prefix (the op only counts them)")
    return mask
