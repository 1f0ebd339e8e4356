"""Combine over symmetric memory for experts that wrote their rows into their own window: each rank takes its tokens' rows out
of the other ranks' windows.

The combine kernels in symmetric.py send rows, so they wait for their own writes to arrive, and then for those of others. Here,
a rank only says that its experts have ended, and reads. Slot `rank * num_tokens + t` of a window holds the row of token t of
that rank, as in dispatch.

A row is read until this kernel ends. The rank that holds it overwrites it in the next exchange but one, after a dispatch in
which it waited for this rank, whose dispatch starts when this kernel has ended.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vllm_npu.transport.kernels.signals import wait
from vllm_npu.transport.kernels.symmetric import _in_window, _owners, _signal_others


@triton.jit
def _row_of(
    addresses, ranks, source, returned_offset, owners, wanted, slot, columns,
    element_type: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A part of the row in `slot` of the window of `source`; zeros unless it is wanted and source has an expert for it."""
    addressed = wanted & (tl.max((owners == source).to(tl.int32), 0) > 0)
    rows = _in_window(addresses, ranks, source, returned_offset, element_type)
    # .cg: a line of another GPU's memory that this multiprocessor has kept would be of an earlier exchange
    return tl.load(rows + slot * WIDTH + columns, mask=(columns < WIDTH) & addressed, other=0.0, cache_modifier=".cg")


@triton.jit
def _owners_of(
    topk_ids, mask, token, experts_per_rank, TOP_K: tl.constexpr, TOP_K_PADDED: tl.constexpr, HAS_MASK: tl.constexpr
):  # fmt: skip
    """The ranks of a token's experts, -1 where there is none."""
    is_token = True
    if HAS_MASK:
        is_token = tl.load(mask + token) != 0
    _, owners = _owners(topk_ids, is_token, token, experts_per_rank, TOP_K, TOP_K_PADDED)
    return owners


@triton.jit(do_not_specialize=["num_tokens", "rank", "experts_per_rank", "timeout_ns"])
def take_kernel(
    output,  # [num_tokens, WIDTH]
    topk_ids,  # [num_tokens, TOP_K] int32 or int64, as dispatched
    mask,  # [num_tokens] bool, as dispatched; unused unless HAS_MASK
    windows,  # [EP_SIZE] int64
    epochs,  # [2] int32
    all_epochs,  # [NUM_EPOCHS] int32
    clock,  # [1] int64
    failed,  # [1] int32
    report,  # int64
    num_tokens,
    rank,
    experts_per_rank,
    timeout_ns,
    returned_offset,
    flags_offset,
    rank_flags,  # number of flags that each rank has in the area
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    EP_SIZE: tl.constexpr,
    EP_SIZE_PADDED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PARTS: tl.constexpr,  # number of parts of a row
    TILE: tl.constexpr,  # number of elements in a part
    STAGES: tl.constexpr,  # 0: a program takes one part of one row. Otherwise it takes several, and loads STAGES - 1 ahead
    STAGE: tl.constexpr,
    DEPENDENT_LAUNCH: tl.constexpr,
):
    """Take and add up the rows of each own token: float32, ranks ascending.

    The first programs say that this rank's experts have ended, which is so before any program starts. Program `p` waits for
    program `p % rank_flags` of the other ranks. It takes part `p % PARTS` of token `p // PARTS`, and with STAGES goes on to
    part `p + number of programs`, and so on.
    """
    if DEPENDENT_LAUNCH:
        gdc_wait()
    program = tl.program_id(0)
    ranks = tl.arange(0, EP_SIZE_PADDED)
    addresses = tl.load(windows + ranks, mask=ranks < EP_SIZE, other=0)
    epoch = tl.load(epochs + 1)
    others = (ranks < EP_SIZE) & (ranks != rank)
    element_type: tl.constexpr = output.dtype.element_ty
    if program < rank_flags:
        _signal_others(addresses, others, rank, flags_offset, rank_flags, program, epoch, False)
    if DEPENDENT_LAUNCH:
        gdc_launch_dependents()
    if program == 0:
        tl.store(epochs, epoch + 1)  # before the wait, which may set it back
    own_flags = _in_window(addresses, ranks, rank, flags_offset, tl.int32) + ranks * rank_flags + program % rank_flags
    if STAGES == 0:
        token = program // PARTS
        columns = program % PARTS * TILE + tl.arange(0, TILE)
        slot = (rank * num_tokens + token).to(tl.int64)
        owners = _owners_of(topk_ids, mask, token, experts_per_rank, TOP_K, TOP_K_PADDED, HAS_MASK)
        own = _row_of(addresses, ranks, rank, returned_offset, owners, True, slot, columns, element_type, WIDTH)
        wait(own_flags, others, ranks, epoch, all_epochs, clock, failed, report, STAGE, timeout_ns)
        total = tl.zeros((TILE,), tl.float32)
        for source in tl.static_range(EP_SIZE):
            row = _row_of(
                addresses, ranks, source, returned_offset, owners, source != rank, slot, columns, element_type, WIDTH
            )
            total += tl.where(source == rank, own, row).to(tl.float32)
        tl.store(output + token.to(tl.int64) * WIDTH + columns, total.to(element_type), mask=columns < WIDTH)
    else:
        wait(own_flags, others, ranks, epoch, all_epochs, clock, failed, report, STAGE, timeout_ns)
        for part in tl.range(program, num_tokens * PARTS, tl.num_programs(0), num_stages=STAGES):
            token = part // PARTS
            columns = part % PARTS * TILE + tl.arange(0, TILE)
            slot = (rank * num_tokens + token).to(tl.int64)
            owners = _owners_of(topk_ids, mask, token, experts_per_rank, TOP_K, TOP_K_PADDED, HAS_MASK)
            total = tl.zeros((TILE,), tl.float32)
            for source in tl.static_range(EP_SIZE):
                row = _row_of(
                    addresses, ranks, source, returned_offset, owners, True, slot, columns, element_type, WIDTH
                )
                total += row.to(tl.float32)
            tl.store(output + token.to(tl.int64) * WIDTH + columns, total.to(element_type), mask=columns < WIDTH)
