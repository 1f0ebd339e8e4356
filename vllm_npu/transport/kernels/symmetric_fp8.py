"""Dispatch over symmetric memory that casts rows to fp8 on their way, with a float32 scale for each group of columns.

symmetric.py's dispatch sends fp8 rows whose scales another kernel made before. Here each program reads its part of a row once,
makes the scales of that part, and sends the cast part and its scales. Windows, flags and epochs are those of symmetric.py.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from vllm_npu.transport.kernels.signals import wait
from vllm_npu.transport.kernels.symmetric import _in_window, _owners, _send_choices, _signal_others

FP8_MAX = tl.constexpr(448.0)  # of float8_e4m3fn
SMALLEST = tl.constexpr(1e-10)  # of a group's largest magnitude, so that a group of zeros has a scale


@triton.jit
def _columns_of(part, WIDTH: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr):
    """Of a part of a row: its groups, their columns [groups, GROUP], and which groups exist."""
    groups = part * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
    return groups, groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :], groups < WIDTH // GROUP


@triton.jit
def _load_part(
    rows, at, num_parts, WIDTH: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Part `at % PARTS` of row `at // PARTS`; zeros past the last part."""
    _, columns, real = _columns_of(at % PARTS, WIDTH, GROUP, TILE)
    source = rows + (at // PARTS).to(tl.int64) * WIDTH
    return tl.load(source + columns, mask=real[:, None] & (at < num_parts), other=0.0)


@triton.jit(do_not_specialize=["num_tokens", "rank", "experts_per_rank", "timeout_ns"])
def dispatch_fp8_kernel(
    hidden_states,  # [num_tokens, WIDTH], 16-bit or float32
    scales,  # unused
    topk_weights,  # from here on the arguments of symmetric.dispatch_kernel
    topk_ids,
    mask,
    windows,
    epochs,
    all_epochs,
    clock,
    failed,
    report,
    num_tokens,
    rank,
    experts_per_rank,
    timeout_ns,
    scales_offset,
    weights_offset,
    ids_offset,
    flags_offset,
    rank_flags,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,  # columns of a scale; WIDTH and TILE are multiples of it
    SEVERAL: tl.constexpr,  # whether a program sends several parts, and loads one while it sends another
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    EP_SIZE: tl.constexpr,
    EP_SIZE_PADDED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    GLOBAL_IDS: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,  # columns that a program casts at a time
    STAGE: tl.constexpr,
    DEPENDENT_LAUNCH: tl.constexpr,
):
    """Send tokens to the ranks of their experts. Program `p` sends part `p % PARTS` of token `p // PARTS`, then part
    `p + number of programs`, and so on. It then waits for the program of its number on other ranks."""
    if DEPENDENT_LAUNCH:
        gdc_wait()
    program = tl.program_id(0)
    ranks = tl.arange(0, EP_SIZE_PADDED)
    addresses = tl.load(windows + ranks, mask=ranks < EP_SIZE, other=0)
    epoch = tl.load(epochs)
    others = (ranks < EP_SIZE) & (ranks != rank)
    k = tl.arange(0, TOP_K_PADDED)
    NUM_GROUPS: tl.constexpr = WIDTH // GROUP
    num_parts, num_programs = num_tokens * PARTS, tl.num_programs(0)
    values = _load_part(hidden_states, program, num_parts, WIDTH, GROUP, PARTS, TILE)
    for at in tl.range(program, num_parts, num_programs):
        token = at // PARTS
        part = at % PARTS
        is_token = True
        if HAS_MASK:
            is_token = tl.load(mask + token) != 0
        ids, owners = _owners(topk_ids, is_token, token, experts_per_rank, TOP_K, TOP_K_PADDED)
        weights = tl.load(topk_weights + token * TOP_K + k, mask=k < TOP_K)
        groups, columns, real = _columns_of(part, WIDTH, GROUP, TILE)
        wide = values.to(tl.float32)
        if SEVERAL:
            values = _load_part(hidden_states, at + num_programs, num_parts, WIDTH, GROUP, PARTS, TILE)
        largest = tl.maximum(tl.max(tl.abs(wide), 1), SMALLEST)
        row_scales = largest * (1.0 / FP8_MAX)
        row = (wide * tl.div_rn(FP8_MAX, largest)[:, None]).to(tl.float8e4nv)
        slot = (rank * num_tokens + token).to(tl.int64)
        for step in tl.static_range(EP_SIZE):
            destination = (rank + 1 + step) % EP_SIZE  # the neighbour first, this rank last
            chosen = owners == destination
            addressed = tl.max(chosen.to(tl.int32), 0) > 0
            if addressed:
                rows = _in_window(addresses, ranks, destination, 0, tl.float8e4nv)
                tl.store(rows + slot * WIDTH + columns, row, mask=real[:, None])
                received_scales = _in_window(addresses, ranks, destination, scales_offset, tl.float32)
                tl.store(received_scales + slot * NUM_GROUPS + groups, row_scales, mask=real)
            if part == 0:
                _send_choices(
                    addresses, ranks, destination, ids_offset, weights_offset, ids, weights, chosen, slot,
                    experts_per_rank, TOP_K, TOP_K_PADDED, EP_SIZE, GLOBAL_IDS,
                )  # fmt: skip
    _signal_others(addresses, others, rank, flags_offset, rank_flags, program, epoch, DEPENDENT_LAUNCH)
    if program == 0:
        tl.store(epochs + 1, epoch)
    own_flags = _in_window(addresses, ranks, rank, flags_offset, tl.int32) + ranks * rank_flags + program
    wait(own_flags, others, ranks, epoch, all_epochs, clock, failed, report, STAGE, timeout_ns)
