"""The contract of the group-level stages: prepare before the experts' dispatch, finalize after their combine."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from vllm_npu.core.handles import Handle
from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.errors import InvalidInputError
from vllm_npu.transport.base import Groups


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareHandle(Handle):
    """Returned by prepare, consumed by the finalize of the same object."""

    step: StepPlan
    prepared_rows: int  # rows that finalize must be given


class Prepared(NamedTuple):  # made once a layer and rank: a named tuple takes a fifth of a dataclass's host time
    """The tokens that this rank works on until finalize."""

    hidden_states: torch.Tensor  # [prepared_rows, hidden_size]
    per_token: tuple[torch.Tensor, ...]  # each [prepared_rows, ...], in the order given to prepare
    mask: torch.Tensor | None  # [prepared_rows] bool, True for real tokens, a prefix; None: all are real
    handle: PrepareHandle
    max_rows: int | None = None  # of the fullest rank, where mc2 brings different numbers; None: see the strategy


class Finalized(NamedTuple):
    """The layer's output, and what the caller still has to know of it."""

    hidden_states: torch.Tensor  # [input rows, width]; routed_output itself where nothing had to move
    sharding: TokenSharding  # how it lies over TP: as the input did
    reduced: bool  # False: a sum over the TP group is still missing


class PrepareAndFinalize(ABC):
    """One strategy's pair. Holds its groups and nothing of any call: what a call needs later is in the handle."""

    gathers_tokens: ClassVar[bool] = False
    """Whether prepare sends hidden_states to other ranks: then they are quantised before it."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups

    @abstractmethod
    def prepare(
        self,
        hidden_states: torch.Tensor,  # [step.input_rows, hidden_size]
        per_token: tuple[torch.Tensor, ...],  # each [step.input_rows, ...]: router logits, or top-k weights and ids
        step: StepPlan,
    ) -> Prepared:
        """Bring this rank the tokens it works on, with whatever travels along. The inputs are not written."""

    @abstractmethod
    def finalize(
        self,
        routed_output: torch.Tensor,  # [prepared_rows, any width], any dtype
        handle: PrepareHandle,
        *,
        reduce_results: bool = True,
    ) -> Finalized:
        """Bring the output back to the layout of prepare's input. reduce_results=False leaves a sum over TP to the caller,
        where one is due: see Finalized.reduced."""

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

    def _check_finalize(self, routed_output: torch.Tensor, handle: PrepareHandle) -> None:
        if routed_output.dim() != 2 or routed_output.shape[0] != handle.prepared_rows:
            raise InvalidInputError(
                f"routed_output has shape {tuple(routed_output.shape)}; {type(self).__name__}.finalize needs "
                f"[{handle.prepared_rows}, width], a row for each prepared token"
            )
        handle.spend(f"{type(self).__name__}.finalize")
