"""NVLink symmetric memory: each rank writes its tokens into fixed slots of the other ranks' memory. One host, 2 to 8 GPUs.

source:       row + scales + weights + local ids --kernel--> slot (rank, token) of every rank that has one of its experts
destination:  experts on slots, weighted and summed there  --kernel--> source: sum over ranks

dispatch_slots and combine_slots are that, for experts that take slots: rows with expert ids, -1 where there is none (as vLLM's
fused experts do). dispatch and combine put a sort by expert around them, for experts that take expert-major rows.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch

from vllm_npu.core.handles import Handle, check_handle
from vllm_npu.core.limits import SYMMETRIC, QuantMode, SymmetricLimits
from vllm_npu.core.routing import check_topk
from vllm_npu.core.token_layout import ceil_div
from vllm_npu.device import ops_of
from vllm_npu.errors import InvalidInputError, UnsupportedConfigError
from vllm_npu.strategies.dispatch.base import Dispatched, Dispatcher, DispatchHandle, RoutedTokens
from vllm_npu.transport.base import Groups
from vllm_npu.transport.kernels.launch import PreparedLaunch
from vllm_npu.transport.symmetric_memory import (
    NUM_WINDOWS,
    SymmetricFacts,
    SymmetricWindows,
    WindowSize,
    align,
    close_windows,
    open_windows,
)

COMBINE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WORD = 4  # bytes: rows travel as words, whatever their dtype


WINDOW_MIN_BYTES = 8 << 20
"""Of each part, so that small tensors of any shape share the windows that the first one opened."""


def why_not_symmetric(
    facts: SymmetricFacts, *, tokens_per_rank: int, limits: SymmetricLimits = SYMMETRIC
) -> str | None:
    """Why symmetric memory cannot carry a step of this many rows on each rank, or None where it can.

    Pure, and equal on all ranks where the arguments are. The answer is a reason for the log beside the strategy taken instead.
    """
    if not facts.cuda:
        return "not every rank has a CUDA device of its own"
    if not facts.triton:
        return "Triton is not installed on every rank"
    if facts.num_ranks < 2:
        return "there is one rank only"
    if facts.num_ranks > limits.max_ep_size:
        return f"{facts.num_ranks} ranks are more than {limits.max_ep_size}"
    if facts.num_hosts > 1:
        return f"the ranks are on {facts.num_hosts} hosts"
    if not facts.peer_access:
        return "not every GPU can write every other GPU's memory"
    if tokens_per_rank > limits.max_tokens_per_rank:
        return f"{tokens_per_rank} tokens a rank are more than {limits.max_tokens_per_rank}"
    return None


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """Where the slots of one dispatch lie in a window: bytes, each part aligned. Equal on all ranks."""

    num_slots: int  # ep_size * num_tokens
    row_bytes: int
    scale_width: int  # float32 scales of a row; 0: none
    top_k: int

    @property
    def scales_offset(self) -> int:
        """Rows start at 0."""
        return align(self.num_slots * self.row_bytes)

    @property
    def weights_offset(self) -> int:
        """After the scales."""
        return self.scales_offset + align(self.num_slots * self.scale_width * 4)

    @property
    def ids_offset(self) -> int:
        """After the weights."""
        return self.weights_offset + align(self.num_slots * self.top_k * 4)

    @property
    def num_bytes(self) -> int:
        """All parts."""
        return self.ids_offset + align(self.num_slots * self.top_k * 4)


SPLIT_MAX_TOKENS = 16  # up to here a row is split over programs, so that more of the GPU takes part
SPLIT_BYTES = 2048  # of a row that a program moves then
WHOLE_BYTES = 16384  # of a row that a program moves else: each program costs a fence over the link
FULL_TOKENS = 1024  # up to here more threads to each program are faster, or no slower


@dataclass(frozen=True, slots=True)
class LaunchShape:
    """How programs share the rows: each moves `tile` units of one row. The thresholds are measured (docs/benchmarks)."""

    parts: int
    tile: int
    num_warps: int

    @classmethod
    def of(cls, num_tokens: int, row_bytes: int, unit_bytes: int) -> "LaunchShape":
        """The shape for rows of row_bytes / unit_bytes units. Pure, and equal on all ranks."""
        split = num_tokens <= SPLIT_MAX_TOKENS
        units = ceil_div(row_bytes, unit_bytes)
        tile = min((SPLIT_BYTES if split else WHOLE_BYTES) // unit_bytes, _power_of_two(units))
        num_warps = 4 if split else 16 if num_tokens <= FULL_TOKENS else 8
        return cls(parts=ceil_div(units, tile), tile=tile, num_warps=num_warps)


def programs_for(max_tokens: int, row_bytes: int) -> int:
    """The most programs that LaunchShape gives any number of tokens up to max_tokens, for rows of up to row_bytes."""
    split = ceil_div(row_bytes, SPLIT_BYTES) * min(max_tokens, SPLIT_MAX_TOKENS)
    return max(split, ceil_div(row_bytes, WHOLE_BYTES) * max_tokens)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """What all dispatches of tensors of the same shapes share: checked and worked out once, since host time counts."""

    windows: SymmetricWindows
    layout: SlotLayout
    num_tokens: int
    sent_bytes: int  # by a token that has an expert on every rank
    launches: tuple[PreparedLaunch, ...]  # for each window; empty: no tokens
    views: tuple[tuple[torch.Tensor, ...], ...]  # for each window: hidden_states, scales, weights, ids
    combines: dict[tuple[torch.Size, torch.dtype, bool], tuple[PreparedLaunch, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotHandle(Handle):
    """Returned by SymmetricDispatcher.dispatch_slots, consumed by its combine_slots. Holds the routing tensors, not copies."""

    window: int
    plan: SlotPlan = field(repr=False)
    topk_ids: torch.Tensor
    mask: torch.Tensor | None


class DispatchedSlots(NamedTuple):  # a fourth of a frozen dataclass's host time
    """Slot rank * num_tokens + t holds token t of that rank. Views of the window: read them before combine_slots."""

    hidden_states: torch.Tensor  # [ep_size * num_tokens, hidden_size]; empty slots are undefined
    scales: torch.Tensor | None  # [ep_size * num_tokens, scale_width] float32; empty slots are undefined
    topk_weights: torch.Tensor  # [ep_size * num_tokens, top_k] float32; 0 beside an id of -1
    topk_ids: torch.Tensor  # [ep_size * num_tokens, top_k] int32: local expert ids, -1 for experts of other ranks
    handle: SlotHandle


@dataclass(frozen=True, slots=True, kw_only=True)
class SymmetricHandle(DispatchHandle):
    """Returned by SymmetricDispatcher.dispatch, consumed by its combine."""

    slots: SlotHandle
    local_ids: torch.Tensor  # [num_slots, top_k] int32
    weights: torch.Tensor  # [num_slots, top_k] float32
    positions: torch.Tensor  # [num_slots, top_k] int64: expert-major row of each pair; undefined for ids of -1


class SymmetricDispatcher(Dispatcher):
    """Every rank must bring the same number of rows, as MC2PrepareAndFinalize does; mask leaves rows out.

    COLLECTIVE over ep, each way one kernel. Host sync: no. Graph capture: yes, once the windows are open. Two handles may be
    in flight, on one stream or two; all ranks dispatch and combine in the same order, and the kernels run in that order.
    Bytes sent: a row for each other rank that has one of the token's experts, and 8 * top_k for each other rank.
    A rank that stops makes the others' kernels end after the time-out with undefined output; check(), and the next dispatch or
    combine, then raise TransportError naming it.
    """

    def __init__(
        self,
        groups: Groups,
        num_experts: int,
        quant_mode: QuantMode = QuantMode.NONE,
        shared_expert_ranks: int = 0,  # none
        limits: SymmetricLimits = SYMMETRIC,
        timeout: float | None = None,  # seconds; None: VLLM_NPU_TRANSPORT_TIMEOUT. Counts when the windows are opened
    ) -> None:
        super().__init__(groups, num_experts, quant_mode, shared_expert_ranks)
        if not 2 <= groups.topology.ep_size <= limits.max_ep_size:
            raise UnsupportedConfigError(
                f"symmetric needs 2 <= ep_size <= {limits.max_ep_size} (got {groups.topology.ep_size}); use all2all or "
                "allgather"
            )
        self.limits = limits
        self._timeout = timeout
        self._windows: SymmetricWindows | None = None
        self._dependent_launch = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
        self._plans: dict[tuple[Any, ...], SlotPlan] = {}

    def open(
        self,
        *,
        row_bytes: int,  # of a row of hidden_states
        top_k: int,
        scale_width: int = 0,
        returned_row_bytes: int | None = None,  # of combine; None: row_bytes, twice that where rows have scales
    ) -> int:
        """Open the group's windows for limits.max_tokens_per_rank rows of these sizes, or find them open.

        COLLECTIVE when called first for the group; dispatch does it with its own tensors' sizes. Returns the bytes of GPU
        memory that the windows take on this rank. Raises TransportError where memory cannot be shared, and
        UnsupportedConfigError where the group has smaller windows, or a graph is being captured.
        """
        max_tokens = self.limits.max_tokens_per_rank
        num_slots = self.placement.ep_size * max_tokens
        if returned_row_bytes is None:
            returned_row_bytes = 2 * row_bytes if scale_width else row_bytes
        self._windows = open_windows(
            self.groups.ep,
            WindowSize(
                received_bytes=max(SlotLayout(num_slots, row_bytes, scale_width, top_k).num_bytes, WINDOW_MIN_BYTES),
                returned_bytes=max(num_slots * returned_row_bytes, WINDOW_MIN_BYTES),
                rank_flags=programs_for(max_tokens, max(row_bytes, returned_row_bytes)),
            ),
            self._timeout,
        )
        return self._windows.bytes_per_rank

    def close(self) -> None:
        """Release the group's windows, for all dispatchers that share them. LOCAL; no handle may be in flight."""
        self._windows = None
        self._plans.clear()
        close_windows(self.groups.ep)

    def check(self) -> None:
        """Raise TransportError where a rank missed the time-out. LOCAL. Host sync: no; synchronize first to be certain.

        For callers that replay graphs: dispatch and combine call it themselves.
        """
        if self._windows is not None:
            self._windows.check("exchange")

    def dispatch_slots(
        self,
        hidden_states: torch.Tensor,  # [num_tokens, hidden_size], any dtype, rows of a multiple of 4 bytes
        topk_weights: torch.Tensor,  # [num_tokens, top_k] float32
        topk_ids: torch.Tensor,  # [num_tokens, top_k] int32 or int64, global expert ids; -1: no expert
        mask: torch.Tensor | None = None,  # [num_tokens] bool; False: goes nowhere
        scales: torch.Tensor | None = None,  # [num_tokens, scale_width] float32, travel with their rows
    ) -> DispatchedSlots:
        """Send each token once to each rank that has one of its experts. COLLECTIVE over ep: one kernel. Host sync: no."""
        key = (
            hidden_states.is_cuda,
            hidden_states.shape,
            hidden_states.dtype,
            topk_weights.shape,
            topk_weights.dtype,
            topk_ids.shape,
            topk_ids.dtype,
            None if mask is None else (mask.shape, mask.dtype),
            None if scales is None else (scales.shape, scales.dtype),
        )
        plan = self._plans.get(key)
        if plan is None:
            check_topk(hidden_states, topk_weights, topk_ids, self.placement.num_experts, mask)
            plan = self._plans[key] = self._plan(hidden_states, topk_weights, topk_ids, mask, scales)
        windows = plan.windows
        windows.check("dispatch")
        topk_ids = topk_ids.contiguous()
        window = windows.take()
        stream = windows.enter()
        self.groups.ep.note_op("dispatch", plan.num_tokens * plan.sent_bytes)
        if plan.launches:
            tensors = (
                hidden_states.contiguous(),
                None if scales is None else scales.contiguous(),
                topk_weights.contiguous(),
                topk_ids,
                mask,
            )
            plan.launches[window](tensors, stream)
        rows, row_scales, weights, ids = plan.views[window]
        return DispatchedSlots(
            hidden_states=rows,
            scales=None if scales is None else row_scales,
            topk_weights=weights,
            topk_ids=ids,
            handle=SlotHandle(window=window, plan=plan, topk_ids=topk_ids, mask=mask),
        )

    def combine_slots(
        self,
        slot_output: torch.Tensor,  # [ep_size * num_tokens, width]: weighted sums of the local experts; empty slots unused
        handle: SlotHandle,
    ) -> torch.Tensor:  # [num_tokens, width], dtype of slot_output; zeros for a token that went nowhere
        """Send each filled slot's row back and add them up, float32, ranks ascending: the same bits in every run.

        COLLECTIVE over ep: one kernel. Host sync: no. slot_output may lie anywhere; it is read, not kept.
        """
        handle = check_handle(handle, SlotHandle, "SymmetricDispatcher.combine_slots")
        plan = handle.plan
        windows = plan.windows
        key = (slot_output.shape, slot_output.dtype, handle.mask is None)
        launches = plan.combines.get(key)
        if launches is None:
            launches = plan.combines[key] = self._plan_combine(slot_output, handle)
        windows.check("combine")
        handle.spend("SymmetricDispatcher.combine_slots")
        others = self.placement.ep_size - 1
        self.groups.ep.note_op("combine", plan.num_tokens * others * slot_output.shape[1] * slot_output.element_size())
        output = slot_output.new_empty((plan.num_tokens, slot_output.shape[1]))
        stream = windows.enter()
        if launches:
            tensors = (output, slot_output.contiguous(), handle.topk_ids, handle.mask)
            launches[handle.window](tensors, stream)
        windows.give_back(handle.window)
        return output

    def dispatch(self, tokens: RoutedTokens) -> Dispatched:
        """dispatch_slots, then the rows sorted by expert. expert_input has room for every pair that could be local:
        num_slots * min(top_k, experts_per_rank) rows. Host sync: no. Graph capture: yes."""
        if tokens.max_rows is not None:
            raise InvalidInputError("symmetric needs as many rows on every rank; pad to max_rows and pass a mask")
        hidden_states, scales = tokens.hidden_states, None
        if self.quant_mode is not QuantMode.NONE:
            hidden_states, scales = ops_of(hidden_states).npu_dynamic_quant(hidden_states)
        slots = self.dispatch_slots(hidden_states, tokens.topk_weights, tokens.topk_ids, tokens.mask, scales)
        experts_per_rank, top_k = self.placement.experts_per_rank, slots.topk_ids.shape[1]
        pair_experts = torch.where(slots.topk_ids < 0, experts_per_rank, slots.topk_ids).flatten()
        order = pair_experts.argsort(stable=True)
        positions = torch.empty_like(order)
        positions[order] = torch.arange(order.numel(), device=order.device)
        expert_rows = slots.topk_ids.shape[0] * min(top_k, experts_per_rank)
        counts = torch.zeros(experts_per_rank + 1, dtype=torch.int64, device=order.device)
        counts.scatter_add_(0, pair_experts.long(), torch.ones_like(order))
        sources = order[:expert_rows] // top_k
        return Dispatched(
            expert_input=slots.hidden_states[sources],
            tokens_per_expert=counts[:experts_per_rank],
            dynamic_scales=None if slots.scales is None else slots.scales[sources, 0],
            handle=SymmetricHandle(
                expert_rows=expert_rows,
                slots=slots.handle,
                local_ids=slots.topk_ids,
                weights=slots.topk_weights,
                positions=positions.view_as(slots.topk_ids),
            ),
        )

    def combine(self, expert_output: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """The experts' rows weighted and summed for each slot, then combine_slots. Rows past the experts' are not read."""
        handle = check_handle(handle, SymmetricHandle, "SymmetricDispatcher.combine")
        self._check_combine(expert_output, handle)
        num_slots, width = handle.slots.plan.layout.num_slots, expert_output.shape[1]
        slot_output = expert_output.new_empty((num_slots, width))
        if num_slots and width:
            tile = min(1024, _power_of_two(width))
            _weighted_sum_kernel()[(num_slots, ceil_div(width, tile))](
                slot_output,
                expert_output.contiguous(),
                handle.positions,
                handle.local_ids,
                handle.weights,
                WIDTH=width,
                TOP_K=handle.slots.plan.layout.top_k,
                TILE=tile,
            )
        return self.combine_slots(slot_output, handle.slots)

    def _plan(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        mask: torch.Tensor | None,
        scales: torch.Tensor | None,
    ) -> SlotPlan:
        """Check what check_topk does not, open the windows where they are not, and lay out the slots."""
        num_tokens, top_k = topk_ids.shape
        row_bytes = hidden_states.shape[1] * hidden_states.element_size()
        ep_size = self.placement.ep_size
        if num_tokens > self.limits.max_tokens_per_rank:
            raise InvalidInputError(
                f"{num_tokens} rows on rank {self.groups.topology.ep_rank}, the windows take "
                f"{self.limits.max_tokens_per_rank}; raise SymmetricLimits.max_tokens_per_rank or use all2all"
            )
        if not hidden_states.is_cuda:
            raise InvalidInputError(f"hidden_states is on {hidden_states.device}; symmetric memory moves CUDA tensors")
        if row_bytes % WORD:
            raise InvalidInputError(f"a row of hidden_states takes {row_bytes} bytes; it must be a multiple of {WORD}")
        if topk_weights.dtype is not torch.float32:
            raise InvalidInputError(f"topk_weights is {topk_weights.dtype}; it must be float32")
        if mask is not None and (mask.shape != (num_tokens,) or mask.dtype is not torch.bool):
            raise InvalidInputError(f"mask is {mask.dtype} {tuple(mask.shape)}; it must be bool [{num_tokens}]")
        if scales is not None and (
            scales.dim() != 2 or scales.shape[0] != num_tokens or scales.dtype is not torch.float32
        ):
            raise InvalidInputError(
                f"scales is {scales.dtype} {tuple(scales.shape)}; it must be float32 [{num_tokens}, scale_width], one row "
                "for each row of hidden_states"
            )
        layout = SlotLayout(ep_size * num_tokens, row_bytes, 0 if scales is None else scales.shape[1], top_k)
        if self._windows is None:
            self.open(row_bytes=row_bytes, top_k=top_k, scale_width=layout.scale_width)
        windows = self._windows
        if windows is None or layout.num_bytes > windows.size.received_bytes:
            raise InvalidInputError(
                f"{layout} takes {layout.num_bytes} bytes, more than the windows hold; call open() for the widest rows "
                "before the first dispatch"
            )
        shape = _shape(windows, num_tokens, row_bytes, WORD)
        kernels = _kernels()
        launches = _launches(
            windows,
            kernels.dispatch_kernel,
            num_tokens * shape.parts,
            (
                windows.report_address,
                num_tokens,
                windows.rank,
                self.placement.experts_per_rank,
                windows.timeout_ns,
                layout.scales_offset,
                layout.weights_offset,
                layout.ids_offset,
                windows.dispatch_flags_offset,
                windows.size.rank_flags,
            ),
            {
                "HIDDEN_WORDS": row_bytes // WORD,
                "SCALE_WORDS": layout.scale_width,
                "SCALE_WORDS_PADDED": _power_of_two(layout.scale_width),
                "TOP_K": top_k,
                "TOP_K_PADDED": _power_of_two(top_k),
                "EP_SIZE": ep_size,
                "EP_SIZE_PADDED": _power_of_two(ep_size),
                "HAS_MASK": mask is not None,
                "PARTS": shape.parts,
                "TILE": shape.tile,
                "STAGE": kernels.DISPATCH_STAGE,
                "DEPENDENT_LAUNCH": self._dependent_launch,
            },
            num_warps=shape.num_warps,
            launch_pdl=self._dependent_launch,
        )
        return SlotPlan(
            windows=windows,
            layout=layout,
            num_tokens=num_tokens,
            sent_bytes=(ep_size - 1) * (row_bytes + 4 * layout.scale_width + 8 * top_k),
            launches=launches if num_tokens else (),
            views=tuple(
                _slot_views(windows.bytes_of(window), layout, hidden_states.dtype) for window in range(NUM_WINDOWS)
            ),
        )

    def _plan_combine(self, slot_output: torch.Tensor, handle: SlotHandle) -> tuple[PreparedLaunch, ...]:
        """Check slot_output, and prepare the kernel for it in each window. Empty: there is nothing to move."""
        plan, windows = handle.plan, handle.plan.windows
        layout = plan.layout
        if slot_output.dim() != 2 or slot_output.shape[0] != layout.num_slots:
            raise InvalidInputError(
                f"slot_output has shape {tuple(slot_output.shape)}; SymmetricDispatcher.combine_slots needs "
                f"[{layout.num_slots}, width], a row for each slot"
            )
        if slot_output.dtype not in COMBINE_DTYPES:
            raise InvalidInputError(f"slot_output is {slot_output.dtype}; it must be one of {COMBINE_DTYPES}")
        if slot_output.nbytes > windows.size.returned_bytes:
            raise InvalidInputError(
                f"slot_output takes {slot_output.nbytes} bytes, the windows hold {windows.size.returned_bytes}; call "
                "open(returned_row_bytes=...) before the first dispatch"
            )
        width = slot_output.shape[1]
        if not plan.num_tokens or not width:
            return ()
        ep_size = self.placement.ep_size
        shape = _shape(windows, plan.num_tokens, width * slot_output.element_size(), slot_output.element_size())
        kernels = _kernels()
        return _launches(
            windows,
            kernels.combine_kernel,
            plan.num_tokens * shape.parts,
            (
                windows.report_address,
                plan.num_tokens,
                windows.rank,
                self.placement.experts_per_rank,
                windows.timeout_ns,
                layout.ids_offset,
                windows.returned_offset,
                windows.combine_flags_offset,
                windows.size.rank_flags,
            ),
            {
                "WIDTH": width,
                "TOP_K": layout.top_k,
                "TOP_K_PADDED": _power_of_two(layout.top_k),
                "EP_SIZE": ep_size,
                "EP_SIZE_PADDED": _power_of_two(ep_size),
                "HAS_MASK": handle.mask is not None,
                "PARTS": shape.parts,
                "TILE": shape.tile,
                "STAGE": kernels.COMBINE_STAGE,
                "DEPENDENT_LAUNCH": self._dependent_launch,
            },
            num_warps=shape.num_warps,
            launch_pdl=self._dependent_launch,
        )


def _slot_views(memory: torch.Tensor, layout: SlotLayout, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """hidden_states, scales, weights and ids of the slots, as views of one window's bytes."""
    parts = (
        (0, layout.row_bytes, dtype),
        (layout.scales_offset, layout.scale_width * 4, torch.float32),
        (layout.weights_offset, layout.top_k * 4, torch.float32),
        (layout.ids_offset, layout.top_k * 4, torch.int32),
    )
    return tuple(
        memory[offset : offset + layout.num_slots * row_bytes]
        .view(part_dtype)
        .view(layout.num_slots, row_bytes // part_dtype.itemsize)
        for offset, row_bytes, part_dtype in parts
    )


def _launches(
    windows: SymmetricWindows,
    kernel: Any,
    num_programs: int,
    numbers: tuple[int, ...],
    constants: dict[str, int | bool],
    **options: int | bool,
) -> tuple[PreparedLaunch, ...]:
    """One launch for each window."""
    return tuple(
        PreparedLaunch(kernel, num_programs, fixed, numbers, constants, **options) for fixed in windows.kernel_tensors
    )


def _shape(windows: SymmetricWindows, num_tokens: int, row_bytes: int, unit_bytes: int) -> LaunchShape:
    shape = LaunchShape.of(num_tokens, row_bytes, unit_bytes)
    if num_tokens * shape.parts > windows.size.rank_flags:
        raise InvalidInputError(
            f"{num_tokens} rows of {row_bytes} bytes need {num_tokens * shape.parts} flags, the windows hold "
            f"{windows.size.rank_flags}; call open() for the widest rows before the first dispatch"
        )
    return shape


@cache
def _kernels() -> Any:
    """The module of the exchange's kernels: imported late, so that this file can be read where Triton is missing."""
    from vllm_npu.transport.kernels import symmetric

    return symmetric


@cache
def _weighted_sum_kernel() -> Any:
    from vllm_npu.transport.kernels.permute import weighted_sum_kernel

    return weighted_sum_kernel
