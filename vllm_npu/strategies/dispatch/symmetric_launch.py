"""How the symmetric kernels are launched: the number of programs (thread blocks) for a row, and the kernels' arguments.

The thresholds below are measured (docs/benchmarks).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from vllm_npu.core.token_layout import ceil_div
from vllm_npu.errors import InvalidInputError
from vllm_npu.strategies.dispatch.symmetric_layout import FP8_GROUP, WORD_BYTES, SlotLayout
from vllm_npu.transport.kernels.launch import PreparedLaunch
from vllm_npu.transport.symmetric_memory import TAKE_FLAGS, SymmetricWindows

SPLIT_MAX_TOKENS = 16  # up to this number of tokens, small programs share each row, so that more of the GPU takes part
SPLIT_BYTES = (
    2048  # bytes of a row that one program moves in that case, and a taking program of a whole GPU at any number
)
WHOLE_BYTES = 16384  # bytes of a row that one program moves otherwise: each program costs a fence over the link
FULL_TOKENS = 1024  # up to this number of tokens, 16 warps in a program are faster than 8, or as fast
SORTED_WIDE_TOKENS = 128
"""Up to this number of tokens, a program that adds up sorted rows has 16 warps. Beyond, it has 4: then more programs fit on a
multiprocessor, each of which waits for memory most of its time."""
CHUNK_BYTES = 65536
"""The most bytes that a program for few multiprocessors sends at a time: half of its registers."""
ENOUGH_SMS = 24
"""Multiprocessors of an H200 that are enough for a dispatch and for taking rows: with 32 or 48, neither is faster."""
PARTS_AHEAD = 5
"""The most parts of rows that a taking program for few multiprocessors has on their way to shared memory."""
CAST_PER_WARP = 1024  # columns of a row that a warp casts to fp8
PAIRS_AT_ONCE = 4096  # (slot, k) pairs that a program looks at together, to number those of its expert
WEIGHTED_SUM_TILE = 1024  # the most elements of a row that one program of weighted_sum adds up


def check_device(name: str, tensor: torch.Tensor | None, device: torch.device) -> None:
    """Raise InvalidInputError for a tensor of another device. A kernel takes its address, which is no memory of this device."""
    if tensor is not None and tensor.device != device:
        raise InvalidInputError(f"{name} is on {tensor.device}; this exchange runs on {device}, move it there")


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n; 1 for n = 0."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True, slots=True)
class LaunchShape:
    """How programs share the rows. `parts` programs move `rows` rows, each of them `tile` units of each row."""

    parts: int
    tile: int
    num_warps: int
    programs: int
    rows: int = 1

    @classmethod
    def of(
        cls,
        num_tokens: int,
        row_bytes: int,
        unit_bytes: int,
        max_sms: int | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> "LaunchShape":
        """The shape for num_tokens rows of row_bytes / unit_bytes units. Equal on all ranks.

        max_sms: the most programs, which then move one chunk of rows after another. chunk_bytes: the most bytes of a chunk that
        has more than a part of one row. max_sms None: a program for each part of a row.
        """
        if max_sms is not None:
            return cls._on_few_sms(num_tokens, row_bytes, unit_bytes, max_sms, chunk_bytes)
        split = num_tokens <= SPLIT_MAX_TOKENS
        units = ceil_div(row_bytes, unit_bytes)
        tile = min((SPLIT_BYTES if split else WHOLE_BYTES) // unit_bytes, power_of_two(units))
        num_warps = 4 if split else 16 if num_tokens <= FULL_TOKENS else 8
        parts = ceil_div(units, tile)
        return cls(parts=parts, tile=tile, num_warps=num_warps, programs=parts * num_tokens)

    @classmethod
    def _on_few_sms(
        cls, num_tokens: int, row_bytes: int, unit_bytes: int, max_sms: int, chunk_bytes: int
    ) -> "LaunchShape":
        units = ceil_div(row_bytes, unit_bytes)
        tile = min(WHOLE_BYTES // unit_bytes, power_of_two(units))
        parts = ceil_div(units, tile)
        fair = power_of_two(ceil_div(num_tokens * parts, max_sms))  # rows, so that each program has a chunk
        rows = min(fair, max(1, chunk_bytes // (tile * unit_bytes)))
        num_warps = min(16, max(4, rows * tile * unit_bytes // 2048))  # of 32 warps, each has too few registers
        chunks = ceil_div(num_tokens, rows) * parts
        return cls(parts=parts, tile=tile, num_warps=num_warps, programs=min(max_sms, chunks), rows=rows)


def programs_for(max_tokens: int, row_bytes: int) -> int:
    """The most programs that LaunchShape gives to any step of up to max_tokens rows of up to row_bytes."""
    split = ceil_div(row_bytes, SPLIT_BYTES) * min(max_tokens, SPLIT_MAX_TOKENS)
    return max(split, ceil_div(row_bytes, WHOLE_BYTES) * max_tokens)


def dispatch_launches(
    windows: SymmetricWindows,
    layout: SlotLayout,
    num_tokens: int,
    experts_per_rank: int,
    *,
    has_mask: bool,
    global_ids: bool = False,
    max_sms: int | None = None,
    use_fp8: bool = False,  # whether the kernel casts the rows; layout is of the rows that travel
) -> tuple[PreparedLaunch, ...]:
    """dispatch's kernel for each window. Empty: there is nothing to move."""
    sizes: dict[str, int | bool]
    if use_fp8:
        kernel = _fp8_kernels().dispatch_fp8_kernel
        shape = LaunchShape.of(num_tokens, layout.row_bytes, 1, max_sms, WHOLE_BYTES)
        shape = replace(shape, rows=1, num_warps=max(4, min(16, shape.tile // CAST_PER_WARP)))
        sizes = {"WIDTH": layout.row_bytes, "GROUP": FP8_GROUP, "SEVERAL": max_sms is not None}
    else:
        chunk_bytes = CHUNK_BYTES
        if max_sms is not None and max_sms >= ENOUGH_SMS:  # which send single rows faster than several at once
            max_sms, chunk_bytes = ENOUGH_SMS, WHOLE_BYTES
        kernel = _kernels().dispatch_kernel if max_sms is None else _few_sms_kernels().dispatch_on_few_sms_kernel
        shape = LaunchShape.of(num_tokens, layout.row_bytes, WORD_BYTES, max_sms, chunk_bytes)
        sizes = {
            "HIDDEN_WORDS": layout.row_bytes // WORD_BYTES,
            "SCALE_WORDS": layout.scale_width,
            "SCALE_WORDS_PADDED": power_of_two(layout.scale_width),
        }
        if max_sms is not None:
            sizes["ROWS"] = shape.rows
    return _exchange_launches(
        kernel,
        windows,
        layout,
        num_tokens,
        experts_per_rank,
        shape,
        offsets=(layout.scales_offset, layout.weights_offset, layout.ids_offset, windows.dispatch_flags_offset),
        sizes=sizes,
        has_mask=has_mask,
        global_ids=global_ids,
        stage=_kernels().DISPATCH_STAGE,
    )


def combine_launches(
    windows: SymmetricWindows,
    layout: SlotLayout,
    num_tokens: int,
    experts_per_rank: int,
    *,
    width: int,  # elements of a returned row
    element_size: int,  # bytes
    has_mask: bool,
    global_ids: bool = False,
    expert_major: bool = False,  # whether combine gets rows sorted by expert, with their positions
    max_sms: int | None = None,
) -> tuple[PreparedLaunch, ...]:
    """combine's kernel for each window. Empty: there is nothing to move."""
    shape = LaunchShape.of(num_tokens, width * element_size, element_size, max_sms)
    if expert_major:
        few = num_tokens <= SPLIT_MAX_TOKENS
        shape = replace(shape, num_warps=8 if few else 16 if num_tokens <= SORTED_WIDE_TOKENS else 4)
    sizes: dict[str, int | bool] = {"WIDTH": width, "EXPERT_MAJOR": expert_major}
    if max_sms is not None:
        sizes["ROWS"] = shape.rows
    return _exchange_launches(
        _kernels().combine_kernel if max_sms is None else _few_sms_kernels().combine_on_few_sms_kernel,
        windows,
        layout,
        num_tokens,
        experts_per_rank,
        shape,
        offsets=(layout.weights_offset, layout.ids_offset, windows.returned_offset, windows.combine_flags_offset),
        sizes=sizes,
        has_mask=has_mask,
        global_ids=global_ids,
        stage=_kernels().COMBINE_STAGE,
    )


def take_launches(
    windows: SymmetricWindows,
    layout: SlotLayout,
    num_tokens: int,
    experts_per_rank: int,
    *,
    width: int,  # elements of a returned row
    element_size: int,  # bytes
    has_mask: bool,
    max_sms: int | None = None,
) -> tuple[PreparedLaunch, ...]:
    """take_kernel for each window. Empty: there is nothing to move."""
    if not num_tokens:
        return ()
    ep_size, starts_early = windows.num_ranks, _starts_early(windows.device)
    part_bytes = SPLIT_BYTES if max_sms is None else 2 * WHOLE_BYTES // power_of_two(ep_size)
    tile = min(part_bytes // element_size, power_of_two(width))
    parts = ceil_div(width, tile)
    programs, num_warps, stages = num_tokens * parts, 4, 0
    if max_sms is not None and max_sms < programs:
        ahead = min(PARTS_AHEAD, _shared_memory(windows.device) // (ep_size * tile * element_size))
        programs, num_warps, stages = min(max_sms, ENOUGH_SMS), 8, 1 + max(1, ahead)
    numbers = (
        windows.report_address,
        num_tokens,
        windows.rank,
        experts_per_rank,
        windows.timeout_ns,
        windows.returned_offset,
        windows.take_flags_offset,
        TAKE_FLAGS,
    )
    constants: dict[str, int | bool] = {
        "WIDTH": width,
        "TOP_K": layout.top_k,
        "TOP_K_PADDED": power_of_two(layout.top_k),
        "EP_SIZE": ep_size,
        "EP_SIZE_PADDED": power_of_two(ep_size),
        "HAS_MASK": has_mask,
        "PARTS": parts,
        "TILE": tile,
        "STAGES": stages,
        "STAGE": _kernels().COMBINE_STAGE,
        "DEPENDENT_LAUNCH": starts_early,
    }
    kernel = _take_kernels().take_kernel
    return tuple(
        PreparedLaunch(kernel, programs, fixed, numbers, constants, num_warps=num_warps, launch_pdl=starts_early)
        for fixed in windows.kernel_tensors
    )


def _exchange_launches(
    kernel: Any,
    windows: SymmetricWindows,
    layout: SlotLayout,
    num_tokens: int,
    experts_per_rank: int,
    shape: LaunchShape,
    *,
    offsets: Sequence[int],  # of this kernel's parts in a window, the flags last
    sizes: dict[str, int | bool],  # this kernel's own constants, which stand before those of all kernels
    has_mask: bool,
    global_ids: bool,
    stage: int,
) -> tuple[PreparedLaunch, ...]:
    if not shape.programs:
        return ()
    num_flags = ceil_div(num_tokens, shape.rows) * shape.parts
    if num_flags > windows.size.rank_flags:
        raise InvalidInputError(
            f"{num_tokens} rows of {shape.parts} parts need {num_flags} flags, the windows hold "
            f"{windows.size.rank_flags}; call open() for the widest rows before the first dispatch"
        )
    starts_early = _starts_early(windows.device)
    numbers = (
        windows.report_address,
        num_tokens,
        windows.rank,
        experts_per_rank,
        windows.timeout_ns,
        *offsets,
        windows.size.rank_flags,
    )
    constants: dict[str, int | bool] = {
        **sizes,
        "TOP_K": layout.top_k,
        "TOP_K_PADDED": power_of_two(layout.top_k),
        "EP_SIZE": windows.num_ranks,
        "EP_SIZE_PADDED": power_of_two(windows.num_ranks),
        "HAS_MASK": has_mask,
        "GLOBAL_IDS": global_ids,
        "PARTS": shape.parts,
        "TILE": shape.tile,
        "STAGE": stage,
        "DEPENDENT_LAUNCH": starts_early,
    }
    return tuple(
        PreparedLaunch(
            kernel, shape.programs, fixed, numbers, constants, num_warps=shape.num_warps, launch_pdl=starts_early
        )
        for fixed in windows.kernel_tensors
    )


@dataclass(frozen=True, slots=True)
class SortLaunches:
    """The two kernels that sort the slots of one window by expert."""

    rank_pairs: PreparedLaunch  # tensors: ranks, counts
    permute: PreparedLaunch  # tensors: expert_input, expert_scales or None, positions, ranks, counts

    def __call__(
        self,
        expert_input: torch.Tensor,  # [num_slots * top_k, hidden_size]; rows past the sum of counts stay as they are
        expert_scales: torch.Tensor | None,  # [num_slots * top_k] float32
        positions: torch.Tensor,  # [num_slots, top_k] int32: row of each (slot, k) pair; as it was where the id is -1
        counts: torch.Tensor,  # [experts_per_rank] int64
        stream: int,
    ) -> None:
        """Fill the tensors. LOCAL, two kernels. Host sync: no. Graph capture: yes. Pairs of an expert keep their order."""
        ranks = torch.empty_like(positions)
        self.rank_pairs((ranks, counts), stream)
        self.permute((expert_input, expert_scales, positions, ranks, counts), stream)


def sort_launches(
    layout: SlotLayout,
    views: tuple[torch.Tensor, ...],  # SlotLayout.views of one window; the ids are local
    experts_per_rank: int,
) -> SortLaunches:
    """The kernels for one window. The layout has slots."""
    kernels = _permute_kernels()
    rows, scales, _, ids = views
    starts_early = _starts_early(rows.device)
    num_pairs = layout.num_slots * layout.top_k
    block = min(PAIRS_AT_ONCE, power_of_two(num_pairs))
    shape = LaunchShape.of(layout.num_slots, layout.row_bytes, WORD_BYTES)
    return SortLaunches(
        PreparedLaunch(
            kernels.rank_pairs_kernel,
            experts_per_rank,
            (ids,),
            (num_pairs,),
            {"PAIRS": block, "DEPENDENT_LAUNCH": starts_early},
            num_warps=min(16, max(1, block // 256)),
            launch_pdl=starts_early,
        ),
        PreparedLaunch(
            kernels.permute_kernel,
            shape.programs,
            (rows, scales if layout.scale_width else ids, ids),
            (),
            {
                "NUM_EXPERTS": experts_per_rank,
                "NUM_EXPERTS_PADDED": power_of_two(experts_per_rank),
                "TOP_K": layout.top_k,
                "TOP_K_PADDED": power_of_two(layout.top_k),
                "HIDDEN_WORDS": layout.row_bytes // WORD_BYTES,
                "SCALE_WORDS": layout.scale_width,
                "PARTS": shape.parts,
                "TILE": shape.tile,
                "DEPENDENT_LAUNCH": starts_early,
            },
            num_warps=shape.num_warps,
            launch_pdl=starts_early,
        ),
    )


def weighted_sum(
    rows: torch.Tensor,  # [any, width]
    positions: torch.Tensor,  # [num_slots, top_k] int32: the row of each (slot, k) pair
    local_ids: torch.Tensor,  # [num_slots, top_k] int32; -1: the pair has no row
    weights: torch.Tensor,  # [num_slots, top_k] float32
) -> torch.Tensor:  # [num_slots, width], dtype of rows; undefined for a slot without a pair
    """Each slot's weighted sum of its rows, in float32, k ascending. LOCAL. Host sync: no. Graph capture: yes.

    positions, local_ids and weights must be contiguous; rows may lie anywhere. Raises InvalidInputError for rows of another
    device.
    """
    check_device("expert_output", rows, positions.device)
    num_slots, width = positions.shape[0], rows.shape[1]
    summed = rows.new_empty((num_slots, width))
    if num_slots and width:
        tile = min(WEIGHTED_SUM_TILE, power_of_two(width))
        _permute_kernels().weighted_sum_kernel[(num_slots, ceil_div(width, tile))](
            summed,
            rows.contiguous(),
            positions,
            local_ids,
            weights,
            WIDTH=width,
            TOP_K=positions.shape[1],
            TILE=tile,
        )
    return summed


@cache
def _starts_early(device: torch.device) -> bool:
    """Whether a kernel on `device` may start while the kernel before it ends: from compute capability 9.0 on."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have for rows."""
    most: int = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    return most - 4096  # for what Triton keeps there besides


@cache
def _kernels() -> Any:
    """The module of dispatch and combine. It needs Triton, and this file must be importable without."""
    from vllm_npu.transport.kernels import symmetric

    return symmetric


@cache
def _few_sms_kernels() -> Any:
    from vllm_npu.transport.kernels import symmetric_on_few_sms

    return symmetric_on_few_sms


@cache
def _take_kernels() -> Any:
    from vllm_npu.transport.kernels import symmetric_take

    return symmetric_take


@cache
def _fp8_kernels() -> Any:
    from vllm_npu.transport.kernels import symmetric_fp8

    return symmetric_fp8


@cache
def _permute_kernels() -> Any:
    from vllm_npu.transport.kernels import permute

    return permute
