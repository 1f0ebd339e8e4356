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
from vllm_npu.transport.kernels.symmetric import _in_window, _signal_others
from vllm_npu.transport.kernels.symmetric_on_few_sms import _owners_of, _tokens_of


@triton.jit
def _rows_of(
    addresses, ranks, source, returned_offset, owners, chunk, num_tokens, rank,
    element_type: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """[ROWS, TILE] elements of a chunk of this rank's tokens in the window of `source`, zeros where source has no expert."""
    tokens, _ = _tokens_of(chunk, num_tokens, ROWS, PARTS)
    slots = (rank * num_tokens + tokens)[:, None].to(tl.int64)
    columns = (chunk % PARTS * TILE + tl.arange(0, TILE))[None, :]
    wanted = tl.max((owners == source).to(tl.int32), 1)[:, None] > 0
    rows = _in_window(addresses, ranks, source, returned_offset, element_type)
    # .cg: a line of another GPU's memory that this multiprocessor has kept would be of an earlier exchange
    return tl.load(rows + slots * WIDTH + columns, mask=wanted & (columns < WIDTH), other=0.0, cache_modifier=".cg")


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
    PARTS: tl.constexpr,
    TILE: tl.constexpr,  # elements of a row in a chunk
    ROWS: tl.constexpr,  # rows in a chunk
    SEVERAL: tl.constexpr,  # whether a program has several chunks
    STAGE: tl.constexpr,
    DEPENDENT_LAUNCH: tl.constexpr,
):
    """Take and add up the rows of each own token: float32, ranks ascending.

    The first programs say that this rank's experts have ended, which is so before any program starts. Program `p` waits for
    program `p % rank_flags` of the other ranks, and takes chunk `p`, chunk `p + number of programs`, and so on. With SEVERAL
    and two ranks, the next chunk is on its way while a chunk is added up.
    """
    if DEPENDENT_LAUNCH:
        gdc_wait()
    program, num_programs = tl.program_id(0), tl.num_programs(0)
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
    num_chunks = tl.cdiv(num_tokens, ROWS) * PARTS
    tokens, real = _tokens_of(program, num_tokens, ROWS, PARTS)
    _, owners = _owners_of(topk_ids, mask, tokens, real, experts_per_rank, TOP_K, TOP_K_PADDED, HAS_MASK)
    owners_ahead = owners
    if SEVERAL:
        tokens, real = _tokens_of(program + num_programs, num_tokens, ROWS, PARTS)
        _, owners_ahead = _owners_of(topk_ids, mask, tokens, real, experts_per_rank, TOP_K, TOP_K_PADDED, HAS_MASK)
    own = tl.zeros((ROWS, TILE), element_type)
    rows = own
    if EP_SIZE == 2:  # of more ranks, the rows would not fit into the registers
        own = _rows_of(
            addresses, ranks, rank, returned_offset, owners, program, num_tokens, rank, element_type, ROWS, PARTS,
            WIDTH, TILE,
        )  # fmt: skip
    own_flags = _in_window(addresses, ranks, rank, flags_offset, tl.int32) + ranks * rank_flags + program % rank_flags
    wait(own_flags, others, ranks, epoch, all_epochs, clock, failed, report, STAGE, timeout_ns)
    if EP_SIZE == 2:
        rows = _rows_of(
            addresses, ranks, 1 - rank, returned_offset, owners, program, num_tokens, rank, element_type, ROWS, PARTS,
            WIDTH, TILE,
        )  # fmt: skip
    for chunk in tl.range(program, num_chunks, num_programs):
        owners_after = owners_ahead
        if SEVERAL:
            tokens, real = _tokens_of(chunk + 2 * num_programs, num_tokens, ROWS, PARTS)
            _, owners_after = _owners_of(topk_ids, mask, tokens, real, experts_per_rank, TOP_K, TOP_K_PADDED, HAS_MASK)
        if EP_SIZE == 2:
            rows_ahead = rows
            if SEVERAL:
                own = _rows_of(
                    addresses, ranks, rank, returned_offset, owners, chunk, num_tokens, rank, element_type, ROWS, PARTS,
                    WIDTH, TILE,
                )  # fmt: skip
                rows_ahead = _rows_of(
                    addresses, ranks, 1 - rank, returned_offset, owners_ahead, chunk + num_programs, num_tokens, rank,
                    element_type, ROWS, PARTS, WIDTH, TILE,
                )  # fmt: skip
            total = own.to(tl.float32) + rows.to(tl.float32)  # of two, the order gives the same bits
            rows = rows_ahead
        else:
            total = tl.zeros((ROWS, TILE), tl.float32)
            for source in tl.static_range(EP_SIZE):
                total += _rows_of(
                    addresses, ranks, source, returned_offset, owners, chunk, num_tokens, rank, element_type, ROWS,
                    PARTS, WIDTH, TILE,
                ).to(tl.float32)  # fmt: skip
        tokens, real = _tokens_of(chunk, num_tokens, ROWS, PARTS)
        columns = (chunk % PARTS * TILE + tl.arange(0, TILE))[None, :]
        at = tokens[:, None].to(tl.int64) * WIDTH + columns
        tl.store(output + at, total.to(element_type), mask=real[:, None] & (columns < WIDTH))
        owners, owners_ahead = owners_ahead, owners_after
