"""Dispatch and combine over symmetric memory by a given number of programs, each of which takes a multiprocessor for itself.

They move what the kernels in symmetric.py move, into the same windows, for callers that compute on the other multiprocessors.
There, a program moves a part of one row and ends. Here, it moves the same part of ROWS rows at a time, a chunk, and goes on to
other chunks: chunk `program`, chunk `program + num_programs`, and so on.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from vllm_npu.transport.kernels.signals import signal, wait
from vllm_npu.transport.kernels.symmetric import _ids_for, _in_window, _is_own, _signal_others

DELAY = tl.constexpr(2)  # chunks between sending and adding up, so that no program waits for a flag on its way


@triton.jit
def _tokens_of(chunk, num_tokens, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """The tokens of a chunk [ROWS], and which of them exist."""
    tokens = chunk // PARTS * ROWS + tl.arange(0, ROWS)
    return tokens, tokens < num_tokens


@triton.jit
def _owners_of(
    topk_ids, mask, tokens, real, experts_per_rank, TOP_K: tl.constexpr, TOP_K_PADDED: tl.constexpr, HAS_MASK: tl.constexpr
):  # fmt: skip
    """Ids and ranks of the experts of tokens: each [ROWS, TOP_K_PADDED] int32. The rank is -1 where there is no expert."""
    k = tl.arange(0, TOP_K_PADDED)[None, :]
    is_token = real
    if HAS_MASK:
        is_token = is_token & (tl.load(mask + tokens, mask=real, other=0) != 0)
    at = tokens[:, None] * TOP_K + k
    ids = tl.load(topk_ids + at, mask=real[:, None] & (k < TOP_K), other=-1).to(tl.int32)
    return ids, tl.where((ids >= 0) & is_token[:, None], ids // experts_per_rank, -1)


@triton.jit
def _load_chunk(
    source, chunk, num_tokens, ROWS: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr
):
    """[ROWS, TILE] elements of the chunk."""
    tokens, real = _tokens_of(chunk, num_tokens, ROWS, PARTS)
    columns = (chunk % PARTS * TILE + tl.arange(0, TILE))[None, :]
    return tl.load(source + tokens[:, None].to(tl.int64) * WIDTH + columns, mask=real[:, None] & (columns < WIDTH))


@triton.jit
def _row_of(values, row: tl.constexpr, ROWS: tl.constexpr):
    """The largest value in one row of [ROWS, any] int32."""
    return tl.max(tl.max(tl.where(tl.arange(0, ROWS)[:, None] == row, values, 0), 1), 0)


@triton.jit(do_not_specialize=["num_tokens", "rank", "experts_per_rank", "timeout_ns"])
def dispatch_on_few_sms_kernel(
    hidden_states,  # the arguments of symmetric.dispatch_kernel, and ROWS
    scales,
    topk_weights,
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
    HIDDEN_WORDS: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    SCALE_WORDS_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    EP_SIZE: tl.constexpr,
    EP_SIZE_PADDED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    GLOBAL_IDS: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,  # words of a row in a chunk
    STAGE: tl.constexpr,
    DEPENDENT_LAUNCH: tl.constexpr,
):
    """Send tokens to the ranks of their experts. A program sends its chunks, and then waits for the program of its number on
    other ranks. The rows of the next chunk are loaded before those of a chunk are stored."""
    if DEPENDENT_LAUNCH:
        gdc_wait()
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    ranks = tl.arange(0, EP_SIZE_PADDED)
    addresses = tl.load(windows + ranks, mask=ranks < EP_SIZE, other=0)
    epoch = tl.load(epochs)
    others = (ranks < EP_SIZE) & (ranks != rank)
    k = tl.arange(0, TOP_K_PADDED)[None, :]
    s = tl.arange(0, SCALE_WORDS_PADDED)[None, :]
    source = hidden_states.to(tl.pointer_type(tl.int32))
    num_chunks = tl.cdiv(num_tokens, ROWS) * PARTS
    rows = _load_chunk(source, program, num_tokens, ROWS, PARTS, HIDDEN_WORDS, TILE)
    for chunk in tl.range(program, num_chunks, num_programs):
        tokens, real = _tokens_of(chunk, num_tokens, ROWS, PARTS)
        ids, owners = _owners_of(topk_ids, mask, tokens, real, experts_per_rank, TOP_K, TOP_K_PADDED, HAS_MASK)
        choice = real[:, None] & (k < TOP_K)
        weights = tl.load(topk_weights + tokens[:, None] * TOP_K + k, mask=choice)
        ahead = _load_chunk(source, chunk + num_programs, num_tokens, ROWS, PARTS, HIDDEN_WORDS, TILE)
        columns = (chunk % PARTS * TILE + tl.arange(0, TILE))[None, :]
        slots = (rank * num_tokens + tokens)[:, None].to(tl.int64)
        for step in tl.static_range(EP_SIZE):
            destination = (rank + 1 + step) % EP_SIZE
            chosen = owners == destination
            addressed = tl.max(chosen.to(tl.int32), 1)[:, None] > 0
            window_rows = _in_window(addresses, ranks, destination, 0, tl.int32)
            tl.store(window_rows + slots * HIDDEN_WORDS + columns, rows, mask=addressed & (columns < HIDDEN_WORDS))
            if chunk % PARTS == 0:
                received_ids = _in_window(addresses, ranks, destination, ids_offset, tl.int32)
                sent_ids = _ids_for(ids, chosen, destination, experts_per_rank, EP_SIZE, GLOBAL_IDS)
                tl.store(received_ids + slots * TOP_K + k, sent_ids, mask=choice)
                received_weights = _in_window(addresses, ranks, destination, weights_offset, tl.float32)
                tl.store(received_weights + slots * TOP_K + k, tl.where(chosen, weights, 0.0), mask=choice)
                if SCALE_WORDS > 0:
                    row_scales = tl.load(
                        scales + tokens[:, None] * SCALE_WORDS + s, mask=real[:, None] & (s < SCALE_WORDS)
                    )
                    received_scales = _in_window(addresses, ranks, destination, scales_offset, tl.float32)
                    tl.store(received_scales + slots * SCALE_WORDS + s, row_scales, mask=addressed & (s < SCALE_WORDS))
        rows = ahead
    _signal_others(addresses, others, rank, flags_offset, rank_flags, program, epoch, DEPENDENT_LAUNCH)
    if program == 0:
        tl.store(epochs + 1, epoch)
    own_flags = _in_window(addresses, ranks, rank, flags_offset, tl.int32) + ranks * rank_flags + program
    wait(own_flags, others, ranks, epoch, all_epochs, clock, failed, report, STAGE, timeout_ns)


@triton.jit(do_not_specialize=["num_tokens", "rank", "experts_per_rank", "timeout_ns"])
def combine_on_few_sms_kernel(
    output,  # the arguments of symmetric.combine_kernel without EXPERT_MAJOR, and ROWS
    slot_output,
    positions,
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
    weights_offset,
    ids_offset,
    returned_offset,
    flags_offset,
    rank_flags,
    WIDTH: tl.constexpr,
    EXPERT_MAJOR: tl.constexpr,
    ROWS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    EP_SIZE: tl.constexpr,
    EP_SIZE_PADDED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    GLOBAL_IDS: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,  # elements of a row in a chunk
    STAGE: tl.constexpr,
    DEPENDENT_LAUNCH: tl.constexpr,
):
    """Send the experts' rows back, and add the rows of each own token: float32, ranks ascending.

    A program sends a chunk. It then adds up a chunk that it sent DELAY chunks before, whose rows have come from the other ranks
    meanwhile, and sets the flag of the chunk that it sent.
    """
    tl.static_assert(not EXPERT_MAJOR, "few multiprocessors take a row for each slot")
    TOGETHER: tl.constexpr = 2 if ROWS > 1 else 1  # rows whose loads wait together; more take too many registers
    if DEPENDENT_LAUNCH:
        gdc_wait()
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    ranks = tl.arange(0, EP_SIZE_PADDED)
    addresses = tl.load(windows + ranks, mask=ranks < EP_SIZE, other=0)
    epoch = tl.load(epochs + 1)
    others = (ranks < EP_SIZE) & (ranks != rank)
    element_type: tl.constexpr = output.dtype.element_ty
    k = tl.arange(0, TOP_K_PADDED)[None, :]
    received_ids = _in_window(addresses, ranks, rank, ids_offset, tl.int32)
    own_returned = _in_window(addresses, ranks, rank, returned_offset, element_type)
    own_flags = _in_window(addresses, ranks, rank, flags_offset, tl.int32) + ranks * rank_flags
    others_flags = (addresses + flags_offset + rank * rank_flags * 4).to(tl.pointer_type(tl.int32))
    num_chunks = tl.cdiv(num_tokens, ROWS) * PARTS
    if program == 0:
        tl.store(epochs, epoch + 1)  # before any wait, which may set it back
    first = (rank + 1) % EP_SIZE * num_tokens.to(tl.int64) * WIDTH  # of the rows that are sent first
    rows = _load_chunk(slot_output + first, program, num_tokens, ROWS, PARTS, WIDTH, TILE)
    for chunk in tl.range(program, num_chunks + DELAY * num_programs, num_programs):
        if chunk < num_chunks:
            tokens, real = _tokens_of(chunk, num_tokens, ROWS, PARTS)
            columns = (chunk % PARTS * TILE + tl.arange(0, TILE))[None, :]
            own_slots = (rank * num_tokens + tokens)[:, None].to(tl.int64)
            for step in tl.static_range(EP_SIZE - 1):
                source = (rank + 1 + step) % EP_SIZE
                slots = source * num_tokens + tokens
                at = slots[:, None] * TOP_K + k
                ids = tl.load(received_ids + at, mask=real[:, None] & (k < TOP_K), other=-1)
                if step > 0:
                    start = source * num_tokens.to(tl.int64) * WIDTH
                    rows = _load_chunk(slot_output + start, chunk, num_tokens, ROWS, PARTS, WIDTH, TILE)
                filled = tl.max(_is_own(ids, rank, experts_per_rank, GLOBAL_IDS).to(tl.int32), 1)[:, None] > 0
                returned = _in_window(addresses, ranks, source, returned_offset, element_type)
                tl.store(returned + own_slots * WIDTH + columns, rows, mask=filled & (columns < WIDTH))
        rows = _load_chunk(slot_output + first, chunk + num_programs, num_tokens, ROWS, PARTS, WIDTH, TILE)
        behind = chunk - DELAY * num_programs
        if behind >= 0:
            tokens, real = _tokens_of(behind, num_tokens, ROWS, PARTS)
            _, owners = _owners_of(topk_ids, mask, tokens, real, experts_per_rank, TOP_K, TOP_K_PADDED, HAS_MASK)
            wait(own_flags + behind, others, ranks, epoch, all_epochs, clock, failed, report, STAGE, timeout_ns)
            columns = (behind % PARTS * TILE + tl.arange(0, TILE))[None, :]
            inside = columns < WIDTH
            for start in tl.static_range(0, ROWS, TOGETHER):
                pair = tl.arange(0, TOGETHER)[:, None]
                token = behind // PARTS * ROWS + start + pair
                total = tl.zeros((TOGETHER, TILE), tl.float32)
                for source in tl.static_range(EP_SIZE):
                    sent = (owners == source).to(tl.int32)
                    addressed = tl.where(
                        pair == 0, _row_of(sent, start, ROWS), _row_of(sent, start + TOGETHER - 1, ROWS)
                    )
                    slots = (source * num_tokens + token).to(tl.int64)
                    # This rank's part lies in slot_output, those of other ranks in its window.
                    origin = tl.where(source == rank, slot_output.to(tl.int64), own_returned.to(tl.int64))
                    origin = tl.multiple_of(origin.to(tl.pointer_type(element_type)), 16)
                    part = tl.load(origin + slots * WIDTH + columns, mask=inside & (addressed > 0), other=0.0)
                    total += part.to(tl.float32)
                at = token.to(tl.int64) * WIDTH + columns
                tl.store(output + at, total.to(element_type), mask=inside & (token < num_tokens))
        if chunk < num_chunks:
            signal(others_flags + chunk, others, epoch)  # the chunk has travelled while the sums were made
