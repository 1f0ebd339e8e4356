"""For strategies whose prepare has gathered all tokens: sort those of the local experts, move nothing."""

from dataclasses import dataclass

import torch

from vllm_npu.dispatch.base import Dispatched, Dispatcher, DispatchHandle
from vllm_npu.handles import check_handle
from vllm_npu.routing import ExpertPermutation, check_topk, local_expert_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPermuteHandle(DispatchHandle):
    """Returned by LocalPermuteDispatcher.dispatch, consumed by its combine."""

    permutation: ExpertPermutation


class LocalPermuteDispatcher(Dispatcher):
    """LOCAL: no collective. Host sync on accelerators: yes (the number of local rows). Graph capture: no."""

    def dispatch(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> Dispatched:
        """The rows of tokens that chose a local expert, expert-major. Without expert parallelism all experts are local."""
        check_topk(hidden_states, topk_weights, topk_ids, self.placement.num_experts, mask)
        first_expert = self.placement.first_expert(self.groups.topology.ep_rank)
        local_ids = local_expert_ids(topk_ids, first_expert, self.placement.experts_per_rank)
        if mask is not None:
            local_ids = torch.where(mask[:, None], local_ids, -1)
        permutation = ExpertPermutation.build(local_ids, topk_weights, self.placement.experts_per_rank)
        return Dispatched(
            expert_input=hidden_states[permutation.source_rows],
            tokens_per_expert=permutation.tokens_per_expert,
            handle=LocalPermuteHandle(expert_rows=permutation.source_rows.numel(), permutation=permutation),
        )

    def combine(self, expert_output: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """This rank's share of each token's output: zeros for a token without a local expert."""
        handle = check_handle(handle, LocalPermuteHandle, "LocalPermuteDispatcher.combine")
        self._check_combine(expert_output, handle)
        return handle.permutation.combine(expert_output)
