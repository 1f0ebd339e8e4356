"""MoE dispatch and combine over symmetric memory: each rank writes into the other ranks' windows.

Token t of rank s has slot s * num_tokens + t in the window of every rank, so ranks count no rows and exchange no sizes.
A row crosses the link once for each destination rank, with its expert ids (-1 for an expert of another rank), its weights and
its scales. In combine, each destination rank sends one row back, and the token's own rank adds these rows.

A window, in bytes: received rows | scales | weights | ids ... returned rows ... flags of dispatch | of combine | of the
combine in symmetric_take.py.
A kernel waits for the flags of the same kernel on other ranks only. Host sync: no. CUDA graph: legal. With DEPENDENT_LAUNCH
(compute capability 9.0 and later) a kernel starts while the kernel before it ends, and reads nothing until that has ended.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vllm_npu.transport.kernels.signals import signal, wait

DISPATCH_STAGE = 1  # numbers in the report of wait()
COMBINE_STAGE = 2


@triton.jit
def _in_window(addresses, ranks, rank, offset, element_type: tl.constexpr):
    """Pointer into the window of `rank`. addresses: of the windows of all ranks. The caller loads them once, since a load
    here would delay the store that follows.

    Offsets and window sizes are multiples of 256 bytes.
    """
    address = tl.sum(tl.where(ranks == rank, addresses, 0), 0) + offset
    return tl.multiple_of(address.to(tl.pointer_type(element_type)), 16)


@triton.jit
def _owners(topk_ids, is_token, token, experts_per_rank, TOP_K: tl.constexpr, TOP_K_PADDED: tl.constexpr):
    """Ids and ranks of a token's experts: [TOP_K_PADDED] int32. The rank is -1 past TOP_K and for rows that are no tokens."""
    k = tl.arange(0, TOP_K_PADDED)
    ids = tl.load(topk_ids + token * TOP_K + k, mask=k < TOP_K, other=-1).to(tl.int32)
    return ids, tl.where((ids >= 0) & is_token, ids // experts_per_rank, -1)


@triton.jit
def _ids_for(ids, chosen, destination, experts_per_rank, EP_SIZE: tl.constexpr, GLOBAL_IDS: tl.constexpr):
    """A token's ids as `destination` gets them: local ids, and -1 for experts of other ranks. With GLOBAL_IDS: global ids, and
    the first expert of the next rank in place of -1."""
    if GLOBAL_IDS:
        return tl.where(chosen, ids, (destination + 1) % EP_SIZE * experts_per_rank)
    else:
        return tl.where(chosen, ids - destination * experts_per_rank, -1)


@triton.jit
def _send_choices(
    addresses, ranks, destination, ids_offset, weights_offset, ids, weights, chosen, slot, experts_per_rank,
    TOP_K: tl.constexpr, TOP_K_PADDED: tl.constexpr, EP_SIZE: tl.constexpr, GLOBAL_IDS: tl.constexpr,
):  # fmt: skip
    """Write a token's ids and weights [TOP_K_PADDED] into its slot on `destination`. chosen: its experts on that rank."""
    k = tl.arange(0, TOP_K_PADDED)
    received_ids = _in_window(addresses, ranks, destination, ids_offset, tl.int32)
    sent_ids = _ids_for(ids, chosen, destination, experts_per_rank, EP_SIZE, GLOBAL_IDS)
    tl.store(received_ids + slot * TOP_K + k, sent_ids, mask=k < TOP_K)
    received_weights = _in_window(addresses, ranks, destination, weights_offset, tl.float32)
    tl.store(received_weights + slot * TOP_K + k, tl.where(chosen, weights, 0.0), mask=k < TOP_K)


@triton.jit
def _is_own(ids, rank, experts_per_rank, GLOBAL_IDS: tl.constexpr):
    """Whether received ids are of experts of this rank. False past TOP_K, where ids are -1."""
    if GLOBAL_IDS:
        return (ids >= 0) & (ids // experts_per_rank == rank)
    else:
        return ids >= 0


@triton.jit
def _slot_row(
    rows, positions, weights, ids, slot, columns, inside, WIDTH: tl.constexpr, TOP_K: tl.constexpr,
    EXPERT_MAJOR: tl.constexpr,
):  # fmt: skip
    """What the experts of this rank made of the token in `slot`. The row of the slot itself, or with EXPERT_MAJOR the weighted
    sum of the rows at `positions`: float32, k ascending, then rounded to the dtype of rows. ids: local, -1: no row."""
    if EXPERT_MAJOR:
        total = tl.zeros(columns.shape, tl.float32)
        for k in tl.static_range(TOP_K):
            wanted = tl.load(ids + slot * TOP_K + k) >= 0
            position = tl.load(positions + slot * TOP_K + k).to(tl.int64)  # undefined unless wanted
            weight = tl.load(weights + slot * TOP_K + k)
            row = tl.load(rows + position * WIDTH + columns, mask=inside & wanted, other=0.0)
            total += tl.where(wanted, weight, 0.0) * row.to(tl.float32)
        return total.to(rows.dtype.element_ty)
    else:
        return tl.load(rows + slot * WIDTH + columns, mask=inside)


@triton.jit
def _scales_of(scales, token, s, SCALE_WORDS: tl.constexpr):
    """A token's scales. Values without meaning if SCALE_WORDS is 0."""
    if SCALE_WORDS == 0:
        return s.to(tl.float32)
    else:
        return tl.load(scales + token * SCALE_WORDS + s, mask=s < SCALE_WORDS)


@triton.jit
def _signal_others(addresses, others, rank, flags_offset, rank_flags, program, epoch, DEPENDENT_LAUNCH: tl.constexpr):
    """Tell the other ranks that this program's rows are in their windows, and let the next kernel of this rank start."""
    flags = (addresses + flags_offset + rank * rank_flags * 4).to(tl.pointer_type(tl.int32)) + program
    signal(flags, others, epoch)
    if DEPENDENT_LAUNCH:
        gdc_launch_dependents()


@triton.jit(do_not_specialize=["num_tokens", "rank", "experts_per_rank", "timeout_ns"])
def dispatch_kernel(
    hidden_states,  # [num_tokens, HIDDEN_WORDS * 4 bytes]
    scales,  # [num_tokens, SCALE_WORDS] float32; unused where SCALE_WORDS == 0
    topk_weights,  # [num_tokens, TOP_K] float32
    topk_ids,  # [num_tokens, TOP_K] int32 or int64, global expert ids
    mask,  # [num_tokens] bool; unused unless HAS_MASK
    windows,  # [EP_SIZE] int64: address of the window on each rank
    epochs,  # [2] int32: of the next dispatch and of the next combine in this window
    all_epochs,  # [NUM_EPOCHS] int32: those of all windows
    clock,  # [1] int64
    failed,  # [1] int32
    report,  # int64: address of [1 + EP_SIZE] int32 in host memory that all ranks write
    num_tokens,
    rank,
    experts_per_rank,
    timeout_ns,
    scales_offset,
    weights_offset,
    ids_offset,
    flags_offset,
    rank_flags,  # number of flags that each rank has in the area
    HIDDEN_WORDS: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    SCALE_WORDS_PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    EP_SIZE: tl.constexpr,
    EP_SIZE_PADDED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    GLOBAL_IDS: tl.constexpr,
    PARTS: tl.constexpr,  # number of programs that share a row
    TILE: tl.constexpr,  # number of words that a program moves
    STAGE: tl.constexpr,
    DEPENDENT_LAUNCH: tl.constexpr,
):
    """Send tokens to the ranks of their experts. Program `token * PARTS + part` sends one part of one token's row, and then
    waits for the programs of the same number on other ranks."""
    if DEPENDENT_LAUNCH:
        gdc_wait()
    program = tl.program_id(0)
    ranks = tl.arange(0, EP_SIZE_PADDED)
    addresses = tl.load(windows + ranks, mask=ranks < EP_SIZE, other=0)
    epoch = tl.load(epochs)
    others = (ranks < EP_SIZE) & (ranks != rank)
    token = program // PARTS
    part = program % PARTS
    k = tl.arange(0, TOP_K_PADDED)
    is_token = True
    if HAS_MASK:
        is_token = tl.load(mask + token) != 0
    ids, owners = _owners(topk_ids, is_token, token, experts_per_rank, TOP_K, TOP_K_PADDED)
    weights = tl.load(topk_weights + token * TOP_K + k, mask=k < TOP_K)
    s = tl.arange(0, SCALE_WORDS_PADDED)
    row_scales = _scales_of(scales, token, s, SCALE_WORDS)
    columns = part * TILE + tl.arange(0, TILE)
    inside = columns < HIDDEN_WORDS
    source = hidden_states.to(tl.pointer_type(tl.int32)) + token.to(tl.int64) * HIDDEN_WORDS
    row = tl.load(source + columns, mask=inside)
    slot = (rank * num_tokens + token).to(tl.int64)
    for step in tl.static_range(EP_SIZE):
        destination = (rank + 1 + step) % EP_SIZE  # the neighbour first, this rank last
        chosen = owners == destination
        addressed = tl.max(chosen.to(tl.int32), 0) > 0
        if addressed:
            rows = _in_window(addresses, ranks, destination, 0, tl.int32)
            tl.store(rows + slot * HIDDEN_WORDS + columns, row, mask=inside)
        if part == 0:
            _send_choices(
                addresses, ranks, destination, ids_offset, weights_offset, ids, weights, chosen, slot, experts_per_rank,
                TOP_K, TOP_K_PADDED, EP_SIZE, GLOBAL_IDS,
            )  # fmt: skip
            if SCALE_WORDS > 0:
                received_scales = _in_window(addresses, ranks, destination, scales_offset, tl.float32)
                tl.store(received_scales + slot * SCALE_WORDS + s, row_scales, mask=(s < SCALE_WORDS) & addressed)
    _signal_others(addresses, others, rank, flags_offset, rank_flags, program, epoch, DEPENDENT_LAUNCH)
    if program == 0:
        tl.store(epochs + 1, epoch)
    own_flags = _in_window(addresses, ranks, rank, flags_offset, tl.int32) + ranks * rank_flags + program
    wait(own_flags, others, ranks, epoch, all_epochs, clock, failed, report, STAGE, timeout_ns)


@triton.jit(do_not_specialize=["num_tokens", "rank", "experts_per_rank", "timeout_ns"])
def combine_kernel(
    output,  # [num_tokens, WIDTH]
    slot_output,  # [EP_SIZE * num_tokens, WIDTH], same dtype; rows of empty slots are not used. EXPERT_MAJOR: [any, WIDTH]
    positions,  # [EP_SIZE * num_tokens, TOP_K] int32: rows of slot_output; unused unless EXPERT_MAJOR
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
    weights_offset,
    ids_offset,
    returned_offset,
    flags_offset,
    rank_flags,
    WIDTH: tl.constexpr,
    EXPERT_MAJOR: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    EP_SIZE: tl.constexpr,
    EP_SIZE_PADDED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    GLOBAL_IDS: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,  # number of elements that a program moves
    STAGE: tl.constexpr,
    DEPENDENT_LAUNCH: tl.constexpr,
):
    """Send the experts' rows back, and add the rows of each own token.

    Program `token * PARTS + part` sends one part of slot (r, token) back to each rank r. It then waits for the rows that
    these ranks send for its own token, and adds them in float32, ranks ascending, so that every run gives the same bits.
    """
    if DEPENDENT_LAUNCH:
        gdc_wait()
    program = tl.program_id(0)
    token = program // PARTS
    part = program % PARTS
    ranks = tl.arange(0, EP_SIZE_PADDED)
    addresses = tl.load(windows + ranks, mask=ranks < EP_SIZE, other=0)
    epoch = tl.load(epochs + 1)
    others = (ranks < EP_SIZE) & (ranks != rank)
    element_type: tl.constexpr = output.dtype.element_ty
    columns = part * TILE + tl.arange(0, TILE)
    inside = columns < WIDTH
    k = tl.arange(0, TOP_K_PADDED)
    received_ids = _in_window(addresses, ranks, rank, ids_offset, tl.int32)
    received_weights = _in_window(addresses, ranks, rank, weights_offset, tl.float32)
    own_slot = (rank * num_tokens + token).to(tl.int64)
    for step in tl.static_range(EP_SIZE - 1):
        source = (rank + 1 + step) % EP_SIZE
        slot = (source * num_tokens + token).to(tl.int64)
        ids = tl.load(received_ids + slot * TOP_K + k, mask=k < TOP_K, other=-1)
        row = _slot_row(  # does not wait for the ids, unless EXPERT_MAJOR
            slot_output, positions, received_weights, received_ids, slot, columns, inside, WIDTH, TOP_K, EXPERT_MAJOR
        )
        if tl.max(_is_own(ids, rank, experts_per_rank, GLOBAL_IDS).to(tl.int32), 0) > 0:
            returned = _in_window(addresses, ranks, source, returned_offset, element_type)
            tl.store(returned + own_slot * WIDTH + columns, row, mask=inside)
    _signal_others(addresses, others, rank, flags_offset, rank_flags, program, epoch, DEPENDENT_LAUNCH)
    if program == 0:
        tl.store(epochs, epoch + 1)
    is_token = True
    if HAS_MASK:
        is_token = tl.load(mask + token) != 0
    _, owners = _owners(topk_ids, is_token, token, experts_per_rank, TOP_K, TOP_K_PADDED)
    addressed = tl.max((owners == rank).to(tl.int32), 0) > 0
    own_row = _slot_row(
        slot_output, positions, received_weights, received_ids, own_slot, columns, inside & addressed, WIDTH, TOP_K,
        EXPERT_MAJOR,
    )  # fmt: skip
    own_row = tl.where(addressed, own_row, 0.0)
    own_flags = _in_window(addresses, ranks, rank, flags_offset, tl.int32) + ranks * rank_flags + program
    wait(own_flags, others, ranks, epoch, all_epochs, clock, failed, report, STAGE, timeout_ns)
    returned = _in_window(addresses, ranks, rank, returned_offset, element_type)
    total = tl.zeros((TILE,), tl.float32)
    for source in tl.static_range(EP_SIZE):
        slot = (source * num_tokens + token).to(tl.int64)
        addressed = tl.max((owners == source).to(tl.int32), 0) > 0
        row = tl.load(returned + slot * WIDTH + columns, mask=inside & addressed & (source != rank), other=0.0)
        total += tl.where(source == rank, own_row, row).to(tl.float32)
    tl.store(output + token.to(tl.int64) * WIDTH + columns, total.to(element_type), mask=inside)
