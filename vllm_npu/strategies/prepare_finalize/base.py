"""The contract of the group-level stages: prepare runs before the dispatch to experts, finalize after the combine."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.errors import InvalidInputError
from vllm_npu.strategies.row_handle import RowHandle, RowHandleT, consume
from vllm_npu.transport.base import Groups


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareHandle(RowHandle):
    """Returned by prepare, consumed by the finalize of the same object. Its rows are the prepared rows."""

    step: StepPlan


class Prepared(NamedTuple):  # made once for each layer: a named tuple takes a fifth of a dataclass's host time
    """The tokens that this rank works on until finalize."""

    hidden_states: torch.Tensor  # [prepared_rows, hidden_size]
    per_token: tuple[torch.Tensor, ...]  # each [prepared_rows, ...], in the order given to prepare
    mask: torch.Tensor | None  # [prepared_rows] bool, True for real tokens, which come first; None: all tokens are real
    handle: PrepareHandle
    max_rows: int | None = None  # the most prepared_rows of any rank, where MC2's ranks differ; else None


class Finalized(NamedTuple):
    """The layer's output, and its layout."""

    hidden_states: torch.Tensor  # [input rows, width]; routed_output itself where nothing had to move
    sharding: TokenSharding  # of the rows over TP: the sharding of prepare's input
    reduced: bool  # False: the caller must still sum over the TP group


class PrepareAndFinalize(ABC):
    """The pair of one strategy. It holds its groups and no state of a call: the handle keeps what finalize needs."""

    gathers_tokens: ClassVar[bool] = False
    """Whether prepare sends hidden_states to other ranks. The pipeline then quantises hidden_states before prepare."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups

    @abstractmethod
    def prepare(
        self,
        hidden_states: torch.Tensor,  # [step.input_rows, hidden_size]
        per_token: tuple[torch.Tensor, ...],  # each [step.input_rows, ...]: router logits, or top-k weights and ids
        step: StepPlan,
    ) -> Prepared:
        """Bring this rank the tokens that it works on, with their rows of per_token. The inputs are not written."""

    @abstractmethod
    def finalize(
        self,
        routed_output: torch.Tensor,  # [prepared_rows, any width], any dtype
        handle: PrepareHandle,
        *,
        reduce_results: bool = True,
    ) -> Finalized:
        """Bring the output back to the layout of prepare's input.

        With reduce_results=False, a missing sum over TP is left to the caller. Finalized.reduced says whether one is missing.
        """

    def _check_prepare(self, hidden_states: torch.Tensor, per_token: tuple[torch.Tensor, ...], step: StepPlan) -> None:
        if hidden_states.dim() != 2:
            raise InvalidInputError(
                f"hidden_states has shape {tuple(hidden_states.shape)}; it must be [num_tokens, hidden_size]"
            )
        for tensor in per_token:
            if tensor.dim() != 2 or tensor.shape[0] != hidden_states.shape[0]:
                raise InvalidInputError(
                    f"a tensor of shape {tuple(tensor.shape)} cannot travel with hidden_states "
                    f"{tuple(hidden_states.shape)}: it must be 2-D, one row for each token"
                )
        step.check_input(hidden_states.shape[0], self.groups.topology)

    def _consume(self, handle: PrepareHandle, expected: type[RowHandleT], routed_output: torch.Tensor) -> RowHandleT:
        return consume(
            handle,
            expected,
            routed_output,
            stage=f"{type(self).__name__}.finalize",
            name="routed_output",
            meaning="a row for each prepared token",
        )
