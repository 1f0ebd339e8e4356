"""Dispatch and combine over NVLink symmetric memory, for 2 to 8 GPUs of one host.

Each rank writes its tokens into fixed slots of the other ranks' memory:

source:       row + scales + weights + local ids  --dispatch kernel-->  slot (rank, token) of every rank with one of its experts
destination:  experts, weighted sum for each slot  --combine kernel-->  source: sum over ranks

Experts that write into combine_input leave their rows in the window, and the sources take them from there: one copy less, and
no wait for rows to arrive before a flag can be set.

dispatch_slots and combine_slots do this alone. They are for experts that take slots: rows with expert ids, of which -1
means no expert. vLLM's fused experts take such rows. dispatch also sorts the rows by expert, in two kernels more, for experts
that take expert-major rows. combine then reads these rows itself.
"""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, NamedTuple

import torch

from vllm_npu.core.handles import Handle, check_handle
from vllm_npu.core.limits import SYMMETRIC, QuantMode, SymmetricLimits
from vllm_npu.core.routing import check_topk
from vllm_npu.core.token_layout import check_rows
from vllm_npu.device import ops_of
from vllm_npu.errors import InvalidInputError, UnsupportedConfigError
from vllm_npu.strategies.dispatch.base import Dispatched, Dispatcher, DispatchHandle, RoutedTokens
from vllm_npu.strategies.dispatch.rows_with_ids import RowsWithIds
from vllm_npu.strategies.dispatch.symmetric_launch import (
    SortLaunches,
    check_device,
    combine_launches,
    dispatch_launches,
    programs_for,
    sort_launches,
    take_launches,
    weighted_sum,
)
from vllm_npu.strategies.dispatch.symmetric_layout import FP8_GROUP, WORD_BYTES, SlotLayout
from vllm_npu.transport.base import Groups
from vllm_npu.transport.kernels.launch import PreparedLaunch
from vllm_npu.transport.symmetric_memory import NUM_WINDOWS, SymmetricWindows, WindowSize, close_windows, open_windows

COMBINE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

TAKE_MAX_TOKENS = 2048
"""Tokens of a rank up to which combine out of windows is faster than a combine that sends
(docs/benchmarks/2026-11-29-exchange-2xH200.md)."""

WINDOW_MIN_BYTES = 8 << 20
"""The smallest size of the received and of the returned part of a window. Layers with small rows of different widths can then
share the windows that the first of them opened."""


class Rows(Enum):
    """What the experts' rows are that combine gets."""

    SLOTS = auto()  # a row for each slot
    SLOTS_IN_WINDOW = auto()  # the same, in combine_input
    SORTED = auto()  # rows sorted by expert


@dataclass(slots=True, eq=False)
class SlotPlan:
    """What all dispatches with tensors of the same shapes share. It is made once, since each check costs host time."""

    windows: SymmetricWindows
    layout: SlotLayout
    num_tokens: int
    global_ids: bool
    max_sms: int | None
    sent_bytes: int  # by a token that has an expert on every rank
    launches: tuple[PreparedLaunch, ...]  # for each window; empty: no tokens
    views: tuple[tuple[torch.Tensor, ...], ...]  # for each window: hidden_states, scales, weights, ids
    sorts: tuple[SortLaunches, ...]  # for each window; empty: no slots, or global ids
    combines: dict[tuple[int, torch.Size, torch.dtype, "Rows"], tuple[PreparedLaunch, ...]] = field(
        default_factory=dict
    )
    """Launches of combine by the device, shape and dtype of the experts' rows, and what these are. Filled by combine_slots and
    combine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotHandle(Handle):
    """Returned by SymmetricDispatcher.dispatch_slots, consumed by its combine_slots. Holds the routing tensors, not copies."""

    window: int
    plan: SlotPlan = field(repr=False)
    topk_ids: torch.Tensor
    mask: torch.Tensor | None


class DispatchedSlots(NamedTuple):  # a named tuple takes a fourth of a frozen dataclass's host time
    """Slot rank * num_tokens + t holds token t of that rank. The tensors are views of the window: read them before
    combine_slots."""

    hidden_states: torch.Tensor  # [ep_size * num_tokens, hidden_size]; empty slots are undefined
    scales: torch.Tensor | None  # [ep_size * num_tokens, scale_width] float32; empty slots are undefined
    topk_weights: torch.Tensor  # [ep_size * num_tokens, top_k] float32; 0 beside an id of -1
    topk_ids: torch.Tensor
    """[ep_size * num_tokens, top_k] int32: local expert ids, and -1 for experts of other ranks. With global_ids: global ids,
    and an expert of another rank in place of -1."""

    handle: SlotHandle


@dataclass(frozen=True, slots=True, kw_only=True)
class SymmetricHandle(DispatchHandle):
    """Returned by SymmetricDispatcher.dispatch, consumed by its combine."""

    slots: SlotHandle
    local_ids: torch.Tensor  # [num_slots, top_k] int32
    weights: torch.Tensor  # [num_slots, top_k] float32
    positions: torch.Tensor  # [num_slots, top_k] int32: expert-major row of each pair; undefined for ids of -1


class SymmetricDispatcher(Dispatcher):
    """Every rank must bring the same number of rows, as EvenPrepareAndFinalize does. A mask leaves rows out.

    COLLECTIVE over ep, one kernel each way. Host sync: no. Graph capture: yes, once the windows are open. Two handles may be
    in flight, on one stream or on two. All ranks must dispatch and combine in the same order; the kernels run in that order.
    Bytes sent: a row for each other rank that has one of the token's experts, and 8 * top_k for each other rank.
    When a rank stops, the kernels of the others end after the deadline with undefined output. check_failed(), and the next
    dispatch or combine, then raise TransportError with the rank's number, on all ranks.

    A dispatch holds one of the two windows until its combine. Run the experts and combine inside `scope`, so that an error
    gives the window back.
    """

    max_extra_tensors = 1

    def __init__(
        self,
        groups: Groups,
        num_experts: int,
        quant_mode: QuantMode = QuantMode.NONE,
        limits: SymmetricLimits = SYMMETRIC,
        timeout: float | None = None,  # seconds, for windows that this object opens; None: as open_windows says
        max_sms: int | None = None,
    ) -> None:
        super().__init__(groups, num_experts, quant_mode)
        if not 2 <= groups.topology.ep_size <= limits.max_ep_size:
            raise UnsupportedConfigError(
                f"symmetric needs 2 <= ep_size <= {limits.max_ep_size} (got {groups.topology.ep_size}); use all2all or "
                "allgather"
            )
        self.limits = limits
        self.max_sms = max_sms
        self._timeout = timeout
        self._windows: SymmetricWindows | None = None
        self._plans: dict[tuple[Any, ...], SlotPlan] = {}

    def open(
        self,
        *,
        row_bytes: int,  # of a row of hidden_states
        top_k: int,
        scale_width: int = 0,
        returned_row_bytes: int | None = None,  # of combine; None: row_bytes, or twice that for rows with scales
    ) -> int:
        """Open the group's windows for limits.max_tokens_per_rank rows of these sizes, unless they are open already.

        COLLECTIVE when called first for the group. The first dispatch calls it with the sizes of its own tensors. Returns the
        bytes of GPU memory that the windows take on this rank. Raises TransportError where memory cannot be shared, and
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

    def check_failed(self) -> None:
        """Raise TransportError where a rank missed the deadline. LOCAL. Host sync: no, it reads host memory.

        dispatch and combine make this check themselves, for the kernels that have ended by then.
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
        global_ids: bool = False,  # of DispatchedSlots.topk_ids. Equal on all ranks
        use_fp8: bool = False,  # rows travel as float8_e4m3fn with a scale for each FP8_GROUP columns. Equal on all ranks
    ) -> DispatchedSlots:
        """Send each token once to each rank that has one of its experts. COLLECTIVE over ep: one kernel. Host sync: no.

        With use_fp8 this kernel casts the rows itself: a group's scale is its largest magnitude, but at least 1e-10, over 448,
        and its columns are multiplied by the inverse. vLLM's own kernel divides them, which may round otherwise.
        """
        key = (
            global_ids,
            use_fp8,
            self.max_sms,
            hidden_states.get_device(),
            hidden_states.shape,
            hidden_states.dtype,
            topk_weights.get_device(),
            topk_weights.shape,
            topk_weights.dtype,
            topk_ids.get_device(),
            topk_ids.shape,
            topk_ids.dtype,
            None if mask is None else (mask.get_device(), mask.shape, mask.dtype),
            None if scales is None else (scales.get_device(), scales.shape, scales.dtype),
        )
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._plan(
                hidden_states, topk_weights, topk_ids, mask, scales, global_ids, use_fp8
            )
        windows = plan.windows
        windows.check("dispatch")
        # The kernels take addresses. combine reads ids and mask again.
        topk_ids = topk_ids.contiguous()
        mask = None if mask is None else mask.contiguous()
        tensors = (
            hidden_states.contiguous(),
            None if scales is None else scales.contiguous(),
            topk_weights.contiguous(),
            topk_ids,
            mask,
        )
        self.groups.ep.note_op("dispatch", plan.num_tokens * plan.sent_bytes)
        window = windows.take()
        try:
            stream = windows.enter()
            if plan.launches:
                plan.launches[window](tensors, stream)
        except BaseException:
            windows.abandon(window)
            raise
        rows, row_scales, weights, ids = plan.views[window]
        return DispatchedSlots(
            hidden_states=rows,
            scales=None if scales is None and not use_fp8 else row_scales,
            topk_weights=weights,
            topk_ids=ids,
            handle=SlotHandle(window=window, plan=plan, topk_ids=topk_ids, mask=mask),
        )

    def combine_input(self, handle: SlotHandle, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory of the window for the experts' rows: [ep_size * num_tokens, width]. LOCAL. Host sync: no.

        Where combine_slots gets this tensor, it sends nothing: each rank takes its tokens' rows out of the others' windows.
        In a step, all ranks give this tensor to combine_slots, or none does; otherwise they fail after the deadline. Write it
        between the dispatch and the combine of `handle`. Raises InvalidInputError for rows that combine_slots would refuse.
        """
        handle = check_handle(handle, SlotHandle, "SymmetricDispatcher.combine_input")
        windows, num_slots = handle.plan.windows, handle.plan.layout.num_slots
        self._check_returned(dtype, (num_slots, width), windows)
        start = windows.returned_offset
        memory = windows.bytes_of(handle.window)[start : start + num_slots * width * dtype.itemsize]
        return memory.view(dtype).view(num_slots, width)

    def combine_slots(
        self,
        slot_output: torch.Tensor,  # [ep_size * num_tokens, width]: weighted sums of the local experts; empty slots unused
        handle: SlotHandle,
        output: torch.Tensor | None = None,  # [num_tokens, width], contiguous, dtype of slot_output
    ) -> torch.Tensor:  # [num_tokens, width], dtype of slot_output; zeros for a token that went nowhere
        """Send each filled slot's row back and add the rows up, float32, ranks ascending: the same bits in every run.

        COLLECTIVE over ep: one kernel. Host sync: no. slot_output is read, not kept. `output` is written and returned where it
        is given. A refused tensor (InvalidInputError) leaves the handle usable. Any other error gives the window back.
        """
        handle = check_handle(handle, SlotHandle, "SymmetricDispatcher.combine_slots")
        in_window = slot_output.data_ptr() == handle.plan.windows.returned_address(handle.window)
        return self._combine(slot_output, handle, Rows.SLOTS_IN_WINDOW if in_window else Rows.SLOTS, output=output)

    def _combine(
        self,
        rows: torch.Tensor,
        handle: SlotHandle,
        kind: Rows,
        *,
        positions: torch.Tensor | None = None,  # [num_slots, top_k] int32, of expert-major rows
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        plan = handle.plan
        windows = plan.windows
        key = (rows.get_device(), rows.shape, rows.dtype, kind)
        launches = plan.combines.get(key)
        if launches is None:
            launches = plan.combines[key] = self._plan_combine(rows, handle, kind)
        if output is not None:
            _check_output(output, plan.num_tokens, rows)
        handle.spend("SymmetricDispatcher.combine_slots")
        try:
            windows.check("combine")
            others = self.placement.ep_size - 1
            self.groups.ep.note_op("combine", plan.num_tokens * others * rows.shape[1] * rows.element_size())
            if output is None:
                output = rows.new_empty((plan.num_tokens, rows.shape[1]))
            routing = (handle.topk_ids, handle.mask)
            taken = kind is Rows.SLOTS_IN_WINDOW
            tensors = (output, *routing) if taken else (output, rows.contiguous(), positions, *routing)
            stream = windows.enter()
            if launches:
                launches[handle.window](tensors, stream)
        except BaseException:
            windows.abandon(handle.window)
            raise
        windows.give_back(handle.window)
        return output

    def dispatch_with_ids(
        self, tokens: RoutedTokens, extra_tensors: tuple[torch.Tensor, ...] = ()
    ) -> tuple[RowsWithIds, Handle]:
        """dispatch_slots, with global ids. An extra tensor is float32 scales. All tensors are views of the window: read them
        before combine_with_ids, and do not write them."""
        slots = self.dispatch_slots(
            tokens.hidden_states,
            tokens.topk_weights,
            tokens.topk_ids,
            tokens.mask,
            extra_tensors[0] if extra_tensors else None,
            global_ids=True,
        )
        scales = () if slots.scales is None else (slots.scales,)
        return RowsWithIds(slots.hidden_states, slots.topk_weights, slots.topk_ids, scales), slots.handle

    def combine_with_ids(
        self, expert_output: torch.Tensor, handle: Handle, output: torch.Tensor | None = None
    ) -> torch.Tensor:
        """combine_slots."""
        handle = check_handle(handle, SlotHandle, "SymmetricDispatcher.combine_with_ids")
        return self.combine_slots(expert_output, handle, output)

    def combine_input_with_ids(self, handle: Handle, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """combine_input, in steps of up to TAKE_MAX_TOKENS. In larger ones, sending the rows takes as long or less."""
        handle = check_handle(handle, SlotHandle, "SymmetricDispatcher.combine_input_with_ids")
        plan = handle.plan
        if plan.num_tokens > TAKE_MAX_TOKENS or len(shape) != 2 or shape[0] != plan.layout.num_slots:
            return None
        if _why_not_returned(dtype, (shape[0], shape[1]), plan.windows) is not None:
            return None
        return self.combine_input(handle, shape[1], dtype)

    def dispatch(self, tokens: RoutedTokens) -> Dispatched:
        """dispatch_slots, then sort the rows by expert in two kernels. Host sync: no. Graph capture: yes.

        expert_input has num_slots * top_k rows, which is room for every pair that could be local.
        """
        if tokens.max_rows is not None:
            raise InvalidInputError("symmetric needs as many rows on every rank; pad to max_rows and pass a mask")
        hidden_states, scales = tokens.hidden_states, None
        if self.quant_mode is not QuantMode.NONE:
            hidden_states, scales = ops_of(hidden_states).npu_dynamic_quant(hidden_states)
        slots = self.dispatch_slots(hidden_states, tokens.topk_weights, tokens.topk_ids, tokens.mask, scales)
        with self.scope(slots.handle):
            return self._sorted_by_expert(slots)

    def _sorted_by_expert(self, slots: DispatchedSlots) -> Dispatched:
        plan, window = slots.handle.plan, slots.handle.window
        num_rows = slots.topk_ids.numel()
        hidden_states, device = slots.hidden_states, slots.hidden_states.device
        expert_input = hidden_states.new_empty((num_rows, hidden_states.shape[1]))
        scales = None if slots.scales is None else slots.scales.new_empty(num_rows)
        positions = torch.empty_like(slots.topk_ids)
        experts_per_rank = self.placement.experts_per_rank
        if plan.sorts:
            counts = torch.empty(experts_per_rank, dtype=torch.int64, device=device)
            plan.sorts[window](expert_input, scales, positions, counts, plan.windows.enter())
        else:
            counts = torch.zeros(experts_per_rank, dtype=torch.int64, device=device)
        return Dispatched(
            expert_input=expert_input,
            tokens_per_expert=counts,
            dynamic_scales=scales,
            handle=SymmetricHandle(
                rows=num_rows,
                slots=slots.handle,
                local_ids=slots.topk_ids,
                weights=slots.topk_weights,
                positions=positions,
            ),
        )

    def combine(self, expert_output: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """combine_slots of each slot's weighted sum of the experts' rows. Rows past the experts' own are not read.

        One kernel. With max_sms: a kernel on all multiprocessors makes the sums before.
        """
        handle = self._consume(handle, SymmetricHandle, expert_output)
        with self.scope(handle.slots):
            if handle.slots.plan.max_sms is None:
                return self._combine(expert_output, handle.slots, Rows.SORTED, positions=handle.positions)
            slot_output = weighted_sum(expert_output, handle.positions, handle.local_ids, handle.weights)
            return self._combine(slot_output, handle.slots, Rows.SLOTS)

    def _release(self, handle: Handle) -> None:
        if isinstance(handle, SymmetricHandle):
            self.abandon(handle.slots)
        if isinstance(handle, SlotHandle):
            handle.plan.windows.abandon(handle.window)

    def _plan(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        mask: torch.Tensor | None,
        scales: torch.Tensor | None,
        global_ids: bool,
        use_fp8: bool,
    ) -> SlotPlan:
        """Check the tensors, open the windows where they are closed, and lay out the slots."""
        if not hidden_states.is_cuda:
            raise InvalidInputError(f"hidden_states is on {hidden_states.device}; symmetric memory moves CUDA tensors")
        others = {"topk_weights": topk_weights, "topk_ids": topk_ids, "mask": mask, "scales": scales}
        for name, tensor in others.items():
            check_device(name, tensor, hidden_states.device)
        check_topk(hidden_states, topk_weights, topk_ids, self.placement.num_experts, mask)
        num_tokens, top_k = topk_ids.shape
        dtype, scale_width = hidden_states.dtype, 0 if scales is None else scales.shape[1]
        if use_fp8:
            _check_cast(hidden_states, scales)
            dtype, scale_width = torch.float8_e4m3fn, hidden_states.shape[1] // FP8_GROUP
        row_bytes = hidden_states.shape[1] * dtype.itemsize
        ep_size = self.placement.ep_size
        if num_tokens > self.limits.max_tokens_per_rank:
            raise InvalidInputError(
                f"{num_tokens} rows on rank {self.groups.topology.ep_rank}, the windows take "
                f"{self.limits.max_tokens_per_rank}; raise SymmetricLimits.max_tokens_per_rank or use all2all"
            )
        if row_bytes % WORD_BYTES or not row_bytes:
            raise InvalidInputError(
                f"a row of hidden_states takes {row_bytes} bytes; it must be a multiple of {WORD_BYTES}, and not 0"
            )
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
        if self.max_sms is not None and self.max_sms < 1:
            raise UnsupportedConfigError(f"max_sms is {self.max_sms}; an exchange needs at least one multiprocessor")
        layout = SlotLayout(ep_size * num_tokens, row_bytes, scale_width, top_k)
        if self._windows is None:
            self.open(row_bytes=row_bytes, top_k=top_k, scale_width=layout.scale_width)
        windows = self._windows
        if windows is not None:
            check_device("hidden_states", hidden_states, windows.device)
        if windows is None or layout.num_bytes > windows.size.received_bytes:
            raise InvalidInputError(
                f"{layout} takes {layout.num_bytes} bytes, more than the windows hold; call open() for the widest rows "
                "before the first dispatch"
            )
        experts_per_rank = self.placement.experts_per_rank
        views = tuple(layout.views(windows.bytes_of(window), dtype) for window in range(NUM_WINDOWS))
        sorts = num_tokens > 0 and not global_ids
        return SlotPlan(
            windows=windows,
            layout=layout,
            num_tokens=num_tokens,
            global_ids=global_ids,
            max_sms=self.max_sms,
            sent_bytes=(ep_size - 1) * (row_bytes + WORD_BYTES * (layout.scale_width + 2 * top_k)),
            launches=dispatch_launches(
                windows,
                layout,
                num_tokens,
                experts_per_rank,
                has_mask=mask is not None,
                global_ids=global_ids,
                max_sms=self.max_sms,
                use_fp8=use_fp8,
            ),
            views=views,
            sorts=tuple(sort_launches(layout, each, experts_per_rank) for each in views) if sorts else (),
        )

    def _plan_combine(self, slot_output: torch.Tensor, handle: SlotHandle, kind: Rows) -> tuple[PreparedLaunch, ...]:
        """Check slot_output, and prepare combine's kernel for each window. Empty: there is nothing to move."""
        plan, windows, layout = handle.plan, handle.plan.windows, handle.plan.layout
        if kind is not Rows.SORTED:  # combine has checked the rows
            check_rows(
                slot_output,
                layout.num_slots,
                name="slot_output",
                stage="SymmetricDispatcher.combine_slots",
                meaning="a row for each slot",
            )
        check_device("slot_output", slot_output, windows.device)
        self._check_returned(slot_output.dtype, (layout.num_slots, slot_output.shape[1]), windows)
        arguments = (windows, layout, plan.num_tokens, self.placement.experts_per_rank)
        width, element_size, has_mask = slot_output.shape[1], slot_output.element_size(), handle.mask is not None
        if kind is Rows.SLOTS_IN_WINDOW:
            if not slot_output.is_contiguous():
                raise InvalidInputError(
                    f"slot_output lies in the window with strides {slot_output.stride()}; give the whole combine_input"
                )
            return take_launches(
                *arguments, width=width, element_size=element_size, has_mask=has_mask, max_sms=plan.max_sms
            )
        return combine_launches(
            *arguments,
            width=width,
            element_size=element_size,
            has_mask=has_mask,
            global_ids=plan.global_ids,
            expert_major=kind is Rows.SORTED,
            max_sms=plan.max_sms,
        )

    def _check_returned(self, dtype: torch.dtype, shape: tuple[int, int], windows: SymmetricWindows) -> None:
        """Raise InvalidInputError for rows that combine cannot move. shape: of a row for each slot."""
        reason = _why_not_returned(dtype, shape, windows)
        if reason is not None:
            raise InvalidInputError(reason)


def _why_not_returned(dtype: torch.dtype, shape: tuple[int, int], windows: SymmetricWindows) -> str | None:
    """The reason why combine cannot move rows of this dtype, or None. shape: of a row for each slot."""
    if dtype not in COMBINE_DTYPES or not shape[1]:
        return f"slot_output is {dtype} {shape}; it must be one of {COMBINE_DTYPES}, with columns"
    returned_bytes = shape[0] * shape[1] * dtype.itemsize
    if returned_bytes > windows.size.returned_bytes:
        return (
            f"slot_output takes {returned_bytes} bytes, the windows hold {windows.size.returned_bytes}; call "
            "open(returned_row_bytes=...) before the first dispatch"
        )
    return None


def _check_cast(hidden_states: torch.Tensor, scales: torch.Tensor | None) -> None:
    """Raise InvalidInputError for rows that dispatch cannot cast to fp8."""
    if hidden_states.dtype not in COMBINE_DTYPES or hidden_states.shape[1] % FP8_GROUP:
        raise InvalidInputError(
            f"hidden_states is {hidden_states.dtype} {tuple(hidden_states.shape)}; use_fp8 casts rows of bfloat16, float16 or "
            f"float32 with a multiple of {FP8_GROUP} columns"
        )
    if scales is not None:
        raise InvalidInputError("use_fp8 makes the scales itself; give scales only with rows that are cast already")


def _check_output(output: torch.Tensor, num_tokens: int, rows: torch.Tensor) -> None:
    """Raise InvalidInputError for a tensor that combine cannot write."""
    check_device("output", output, rows.device)
    if output.shape != (num_tokens, rows.shape[1]) or output.dtype is not rows.dtype or not output.is_contiguous():
        raise InvalidInputError(
            f"output is {output.dtype} {tuple(output.shape)} with strides {output.stride()}; it must be contiguous "
            f"{rows.dtype} [{num_tokens}, {rows.shape[1]}]"
        )
