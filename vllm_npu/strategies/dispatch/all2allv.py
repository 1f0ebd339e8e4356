"""Uneven all-to-all: a token travels once to each rank that has one of its experts, and one row comes back from each.

source:       token + weights + ids of its experts                      --all-to-all-->  destination
destination:  sort by expert -> experts -> weighted sum by token        --all-to-all-->  source: sum over ranks
"""

from dataclasses import dataclass

import torch

from vllm_npu.core.handles import Pending
from vllm_npu.core.limits import QuantMode
from vllm_npu.core.routing import RankDestinations
from vllm_npu.device import ops_of
from vllm_npu.strategies.dispatch.base import Dispatched, Dispatcher, DispatchHandle, RoutedTokens
from vllm_npu.transport.base import Exchanged


@dataclass(frozen=True, slots=True, kw_only=True)
class All2AllVHandle(DispatchHandle):
    """Returned by All2AllVDispatcher.dispatch, consumed by its combine."""

    row_of_rank: torch.Tensor  # [num_tokens, ep_size]: row of each token among the rows sent to each rank; -1: not sent
    row_of_pair: torch.Tensor  # [num_received, top_k]: row of expert_input; -1: an expert of another rank
    received_weights: torch.Tensor  # [num_received, top_k], dtype as given to dispatch
    sent_rows: list[int]  # number of rows sent to each EP rank
    received_rows: list[int]  # number of rows received from each EP rank


class All2AllVDispatcher(Dispatcher):
    """COLLECTIVE over ep. Host sync: yes (the number of rows for each rank). Graph capture: no."""

    def dispatch(self, tokens: RoutedTokens) -> Dispatched:
        """Two all-to-alls. The first sends a count of 8 bytes to each rank; the second sends [hidden | weights | ids] of each
        token once to each destination. int8 rows travel with their scales in the same message."""
        destinations, outgoing = self._outgoing(tokens)
        return self._arrived(destinations, self.groups.ep.exchange_tokens(outgoing, destinations.rows_per_rank))

    def dispatch_start(self, tokens: RoutedTokens) -> Pending[Dispatched]:
        """Start a dispatch. The counts have arrived when this returns. The tokens travel until the finish, which sorts them by
        expert."""
        destinations, outgoing = self._outgoing(tokens)
        exchange = self.groups.ep.exchange_tokens_start(outgoing, destinations.rows_per_rank)
        return Pending(
            stage="All2AllVDispatcher.dispatch", complete=lambda: self._arrived(destinations, exchange.finish())
        )

    def _outgoing(self, tokens: RoutedTokens) -> tuple[RankDestinations, tuple[torch.Tensor, ...]]:
        """The destinations, and the tensors to send: rows, scales where rows are int8, weights, ids."""
        tokens.check(self.placement.num_experts)
        payload = (tokens.hidden_states,)
        if self.quant_mode is not QuantMode.NONE:
            payload = ops_of(tokens.hidden_states).npu_dynamic_quant(tokens.hidden_states)
        destinations = RankDestinations.build(tokens.topk_ids, self.placement)
        outgoing = (
            *(part[destinations.tokens] for part in payload),
            tokens.topk_weights[destinations.tokens],
            tokens.topk_ids[destinations.tokens].int(),
        )
        return destinations, outgoing

    def _arrived(self, destinations: RankDestinations, exchanged: Exchanged) -> Dispatched:
        """Sort the received rows by expert."""
        (rows, *scales, weights, ids), sent_rows, received_rows = exchanged
        own = self.placement.experts_of(self.groups.topology.ep_rank)
        routed = ops_of(rows).init_routing(rows, ids, self.placement.num_experts, own, *scales)
        handle = All2AllVHandle(
            rows=routed.expanded_x.shape[0],
            row_of_rank=destinations.row_of_rank,
            row_of_pair=routed.expanded_row_idx,
            received_weights=weights,
            sent_rows=sent_rows,
            received_rows=received_rows,
        )
        return Dispatched.of(routed, handle)

    def combine(self, expert_output: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """One all-to-all. Each rank returns one row for each received token: the weighted sum over its experts.

        The token's rank adds these rows up in float32, ranks ascending. They are already rounded to expert_output's dtype.
        """
        handle = self._consume(handle, All2AllVHandle, expert_output)
        ops = ops_of(expert_output)
        weighted = ops.finalize_routing(expert_output, handle.row_of_pair, handle.received_weights)
        returned = self.groups.ep.all_to_all(weighted, handle.received_rows, handle.sent_rows)
        combined: torch.Tensor = ops.finalize_routing(returned, handle.row_of_rank)
        return combined
