"""Weighted sums on one GPU, from expert-major rows to rank-major slots."""

import triton
import triton.language as tl


@triton.jit
def weighted_sum_kernel(
    output,  # [num_slots, WIDTH]
    rows,  # [any, WIDTH], same dtype
    positions,  # [num_slots, TOP_K] int64: row of each (slot, k) pair
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
        position = tl.load(positions + slot * TOP_K + k)
        weight = tl.load(weights + slot * TOP_K + k)
        row = tl.load(rows + position * WIDTH + columns, mask=(columns < WIDTH) & wanted, other=0.0)
        total += tl.where(wanted, weight, 0.0) * row.to(tl.float32)
    tl.store(output + slot * WIDTH + columns, total.to(output.dtype.element_ty), mask=(columns < WIDTH) & filled)
