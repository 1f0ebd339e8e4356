"""How the symmetric kernels are launched: the number of programs (thread blocks) for a row, and the kernels' arguments.

The thresholds below are measured (docs/benchmarks).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from vllm_npu.core.token_layout import ceil_div
from vllm_npu.errors import InvalidInputError
from vllm_npu.strategies.dispatch.symmetric_layout import WORD_BYTES, SlotLayout
from vllm_npu.transport.kernels.launch import PreparedLaunch
from vllm_npu.transport.symmetric_memory import SymmetricWindows

SPLIT_MAX_TOKENS = 16  # up to this number of tokens, small programs share each row, so that more of the GPU takes part
SPLIT_BYTES = 2048  # bytes of a row that one program moves in that case
WHOLE_BYTES = 16384  # bytes of a row that one program moves otherwise: each program costs a fence over the link
FULL_TOKENS = 1024  # up to this number of tokens, 16 warps in a program are faster than 8, or as fast
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
    """How programs share the rows: `parts` programs move one row, each of them `tile` units of it."""

    parts: int
    tile: int
    num_warps: int

    @classmethod
    def of(cls, num_tokens: int, row_bytes: int, unit_bytes: int) -> "LaunchShape":
        """The shape for num_tokens rows of row_bytes / unit_bytes units. Equal on all ranks."""
        split = num_tokens <= SPLIT_MAX_TOKENS
        units = ceil_div(row_bytes, unit_bytes)
        tile = min((SPLIT_BYTES if split else WHOLE_BYTES) // unit_bytes, power_of_two(units))
        num_warps = 4 if split else 16 if num_tokens <= FULL_TOKENS else 8
        return cls(parts=ceil_div(units, tile), tile=tile, num_warps=num_warps)


def programs_for(max_tokens: int, row_bytes: int) -> int:
    """The most programs that LaunchShape gives to any step of up to max_tokens rows of up to row_bytes."""
    split = ceil_div(row_bytes, SPLIT_BYTES) * min(max_tokens, SPLIT_MAX_TOKENS)
    return max(split, ceil_div(row_bytes, WHOLE_BYTES) * max_tokens)


def dispatch_launches(
    windows: SymmetricWindows, layout: SlotLayout, num_tokens: int, experts_per_rank: int, *, has_mask: bool
) -> tuple[PreparedLaunch, ...]:
    """dispatch_kernel for each window. Empty: there is nothing to move."""
    kernels = _exchange_kernels()
    return _exchange_launches(
        kernels.dispatch_kernel,
        windows,
        layout,
        num_tokens,
        experts_per_rank,
        row_bytes=layout.row_bytes,
        unit_bytes=WORD_BYTES,
        offsets=(layout.scales_offset, layout.weights_offset, layout.ids_offset, windows.dispatch_flags_offset),
        sizes={
            "HIDDEN_WORDS": layout.row_bytes // WORD_BYTES,
            "SCALE_WORDS": layout.scale_width,
            "SCALE_WORDS_PADDED": power_of_two(layout.scale_width),
        },
        has_mask=has_mask,
        stage=kernels.DISPATCH_STAGE,
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
) -> tuple[PreparedLaunch, ...]:
    """combine_kernel for each window. Empty: there is nothing to move."""
    kernels = _exchange_kernels()
    return _exchange_launches(
        kernels.combine_kernel,
        windows,
        layout,
        num_tokens,
        experts_per_rank,
        row_bytes=width * element_size,
        unit_bytes=element_size,
        offsets=(layout.ids_offset, windows.returned_offset, windows.combine_flags_offset),
        sizes={"WIDTH": width},
        has_mask=has_mask,
        stage=kernels.COMBINE_STAGE,
    )


def _exchange_launches(
    kernel: Any,
    windows: SymmetricWindows,
    layout: SlotLayout,
    num_tokens: int,
    experts_per_rank: int,
    *,
    row_bytes: int,
    unit_bytes: int,
    offsets: Sequence[int],  # of this kernel's parts in a window, the flags last
    sizes: dict[str, int],  # this kernel's own constants, which stand before those of both kernels
    has_mask: bool,
    stage: int,
) -> tuple[PreparedLaunch, ...]:
    if not num_tokens or not row_bytes:
        return ()
    shape = LaunchShape.of(num_tokens, row_bytes, unit_bytes)
    num_programs = num_tokens * shape.parts
    if num_programs > windows.size.rank_flags:
        raise InvalidInputError(
            f"{num_tokens} rows of {row_bytes} bytes need {num_programs} flags, the windows hold "
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
        "PARTS": shape.parts,
        "TILE": shape.tile,
        "STAGE": stage,
        "DEPENDENT_LAUNCH": starts_early,
    }
    return tuple(
        PreparedLaunch(
            kernel, num_programs, fixed, numbers, constants, num_warps=shape.num_warps, launch_pdl=starts_early
        )
        for fixed in windows.kernel_tensors
    )


def weighted_sum(
    rows: torch.Tensor,  # [any, width]
    positions: torch.Tensor,  # [num_slots, top_k] int64: the row of each (slot, k) pair
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
        _weighted_sum_kernel()[(num_slots, ceil_div(width, tile))](
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
def _exchange_kernels() -> Any:
    """The module of the two kernels. It needs Triton, and this file must be importable without."""
    from vllm_npu.transport.kernels import symmetric

    return symmetric


@cache
def _weighted_sum_kernel() -> Any:
    from vllm_npu.transport.kernels.permute import weighted_sum_kernel

    return weighted_sum_kernel
