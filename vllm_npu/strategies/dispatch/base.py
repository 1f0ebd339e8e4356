"""The contract of the expert-level stages: dispatch runs before the experts, combine after them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_npu.core.ascend_recipes import ASKED_NOTHING, MC2Asked
from vllm_npu.core.handles import Handle, Pending, check_handle
from vllm_npu.core.limits import QuantMode
from vllm_npu.core.routing import check_topk
from vllm_npu.core.topology import ExpertPlacement
from vllm_npu.device.portable_ops import InitRoutingOutput
from vllm_npu.errors import InvalidInputError
from vllm_npu.strategies.dispatch.rows_with_ids import RowsWithIds, ids_of_expert_major_rows
from vllm_npu.strategies.prepare_finalize.base import Prepared
from vllm_npu.strategies.row_handle import RowHandle, RowHandleT, consume
from vllm_npu.transport.base import Groups


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchHandle(RowHandle):
    """Returned by dispatch, consumed by the combine of the same object. Its rows are those of expert_input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedTokens:
    """The tokens that a rank dispatches, and the router's choice for each of them."""

    hidden_states: torch.Tensor  # [num_tokens, hidden_size]; int8 where there are dynamic_scales
    topk_weights: torch.Tensor  # [num_tokens, top_k] float32, or narrower where the router rounds them
    topk_ids: torch.Tensor  # [num_tokens, top_k] int32 or int64, global expert ids; weights of one id in a row add up
    dynamic_scales: torch.Tensor | None = None  # [num_tokens, 1] float32, of rows that prepare gathered as int8
    mask: torch.Tensor | None = None  # [num_tokens] bool, True for real tokens, which come first; None: all are real
    max_rows: int | None = None  # the most num_tokens of any rank, where ranks differ; None: all ranks have the same

    @classmethod
    def of(cls, prepared: Prepared) -> "RoutedTokens":
        """The tokens of a prepare whose per_token was topk_weights, topk_ids and, for int8 rows, dynamic_scales."""
        topk_weights, topk_ids, *scales = prepared.per_token
        return cls(
            hidden_states=prepared.hidden_states,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            dynamic_scales=scales[0] if scales else None,
            mask=prepared.mask,
            max_rows=prepared.max_rows,
        )

    def check(self, num_experts: int, *, takes_mask: bool = False, distinct_for: str | None = None) -> None:
        """Raise InvalidInputError where check_topk does, for a mask unless takes_mask, and for a mask beside max_rows."""
        check_topk(
            self.hidden_states, self.topk_weights, self.topk_ids, num_experts, self.mask, distinct_for=distinct_for
        )
        if self.mask is not None and not takes_mask:
            raise InvalidInputError("a mask is for strategies of fixed shapes; bring the rows that are tokens only")
        if self.mask is not None and self.max_rows is not None:
            raise InvalidInputError(
                f"a mask needs as many rows on every rank, but max_rows={self.max_rows} says that they differ; pad to that"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatched:
    """The rows of this rank's experts, expert-major: the rows of the first expert come first."""

    expert_input: torch.Tensor  # [expert_rows, hidden_size]; rows past sum(tokens_per_expert) are undefined
    tokens_per_expert: torch.Tensor  # [num_local_experts] int64: counts, not prefix sums
    handle: DispatchHandle
    dynamic_scales: torch.Tensor | None = None  # [expert_rows] float32: value = int8 * scale, where rows are int8

    @classmethod
    def of(cls, routed: InitRoutingOutput, handle: DispatchHandle) -> "Dispatched":
        """The rows that init_routing sorted by expert."""
        return cls(
            expert_input=routed.expanded_x,
            tokens_per_expert=routed.tokens_per_expert,
            handle=handle,
            dynamic_scales=routed.expanded_scale,
        )


class Dispatcher(ABC):
    """One way to move tokens to their experts. It holds its groups and the placement, and no state of a call."""

    max_extra_tensors: ClassVar[int | None] = 0
    """Most tensors that dispatch_with_ids takes beside the rows. None: any number."""

    max_sms: int | None = None
    """The most multiprocessors of a GPU that an exchange by this package's kernels takes, from the next dispatch on. None: all.
    Equal on all ranks. A captured graph keeps the number of its capture."""

    asked: MC2Asked = ASKED_NOTHING
    """What vllm-ascend's options ask of MC2's ops. Equal on all ranks."""

    def __init__(
        self,
        groups: Groups,
        num_experts: int,  # over all ranks, redundant ones included
        quant_mode: QuantMode = QuantMode.NONE,
    ) -> None:
        self.groups = groups
        self.placement = ExpertPlacement(num_experts, groups.topology.ep_size)
        self.quant_mode = quant_mode

    @abstractmethod
    def dispatch(self, tokens: RoutedTokens) -> Dispatched:
        """Bring each token to the ranks of its experts. The inputs are not written."""

    def dispatch_start(self, tokens: RoutedTokens) -> Pending[Dispatched]:
        """Start a dispatch whose tokens travel while the caller computes. The finish of the result completes it.

        By default all of dispatch runs at the start. Dispatchers that move nothing have no other way, and torch_npu 2.13 has
        no op that starts MC2's dispatch and one that ends it.
        """
        dispatched = self.dispatch(tokens)
        return Pending(stage=f"{type(self).__name__}.dispatch", complete=lambda: dispatched)

    @abstractmethod
    def combine(
        self,
        expert_output: torch.Tensor,  # [expert_rows, any width], any floating dtype
        handle: DispatchHandle,
    ) -> torch.Tensor:  # [num_tokens, width], dtype of expert_output
        """Bring the experts' rows back to the ranks of their tokens, and return each token's weighted sum."""

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
        output: torch.Tensor | None = None,  # [num_tokens, width], contiguous, dtype of expert_output
    ) -> torch.Tensor:  # [num_tokens, width]
        """Undo dispatch_with_ids. Cost: that of combine. A dispatcher that can write into `output` does so and returns it;
        others return fresh memory."""
        stage = f"{type(self).__name__}.combine_with_ids"
        return self.combine(expert_output, check_handle(handle, DispatchHandle, stage))

    def combine_input_with_ids(self, handle: Handle, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """Memory for the rows that combine_with_ids will get, from which it moves them in less time. LOCAL, and equal on all
        ranks. None: any memory is as good, or rows of this shape are not what it will get."""
        return None

    @contextmanager
    def scope(self, handle: Handle) -> Iterator[None]:
        """Abandon the dispatch of `handle` if the code inside raises before its combine has run."""
        try:
            yield
        except BaseException:
            self.abandon(handle)
            raise

    def abandon(self, handle: Handle) -> None:
        """Give back what a dispatch has taken whose combine will not run. LOCAL. Host sync: no. A used handle is left alone.

        All ranks can go on with their next step if all of them abandon the dispatch. Otherwise the ranks that combine it fail
        after the deadline, with an error that names the others.
        """
        if not handle.is_spent:
            handle.spend(f"{type(self).__name__}.abandon")
            self._release(handle)

    def _release(self, handle: Handle) -> None:  # noqa: B027 - most dispatchers keep nothing outside of the handle
        """Give back what the handle's dispatch has taken outside of the handle."""

    def check_failed(self) -> None:  # noqa: B027 - the collectives of most dispatchers raise their errors themselves
        """Raise TransportError if a kernel that has ended gave up waiting for another rank. LOCAL. Host sync: no.

        For steps that replay graphs, which run no Python. Call it after a sync with the step's output, before the output is
        used.
        """

    def close(self) -> None:  # noqa: B027 - most dispatchers open nothing
        """Release what this object opened itself. LOCAL. No handle may be in flight."""

    @property
    def _foreign_expert(self) -> int:
        """Global id of an expert of another rank."""
        topology = self.groups.topology
        return self.placement.first_expert((topology.ep_rank + 1) % topology.ep_size)

    def _consume(self, handle: DispatchHandle, expected: type[RowHandleT], expert_output: torch.Tensor) -> RowHandleT:
        return consume(
            handle,
            expected,
            expert_output,
            stage=f"{type(self).__name__}.combine",
            name="expert_output",
            meaning="a row for each row of expert_input",
        )
