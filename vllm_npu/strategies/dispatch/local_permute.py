"""For strategies whose prepare has gathered all tokens: sort the tokens of the local experts. Nothing moves."""

from dataclasses import dataclass

import torch

from vllm_npu.core.handles import Handle, check_handle
from vllm_npu.device import ops_of
from vllm_npu.strategies.dispatch.base import Dispatched, Dispatcher, DispatchHandle, RoutedTokens
from vllm_npu.strategies.dispatch.rows_with_ids import RowsWithIds


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPermuteHandle(DispatchHandle):
    """Returned by LocalPermuteDispatcher.dispatch, consumed by its combine."""

    row_of_pair: torch.Tensor  # [num_tokens, top_k]: row of expert_input; -1: an expert of another rank
    topk_weights: torch.Tensor  # [num_tokens, top_k], dtype as given to dispatch


class LocalPermuteDispatcher(Dispatcher):
    """LOCAL: no collective.

    On NPUs no host sync, and legal under graph capture. On other accelerators a host sync (the number of local rows), and
    illegal under graph capture.
    """

    max_extra_tensors = None

    def dispatch(self, tokens: RoutedTokens) -> Dispatched:
        """Sort the tokens that chose a local expert by expert. Without expert parallelism all experts are local."""
        tokens.check(self.placement.num_experts)
        routed = ops_of(tokens.hidden_states).init_routing(
            tokens.hidden_states,
            tokens.topk_ids,
            self.placement.num_experts,
            self.placement.experts_of(self.groups.topology.ep_rank),
            tokens.dynamic_scales,
        )
        handle = LocalPermuteHandle(
            rows=routed.expanded_x.shape[0],
            row_of_pair=routed.expanded_row_idx,
            topk_weights=tokens.topk_weights,
        )
        return Dispatched.of(routed, handle)

    def combine(self, expert_output: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """Return this rank's share of each token's output. It is zero for a token without a local expert."""
        handle = self._consume(handle, LocalPermuteHandle, expert_output)
        combined: torch.Tensor = ops_of(expert_output).finalize_routing(
            expert_output, handle.row_of_pair, handle.topk_weights
        )
        return combined

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
        return rows, DispatchHandle(rows=rows.rows.shape[0])

    def combine_with_ids(
        self, expert_output: torch.Tensor, handle: Handle, output: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return expert_output itself, which has a row for each token."""
        stage = "LocalPermuteDispatcher.combine_with_ids"
        self._consume(check_handle(handle, DispatchHandle, stage), DispatchHandle, expert_output)
        return expert_output
