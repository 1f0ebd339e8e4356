"""For strategies whose prepare has gathered all tokens: sort those of the local experts, move nothing."""

from dataclasses import dataclass

import torch

from vllm_npu.core.handles import Handle, check_handle
from vllm_npu.core.routing import local_expert_ids
from vllm_npu.device import ops_of
from vllm_npu.strategies.dispatch.base import Dispatched, Dispatcher, DispatchHandle, RoutedTokens
from vllm_npu.strategies.dispatch.rows_with_ids import RowsWithIds


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPermuteHandle(DispatchHandle):
    """Returned by LocalPermuteDispatcher.dispatch, consumed by its combine."""

    row_of_pair: torch.Tensor  # [num_tokens, top_k]: row of expert_input, -1 for a pair of no local expert
    topk_weights: torch.Tensor


class LocalPermuteDispatcher(Dispatcher):
    """LOCAL: no collective. Host sync: not on NPUs; on other accelerators yes (the number of local rows), and no graphs."""

    def dispatch(self, tokens: RoutedTokens) -> Dispatched:
        """The rows of tokens that chose a local expert, expert-major. Without expert parallelism all experts are local."""
        tokens.check(self.placement.num_experts)
        first_expert = self.placement.first_expert(self.groups.topology.ep_rank)
        local_ids = local_expert_ids(tokens.topk_ids, first_expert, self.placement.experts_per_rank)
        routed = ops_of(tokens.hidden_states).init_routing(
            tokens.hidden_states, local_ids, self.placement.experts_per_rank, tokens.dynamic_scales
        )
        handle = LocalPermuteHandle(
            expert_rows=routed.expanded_x.shape[0],
            row_of_pair=routed.expanded_row_idx,
            topk_weights=tokens.topk_weights,
        )
        return Dispatched(
            expert_input=routed.expanded_x,
            tokens_per_expert=routed.tokens_per_expert,
            handle=handle,
            dynamic_scales=routed.expanded_scale,
        )

    def combine(self, expert_output: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """This rank's share of each token's output: zeros for a token without a local expert."""
        handle = check_handle(handle, LocalPermuteHandle, "LocalPermuteDispatcher.combine")
        self._check_combine(expert_output, handle)
        combined: torch.Tensor = ops_of(expert_output).finalize_routing(
            expert_output, handle.row_of_pair, handle.topk_weights
        )
        return combined

    max_extra_tensors = None

    def dispatch_with_ids(
        self, tokens: RoutedTokens, extra_tensors: tuple[torch.Tensor, ...] = ()
    ) -> tuple[RowsWithIds, Handle]:
        """Return the tokens as they are, contiguous: experts find their rows by id. No sort, no host sync."""
        rows = RowsWithIds(
            tokens.hidden_states.contiguous(),
            tokens.topk_weights.contiguous(),
            tokens.topk_ids.contiguous(),
            tuple(tensor.contiguous() for tensor in extra_tensors),
        )
        return rows, DispatchHandle(expert_rows=rows.rows.shape[0])

    def combine_with_ids(self, expert_output: torch.Tensor, handle: Handle) -> torch.Tensor:
        """Return expert_output itself, which has a row for each token."""
        self._check_combine(
            expert_output, check_handle(handle, DispatchHandle, "LocalPermuteDispatcher.combine_with_ids")
        )
        return expert_output
