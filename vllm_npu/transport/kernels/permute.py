"""On one GPU: from rank-major slots to expert-major rows, and weighted sums back."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["num_pairs"])
def rank_pairs_kernel(
    ranks,  # [num_pairs] int32: how many pairs of the same expert stand before each pair; not written for ids of -1
    counts,  # [number of experts] int64: pairs of each expert
    ids,  # [num_pairs] int32: local expert ids
    num_pairs,
    PAIRS: tl.constexpr,  # pairs that are read together
    DEPENDENT_LAUNCH: tl.constexpr,
):
    """Program `expert` numbers the pairs of its expert, in their order: the same numbers in every run."""
    if DEPENDENT_LAUNCH:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.program_id(0)
    before = tl.zeros((), tl.int32)
    for start in tl.range(0, num_pairs, PAIRS):
        pairs = start + tl.arange(0, PAIRS)
        own = (tl.load(ids + pairs, mask=pairs < num_pairs, other=-1) == expert).to(tl.int32)
        tl.store(ranks + pairs, before + tl.cumsum(own, 0) - own, mask=own > 0)
        before += tl.sum(own, 0)
    tl.store(counts + expert, before.to(tl.int64))


@triton.jit
def permute_kernel(
    expert_input,  # [any, HIDDEN_WORDS * 4 bytes]
    expert_scales,  # [any] float32; unused where SCALE_WORDS == 0
    positions,  # [num_slots, TOP_K] int32; not written for ids of -1
    ranks,  # [num_slots, TOP_K] int32, of rank_pairs_kernel
    counts,  # [NUM_EXPERTS] int64, of rank_pairs_kernel
    rows,  # [num_slots, HIDDEN_WORDS * 4 bytes]
    scales,  # [num_slots, SCALE_WORDS] float32, of which the first travels; unused where SCALE_WORDS == 0
    ids,  # [num_slots, TOP_K] int32: local expert ids, -1: no row
    NUM_EXPERTS: tl.constexpr,
    NUM_EXPERTS_PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    HIDDEN_WORDS: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    DEPENDENT_LAUNCH: tl.constexpr,
):
    """Program `slot * PARTS + part` reads a part of a slot's row once, and writes it behind the rows of lower experts and of
    earlier pairs, for each pair of the slot."""
    if DEPENDENT_LAUNCH:
        gdc_wait()
        gdc_launch_dependents()
    slot = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    k = tl.arange(0, TOP_K_PADDED)
    pairs = slot * TOP_K + k
    own_ids = tl.load(ids + pairs, mask=k < TOP_K, other=-1)
    experts = tl.arange(0, NUM_EXPERTS_PADDED)
    count = tl.load(counts + experts, mask=experts < NUM_EXPERTS, other=0).to(tl.int32)
    columns = part * TILE + tl.arange(0, TILE)
    inside = columns < HIDDEN_WORDS
    filled = tl.max(own_ids, 0) >= 0
    source = rows.to(tl.pointer_type(tl.int32)) + slot.to(tl.int64) * HIDDEN_WORDS
    row = tl.load(source + columns, mask=inside & filled)
    lower = tl.where(experts[None, :] < own_ids[:, None], count[None, :], 0)
    own_ranks = tl.load(ranks + pairs, mask=own_ids >= 0, other=0)
    own_positions = tl.sum(lower, 1) + own_ranks
    if part == 0:
        tl.store(positions + pairs, own_positions, mask=own_ids >= 0)
        if SCALE_WORDS > 0:
            scale = tl.load(scales + slot.to(tl.int64) * SCALE_WORDS)
            tl.store(
                expert_scales + own_positions, tl.zeros_like(own_positions).to(tl.float32) + scale, mask=own_ids >= 0
            )
    target = expert_input.to(tl.pointer_type(tl.int32))
    for each in tl.static_range(TOP_K):
        position = tl.sum(tl.where(k == each, own_positions, 0), 0).to(tl.int64)
        wanted = tl.max(tl.where(k == each, own_ids, -1), 0) >= 0
        tl.store(target + position * HIDDEN_WORDS + columns, row, mask=inside & wanted)


@triton.jit
def weighted_sum_kernel(
    output,  # [num_slots, WIDTH]
    rows,  # [any, WIDTH], same dtype
    positions,  # [num_slots, TOP_K] int32: row of each (slot, k) pair
    local_ids,  # [num_slots, TOP_K] int32: a pair below 0 has no row
    weights,  # [num_slots, TOP_K] float32
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    TILE: tl.constexpr,
):
    """output[slot] = sum over k of weight * row, in float32, k ascending. Slots without a row are not written."""
    slot = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    filled = False
    for k in tl.static_range(TOP_K):
        wanted = tl.load(local_ids + slot * TOP_K + k) >= 0
        filled = filled | wanted
        position = tl.load(positions + slot * TOP_K + k, mask=wanted, other=0).to(tl.int64)
        weight = tl.load(weights + slot * TOP_K + k)
        row = tl.load(rows + position * WIDTH + columns, mask=(columns < WIDTH) & wanted, other=0.0)
        total += tl.where(wanted, weight, 0.0) * row.to(tl.float32)
    tl.store(output + slot * WIDTH + columns, total.to(output.dtype.element_ty), mask=(columns < WIDTH) & filled)
