"""The contract of the expert-level stages: dispatch before the experts, combine after them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from vllm_npu.errors import InvalidInputError
from vllm_npu.handles import Handle, Pending
from vllm_npu.topology import ExpertPlacement
from vllm_npu.transport.base import Groups


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchHandle(Handle):
    """Returned by dispatch, consumed by the combine of the same object."""

    expert_rows: int  # rows that combine must be given


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatched:
    """The rows of this rank's experts."""

    expert_input: (
        torch.Tensor
    )  # [expert_rows, hidden_size], expert-major; rows past sum(tokens_per_expert) are undefined
    tokens_per_expert: torch.Tensor  # [num_local_experts] int64: counts, not prefix sums
    handle: DispatchHandle


class Dispatcher(ABC):
    """One way to move tokens to experts. Holds its groups and the placement, and nothing of any call."""

    def __init__(self, groups: Groups, num_experts: int) -> None:
        self.groups = groups
        self.placement = ExpertPlacement(num_experts, groups.topology.ep_size)

    @abstractmethod
    def dispatch(
        self,
        hidden_states: torch.Tensor,  # [num_tokens, hidden_size]
        topk_weights: torch.Tensor,  # [num_tokens, top_k] float32
        topk_ids: torch.Tensor,  # [num_tokens, top_k] int32 or int64, global expert ids, distinct in a row
        mask: torch.Tensor | None = None,  # [num_tokens] bool, a prefix; None: all tokens are real
    ) -> Dispatched:
        """Bring each token to its experts. The inputs are not written."""

    def dispatch_start(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> Pending[Dispatched]:
        """dispatch whose tokens travel while the caller computes, up to the finish. Here: all of it at once, for those that
        move nothing or have one op for the whole (torch_npu 2.13 has no setup and teardown of MC2's)."""
        dispatched = self.dispatch(hidden_states, topk_weights, topk_ids, mask)
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

    def _check_combine(self, expert_output: torch.Tensor, handle: DispatchHandle) -> None:
        if expert_output.dim() != 2 or expert_output.shape[0] != handle.expert_rows:
            raise InvalidInputError(
                f"expert_output has shape {tuple(expert_output.shape)}; {type(self).__name__}.combine needs "
                f"[{handle.expert_rows}, width], a row for each row of expert_input"
            )
        handle.spend(f"{type(self).__name__}.combine")
