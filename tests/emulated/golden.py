"""What the MoE operators must give, in numpy: one function for each operator, over all values of its arguments that A2 and A3
honour together.

Source: the documents in CANN's ops-transformer (moe/*/README.md and docs/). Where the documents leave a rounding open, the
place says where it comes from. No function looks at an operator of this project. A masked element has no meaning: the operator
may leave anything there.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from tests.emulated.references import Layer, flat, quotient_int8

Array = np.ma.MaskedArray


def masked(values: Any, meaningful: Any = True) -> Array:
    values = np.asarray(values)
    return np.ma.array(values, mask=~np.broadcast_to(np.asarray(meaningful, dtype=bool), values.shape))


def float64(x: torch.Tensor) -> np.ndarray:
    return x.double().numpy()


# --- routing ---


def init_routing(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: list[int] | None = None,
    row_idx_type: int = 0,
) -> list[Array]:
    """Rows, index, counts and scales of aclnnMoeInitRoutingV3."""
    first, end = active_expert_range or (0, expert_num)
    experts = expert_idx.numpy().reshape(-1)
    top_k = expert_idx.shape[1]
    order = np.argsort(experts, kind="stable")
    order = order[(experts[order] >= first) & (experts[order] < end)]
    counts = np.bincount(experts[order], minlength=expert_num)[first:end]
    if drop_pad_mode == 0:
        kept = len(experts) if active_num <= 0 else min(active_num, len(experts))
        places = np.arange(len(order))
    else:
        kept = expert_num * expert_capacity
        place_in_expert = np.arange(len(order)) - (np.cumsum(counts) - counts)[experts[order]]
        fits = place_in_expert < expert_capacity
        places = np.where(fits, experts[order] * expert_capacity + place_in_expert, -1)
    written = (places >= 0) & (places < kept)
    pairs, rows_at = order[written], places[written]

    rows = float64(x)[pairs // top_k]
    row_scales = np.zeros(len(pairs), np.float32)
    has_scales = quant_mode == 1 or (quant_mode == -1 and scale is not None)
    if quant_mode == -1 and scale is not None:
        row_scales = scale.numpy()[pairs // top_k]
    elif quant_mode == 0:
        assert scale is not None
        assert offset is not None
        # All steps in float32: CANN's golden script.
        steps = rows.astype(np.float32) * scale.numpy() + offset.numpy()
        rows = np.clip(np.rint(steps), -128, 127)
    elif quant_mode == 1:
        smooth = np.float32(1)
        if scale is not None:
            smooth = scale.numpy()[experts[pairs] - first if len(scale) > 1 else np.zeros(len(pairs), int)]
        rows, row_scales = quotient_int8(rows.astype(np.float32) * smooth)

    # With a capacity, rows without a token are zero. Without one, they have no meaning.
    filled = np.zeros(kept, bool)
    filled[rows_at] = True
    expanded = np.zeros((kept, x.shape[1]))
    expanded[rows_at] = rows
    out_scales = np.zeros(kept, np.float32)
    out_scales[rows_at] = row_scales
    padded = drop_pad_mode == 1
    shape = (expert_num, expert_capacity, x.shape[1]) if padded else expanded.shape
    meaningful = (filled | padded)[:, None] & np.ones(x.shape[1], bool)
    if row_idx_type == 0:
        index = masked(np.full(len(experts), -1))
        index[order] = places
    else:
        index = masked(np.zeros(len(experts), int), np.arange(len(experts)) < len(order))
        index[: len(order)] = order
    if not expert_tokens_num_flag:
        numbers = masked(np.zeros(0, int))
    elif expert_tokens_num_type == 0:
        numbers = masked(np.cumsum(counts))
    elif expert_tokens_num_type == 1:
        numbers = masked(counts)
    else:
        used = [(first + expert, count) for expert, count in enumerate(counts) if count]
        numbers = masked(np.array(used + [(0, 0)] * (expert_num - len(used))))
    return [
        masked(expanded.reshape(shape), meaningful.reshape(shape)),
        index,
        numbers,
        masked(out_scales, has_scales & (filled | padded)),
    ]


def finalize_routing(
    expanded_permuted_rows: torch.Tensor,
    skip1: torch.Tensor | None,
    skip2: torch.Tensor | None,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
    expanded_src_to_dst_row: torch.Tensor,
    export_for_source_row: torch.Tensor | None,
    drop_pad_mode: int = 0,
) -> list[Array]:
    """The sum of aclnnMoeFinalizeRoutingV2: skip1 + skip2 + scales * (rows + bias), exact."""
    rows = float64(expanded_permuted_rows).reshape(-1, expanded_permuted_rows.shape[-1])
    top_k = 1 if scales is None else scales.shape[1]
    index = expanded_src_to_dst_row.numpy()
    # Modes 0 and 1 have the index k-major, and modes 2 and 3 token-major.
    index = index.reshape(top_k, -1).T if drop_pad_mode in (0, 1) else index.reshape(-1, top_k)
    chosen = np.where(index[..., None] >= 0, rows[index], 0.0)
    if bias is not None:
        assert export_for_source_row is not None
        chosen = chosen + float64(bias)[export_for_source_row.numpy()]
    total = (chosen * (1.0 if scales is None else float64(scales)[..., None])).sum(1)
    for skip in (skip1, skip2):
        total = total + (0.0 if skip is None else float64(skip))
    return [masked(total)]


def re_routing(
    tokens: torch.Tensor,
    expert_token_num_per_rank: torch.Tensor,
    *,
    per_token_scales: torch.Tensor | None = None,
    expert_token_num_type: int = 1,
    idx_type: int = 0,
) -> list[Array]:
    """Tokens, scales, index and counts of MoeReRouting, by the two offsets of its document."""
    del expert_token_num_type, idx_type  # documented for 1 and 0 only
    counts = expert_token_num_per_rank.numpy()
    source = np.cumsum(counts.reshape(-1)).reshape(counts.shape) - counts
    index = np.concatenate(
        [source[i, j] + np.arange(counts[i, j]) for j in range(counts.shape[1]) for i in range(counts.shape[0])]
    )
    used = np.arange(len(tokens)) < len(index)
    index = np.concatenate([index, np.zeros(len(tokens) - len(index), int)])
    scales = np.zeros(len(tokens), np.float32) if per_token_scales is None else per_token_scales.numpy()[index]
    return [
        masked(float64(tokens)[index], used[:, None]),
        masked(scales, used & (per_token_scales is not None)),
        masked(index, used),
        masked(counts.sum(0)),
    ]


# --- gating ---


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def largest(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest of each row, of equal ones the lowest first."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


def take(x: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.take_along_axis(x, index, -1)


def gating_top_k(
    x: torch.Tensor,
    k: int,
    *,
    bias: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    tid2eid: torch.Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> list[Array]:
    """Weights, experts and scores of aclnnMoeGatingTopK. The weights are scores without the bias: CANN's golden script."""
    del renorm  # 0 only
    logits = float64(x)
    scores = 1 / (1 + np.exp(-logits)) if norm_type == 1 else softmax(logits)
    if tid2eid is not None:
        assert input_ids is not None
        experts = tid2eid.numpy()[input_ids.numpy()]
    else:
        choice = scores + (0.0 if bias is None else float64(bias))
        groups = choice.reshape(len(choice), group_count, -1)
        best = -np.sort(-groups, axis=-1)[..., : 2 if group_select_mode == 1 else 1].sum(-1)
        kept = np.zeros(best.shape, bool)
        np.put_along_axis(kept, largest(best, k_group), True, -1)
        experts = largest(np.where(kept[..., None], groups, -np.inf).reshape(choice.shape), k)
    weights = take(scores, experts)
    if norm_type == 1:
        weights = weights / (weights.sum(-1, keepdims=True) + eps)
    return [masked(weights * routed_scaling_factor), masked(experts), masked(scores, out_flag)]


def gating_top_k_softmax(x: torch.Tensor, finished: torch.Tensor | None = None, k: int = 1) -> list[Array]:
    """Weights, experts and row numbers of aclnnMoeGatingTopKSoftmax. A finished row has the expert that is none: E."""
    scores = softmax(float64(x))
    experts = largest(scores, k)
    weights = take(scores, experts)
    if finished is not None:
        experts = np.where(finished.numpy()[..., None], x.shape[-1], experts)
    rows = np.arange(experts.size).reshape(k, -1).T.reshape(experts.shape)
    return [masked(weights), masked(experts), masked(rows)]


def gating_top_k_softmax_v2(
    x: torch.Tensor,
    k: int,
    finished: torch.Tensor | None = None,
    *,
    renorm: int = 0,
    output_softmax: bool = False,
) -> list[Array]:
    """Weights, experts and scores of aclnnMoeGatingTopKSoftmaxV2. With renorm, the softmax is over the chosen logits."""
    logits = float64(x)
    experts = largest(logits, k)
    scores = softmax(logits)
    weights = softmax(take(logits, experts)) if renorm else take(scores, experts)
    if finished is not None:
        experts = np.where(finished.numpy()[..., None], x.shape[-1], experts)
    wanted = output_softmax and not renorm
    return [masked(weights), masked(experts), masked(scores if wanted else np.zeros(0))]


# --- dispatch and combine ---


def dispatch(
    layer: Layer, rank: int, *, quant_mode: int = 0, scales: torch.Tensor | None = None, expert_token_nums_type: int = 1
) -> list[Array]:
    """Rows, scales and counts of aclnnMoeDistributeDispatch: by expert, then by source rank, token and k."""
    triples = flat(layer.arrivals(rank))
    capacity, used = layer.capacity(rank), len(triples)
    rows = np.zeros((capacity, layer.width))
    row_scales = np.zeros(capacity, np.float32)
    for at, (source, token, k) in enumerate(triples):
        row = layer.x[source][token].float().numpy()
        if quant_mode == 2:
            if scales is not None and k < layer.top_k:
                row = row * scales.numpy()[int(layer.ids[source][token, k])]
            row_scales[at] = np.abs(row).max() / np.float32(127)
            row = np.rint(row * (np.float32(127) / np.abs(row).max()))
        rows[at] = row
    meaningful = np.arange(capacity) < used
    counts = np.array([sum(map(len, by_source)) for by_source in layer.arrivals(rank)])
    return [
        masked(rows, meaningful[:, None]),
        masked(row_scales, meaningful & (quant_mode == 2)),
        masked(counts if expert_token_nums_type == 1 else np.cumsum(counts)),
    ]


def combine(layer: Layer, rank: int, arguments: Mapping[str, torch.Tensor]) -> list[Array]:
    """The sum of aclnnMoeDistributeCombine, exact, where each expert has given back what it got.

    A token has its weights times its rows: of an expert the row itself, of a zero expert nothing, of a copy expert ori_x, of a
    constant expert alpha_1 * ori_x + alpha_2 * v. Then shared_expert_x, and the rows of ranks with shared experts.
    """
    zero, copy, _ = layer.special
    x, weights, active = float64(layer.x[rank]), float64(layer.weights[rank]), layer.active(rank).numpy()
    total = np.zeros_like(x)
    for token, chosen in enumerate(layer.ids[rank].tolist()):
        for k, expert in enumerate(chosen):
            if not active[token, k]:
                continue
            kind = expert - layer.experts
            row = x[token]
            if 0 <= kind < zero:
                row = np.zeros_like(row)
            elif kind >= zero:
                row = float64(arguments["ori_x"])[token]
                if kind >= zero + copy:
                    which = kind - zero - copy
                    alpha_1, alpha_2, v = (float64(arguments[f"const_expert_{n}"]) for n in ("alpha_1", "alpha_2", "v"))
                    row = alpha_1[which] * row + alpha_2[which] * v[which]
            total[token] += weights[token, k] * row
    total += layer.shared_experts * x if layer.shared_ranks else 0.0
    if arguments.get("shared_expert_x") is not None:
        total += float64(arguments["shared_expert_x"])
    return [masked(total, active.any(1)[:, None])]


# --- comparison ---

Golden = Callable[..., list[Array]]
SINGLE: dict[str, Golden] = {
    "npu_moe_init_routing_v2": init_routing,
    "npu_moe_finalize_routing": finalize_routing,
    "npu_moe_re_routing": re_routing,
    "npu_moe_gating_top_k": gating_top_k,
    "npu_moe_gating_top_k_softmax": gating_top_k_softmax,
    "npu_moe_gating_top_k_softmax_v2": gating_top_k_softmax_v2,
}


def difference(got: torch.Tensor, wanted: Array, relative: float | None = None) -> str | None:
    """How an output differs, or None. Integers and copies must be equal; a sum may differ by the rounding of its type.

    `relative` is the allowed error in parts of the largest element, where more than roundings come between (int8 on the wire).
    """
    if wanted.size == 0:
        return None
    if tuple(got.shape) != wanted.shape:
        return f"has the shape {tuple(got.shape)}, not {wanted.shape}"
    meant = ~np.ma.getmaskarray(wanted)
    values, right = got.cpu().double().numpy()[meant], wanted.data[meant]
    if not got.is_floating_point():
        unequal = np.flatnonzero(values != right)
    else:
        # A sum in 16 bits has one rounding. exp and sums in float32 have some.
        roundings = 4 if got.dtype == torch.float32 else 1
        unit = roundings * torch.finfo(got.dtype).eps if relative is None else relative
        largest_row = np.broadcast_to(np.abs(wanted.filled(0)).max(-1, initial=0, keepdims=True), wanted.shape)[meant]
        unequal = np.flatnonzero(~(np.abs(values - right) <= unit * np.maximum(largest_row, np.abs(right))))
    if not unequal.size:
        return None
    at = int(unequal[0])
    return f"{unequal.size} of {right.size} elements differ: {values[at]} instead of {right[at]}"
