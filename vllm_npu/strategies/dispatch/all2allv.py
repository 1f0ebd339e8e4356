"""Uneven all-to-all: each token travels once to each rank that has one of its experts, and one row comes back from there.

source:       token + weights + local ids of that rank's experts  --all-to-all-->  destination
destination:  permute -> experts -> weight and sum by token       --all-to-all-->  source: sum over ranks
"""

from dataclasses import dataclass

import torch

from vllm_npu.core.handles import Pending, check_handle
from vllm_npu.core.limits import QuantMode
from vllm_npu.core.routing import RankDestinations
from vllm_npu.device import ops_of
from vllm_npu.strategies.dispatch.base import Dispatched, Dispatcher, DispatchHandle, RoutedTokens
from vllm_npu.transport.base import Exchanged


@dataclass(frozen=True, slots=True, kw_only=True)
class All2AllVHandle(DispatchHandle):
    """Returned by All2AllVDispatcher.dispatch, consumed by its combine."""

    row_of_rank: torch.Tensor  # [num_tokens, ep_size]: sent row of each token to each rank, -1 for none
    row_of_pair: torch.Tensor  # [num_received, top_k]: row of expert_input, -1 for a pair of another rank
    received_weights: torch.Tensor  # [num_received, top_k] float32
    sent_rows: list[int]  # to each EP rank
    received_rows: list[int]  # from each EP rank


class All2AllVDispatcher(Dispatcher):
    """COLLECTIVE over ep. Host sync: yes (the split sizes). Graph capture: no."""

    def dispatch(self, tokens: RoutedTokens) -> Dispatched:
        """Two all-to-alls: 8 bytes a rank of counts, then [hidden | weights | ids] of each token once a destination; int8
        rows with their scales in the same message."""
        destinations, outgoing = self._outgoing(tokens)
        return self._arrived(destinations, self.groups.ep.exchange_tokens(outgoing, destinations.rows_per_rank))

    def dispatch_start(self, tokens: RoutedTokens) -> Pending[Dispatched]:
        """The counts are through when it returns; the tokens travel until the finish, which sorts them by expert."""
        destinations, outgoing = self._outgoing(tokens)
        exchange = self.groups.ep.exchange_tokens_start(outgoing, destinations.rows_per_rank)
        return Pending(
            stage="All2AllVDispatcher.dispatch", complete=lambda: self._arrived(destinations, exchange.finish())
        )

    def _outgoing(self, tokens: RoutedTokens) -> tuple[RankDestinations, tuple[torch.Tensor, ...]]:
        tokens.check(self.placement.num_experts)
        payload = (tokens.hidden_states,)
        if self.quant_mode is not QuantMode.NONE:
            payload = ops_of(tokens.hidden_states).npu_dynamic_quant(tokens.hidden_states)
        destinations = RankDestinations.build(tokens.topk_ids, self.placement)
        outgoing = (
            *(part[destinations.tokens] for part in payload),
            tokens.topk_weights[destinations.tokens].float(),
            destinations.local_ids(tokens.topk_ids, self.placement).int(),
        )
        return destinations, outgoing

    def _arrived(self, destinations: RankDestinations, exchanged: Exchanged) -> Dispatched:
        (rows, *scales, weights, local_ids), sent_rows, received_rows = exchanged
        routed = ops_of(rows).init_routing(rows, local_ids, self.placement.experts_per_rank, *scales)
        handle = All2AllVHandle(
            expert_rows=routed.expanded_x.shape[0],
            row_of_rank=destinations.row_of_rank,
            row_of_pair=routed.expanded_row_idx,
            received_weights=weights,
            sent_rows=sent_rows,
            received_rows=received_rows,
        )
        return Dispatched(
            expert_input=routed.expanded_x,
            tokens_per_expert=routed.tokens_per_expert,
            handle=handle,
            dynamic_scales=routed.expanded_scale,
        )

    def combine(self, expert_output: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """One all-to-all of one row a (token, rank), weighted and summed where the experts are. The sum over ranks is in
        float32, ranks ascending, of rows already rounded to expert_output's dtype."""
        handle, weighted = self._weighted(expert_output, handle)
        return self._summed(self.groups.ep.all_to_all(weighted, handle.received_rows, handle.sent_rows), handle)

    def combine_start(self, expert_output: torch.Tensor, handle: DispatchHandle) -> Pending[torch.Tensor]:
        """The weighted rows travel until the finish, which adds them up."""
        handle, weighted = self._weighted(expert_output, handle)
        return_trip = self.groups.ep.all_to_all_start(weighted, handle.received_rows, handle.sent_rows)
        return Pending(stage="All2AllVDispatcher.combine", complete=lambda: self._summed(return_trip.finish(), handle))

    def _weighted(self, expert_output: torch.Tensor, handle: DispatchHandle) -> tuple[All2AllVHandle, torch.Tensor]:
        handle = check_handle(handle, All2AllVHandle, "All2AllVDispatcher.combine")
        self._check_combine(expert_output, handle)
        ops = ops_of(expert_output)
        return handle, ops.finalize_routing(expert_output, handle.row_of_pair, handle.received_weights)

    def _summed(self, returned: torch.Tensor, handle: All2AllVHandle) -> torch.Tensor:
        combined: torch.Tensor = ops_of(returned).finalize_routing(returned, handle.row_of_rank)
        return combined
