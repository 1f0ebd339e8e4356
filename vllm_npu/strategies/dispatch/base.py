"""The contract of the expert-level stages: dispatch before the experts, combine after them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_npu.core.handles import Handle, Pending, check_handle
from vllm_npu.core.limits import QuantMode
from vllm_npu.core.routing import check_topk
from vllm_npu.core.topology import ExpertPlacement
from vllm_npu.errors import InvalidInputError
from vllm_npu.strategies.dispatch.rows_with_ids import RowsWithIds, ids_of_expert_major_rows
from vllm_npu.strategies.prepare_finalize.base import Prepared
from vllm_npu.transport.base import Groups


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchHandle(Handle):
    """Returned by dispatch, consumed by the combine of the same object."""

    expert_rows: int  # rows that combine must be given


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedTokens:
    """The tokens that a rank dispatches."""

    hidden_states: torch.Tensor  # [num_tokens, hidden_size]; int8 where there are dynamic_scales
    topk_weights: torch.Tensor  # [num_tokens, top_k] float32
    topk_ids: torch.Tensor  # [num_tokens, top_k] int32 or int64, global expert ids, distinct in a row
    dynamic_scales: torch.Tensor | None = None  # [num_tokens, 1] float32, of rows that prepare gathered as int8
    mask: torch.Tensor | None = None  # [num_tokens] bool, a prefix; None: all tokens are real. Of fixed shapes only
    max_rows: int | None = None  # of the fullest rank, where ranks bring different numbers; None: all bring as many

    @classmethod
    def of(cls, prepared: Prepared) -> "RoutedTokens":
        """Those of a prepare that was given topk_weights, topk_ids and, of int8 rows, their scales."""
        topk_weights, topk_ids, *scales = prepared.per_token
        return cls(
            hidden_states=prepared.hidden_states,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            dynamic_scales=scales[0] if scales else None,
            mask=prepared.mask,
            max_rows=prepared.max_rows,
        )

    def check(self, num_experts: int, *, takes_mask: bool = False) -> None:
        """Raise InvalidInputError as routing.check_topk does, for a mask that the dispatcher does not take, and for one on top
        of different numbers of rows."""
        check_topk(self.hidden_states, self.topk_weights, self.topk_ids, num_experts, self.mask)
        if self.mask is not None and not takes_mask:
            raise InvalidInputError("a mask is for strategies of fixed shapes; bring the rows that are tokens only")
        if self.mask is not None and self.max_rows is not None:
            raise InvalidInputError(
                f"a mask needs as many rows on every rank, but max_rows={self.max_rows} says that they differ; pad to that"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatched:
    """The rows of this rank's experts."""

    expert_input: (
        torch.Tensor
    )  # [expert_rows, hidden_size], expert-major; rows past sum(tokens_per_expert) are undefined
    tokens_per_expert: torch.Tensor  # [num_local_experts] int64: counts, not prefix sums
    handle: DispatchHandle
    dynamic_scales: torch.Tensor | None = None  # [expert_rows] float32: value = int8 * scale, where rows are int8


class Dispatcher(ABC):
    """One way to move tokens to experts. Holds its groups and the placement, and nothing of any call."""

    def __init__(
        self,
        groups: Groups,
        num_experts: int,
        quant_mode: QuantMode = QuantMode.NONE,
        shared_expert_ranks: int = 0,  # MC2 only
    ) -> None:
        self.groups = groups
        self.placement = ExpertPlacement(num_experts, groups.topology.ep_size, shared_expert_ranks)
        self.quant_mode = quant_mode

    @abstractmethod
    def dispatch(self, tokens: RoutedTokens) -> Dispatched:
        """Bring each token to its experts. The inputs are not written."""

    def dispatch_start(self, tokens: RoutedTokens) -> Pending[Dispatched]:
        """dispatch whose tokens travel while the caller computes, up to the finish. Here: all of it at once, for those that
        move nothing or have one op for the whole (torch_npu 2.13 has no setup and teardown of MC2's)."""
        dispatched = self.dispatch(tokens)
        return Pending(stage=f"{type(self).__name__}.dispatch", complete=lambda: dispatched)

    def combine_start(self, expert_output: torch.Tensor, handle: DispatchHandle) -> Pending[torch.Tensor]:
        """combine in the same way. It consumes the handle at the start."""
        combined = self.combine(expert_output, handle)
        return Pending(stage=f"{type(self).__name__}.combine", complete=lambda: combined)

    @abstractmethod
    def combine(
        self,
        expert_output: torch.Tensor,  # [expert_rows, any width], any floating dtype
        handle: DispatchHandle,
    ) -> torch.Tensor:  # [num_tokens, width], dtype of expert_output
        """Bring the experts' rows back and add them up, weighted."""

    max_extra_tensors: ClassVar[int | None] = 0
    """Most tensors that dispatch_with_ids takes beside the rows. None: any number."""

    def dispatch_with_ids(
        self,
        tokens: RoutedTokens,
        extra_tensors: tuple[torch.Tensor, ...] = (),  # each [num_tokens, width], up to max_extra_tensors
    ) -> tuple[RowsWithIds, Handle]:
        """Dispatch for experts that find their rows by expert id. The handle is for combine_with_ids. Cost: that of dispatch.

        Here each expert-major row gets the id of its expert and the weight 1, since combine applies the weights.
        """
        dispatched = self.dispatch(tokens)
        ids = ids_of_expert_major_rows(
            dispatched.expert_input.shape[0],
            dispatched.tokens_per_expert,
            first_expert=self.placement.first_expert(self.groups.topology.ep_rank),
            foreign_expert=self._foreign_expert,
        )
        return RowsWithIds(dispatched.expert_input, torch.ones_like(ids, dtype=torch.float32), ids), dispatched.handle

    def combine_with_ids(
        self,
        expert_output: torch.Tensor,  # [rows of dispatch_with_ids, width]: weighted sums of this rank's experts
        handle: Handle,
    ) -> torch.Tensor:  # [num_tokens, width]
        """Undo dispatch_with_ids. Cost: that of combine."""
        stage = f"{type(self).__name__}.combine_with_ids"
        return self.combine(expert_output, check_handle(handle, DispatchHandle, stage))

    def close(self) -> None:  # noqa: B027 - most dispatchers open nothing
        """Release what this object opened itself. LOCAL. No handle may be in flight."""

    @property
    def _foreign_expert(self) -> int:
        """Global id of an expert of another rank."""
        topology = self.groups.topology
        return self.placement.first_expert((topology.ep_rank + 1) % topology.ep_size)

    def _check_combine(self, expert_output: torch.Tensor, handle: DispatchHandle) -> None:
        if expert_output.dim() != 2 or expert_output.shape[0] != handle.expert_rows:
            raise InvalidInputError(
                f"expert_output has shape {tuple(expert_output.shape)}; {type(self).__name__}.combine needs "
                f"[{handle.expert_rows}, width], a row for each row of expert_input"
            )
        handle.spend(f"{type(self).__name__}.combine")
