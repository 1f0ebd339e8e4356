"""Uneven all-to-all: a token travels once to each rank that has one of its experts, and one row comes back from each.

source:       token + weights + ids of its experts                      --all-to-all-->  destination
destination:  sort by expert -> experts -> weighted sum by token        --all-to-all-->  source: sum over ranks

Experts that find their rows by id, as vLLM's do, take the received rows as they are, and add a row's weighted outputs up.
"""

from dataclasses import dataclass

import torch

from vllm_npu.core.handles import Handle, Pending, check_handle
from vllm_npu.core.limits import QuantMode
from vllm_npu.core.routing import RankDestinations, RanksOfTokens
from vllm_npu.core.token_layout import pack
from vllm_npu.device import ops_of
from vllm_npu.strategies.dispatch.base import Dispatched, Dispatcher, DispatchHandle, RoutedTokens
from vllm_npu.strategies.dispatch.rows_with_ids import RowsWithIds
from vllm_npu.strategies.dispatch.symmetric_launch import weighted_sum
from vllm_npu.strategies.row_handle import RowHandle, consume
from vllm_npu.transport.base import Exchanged


@dataclass(frozen=True, slots=True, kw_only=True)
class All2AllVHandle(DispatchHandle):
    """Returned by All2AllVDispatcher.dispatch, consumed by its combine."""

    row_of_rank: torch.Tensor  # [num_tokens, ep_size]: row of each token among the rows sent to each rank; -1: not sent
    row_of_pair: torch.Tensor  # [num_received, top_k]: row of expert_input; -1: an expert of another rank
    received_weights: torch.Tensor  # [num_received, top_k], dtype as given to dispatch
    sent_rows: list[int]  # number of rows sent to each EP rank
    received_rows: list[int]  # number of rows received from each EP rank


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedRowsHandle(RowHandle):
    """Returned by All2AllVDispatcher.dispatch_with_ids, consumed by its combine_with_ids. Its rows are the received ones."""

    ranks: RanksOfTokens
    sent_rows: list[int]  # number of rows sent to each EP rank
    received_rows: list[int]  # number of rows received from each EP rank


class All2AllVDispatcher(Dispatcher):
    """COLLECTIVE over ep. Host sync: yes (the number of rows for each rank). Graph capture: no."""

    max_extra_tensors = None

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

    def dispatch_with_ids(
        self, tokens: RoutedTokens, extra_tensors: tuple[torch.Tensor, ...] = ()
    ) -> tuple[RowsWithIds, Handle]:
        """Two all-to-alls, as in dispatch. The rows are those that came, each once, with all of its token's weights and ids.
        Host sync: one."""
        tokens.check(self.placement.num_experts)
        ranks = RanksOfTokens.of(tokens.topk_ids, self.placement)
        own = (tokens.hidden_states, *extra_tensors, tokens.topk_weights, tokens.topk_ids.int())
        message, unpack = pack(own)
        sent_rows, received_rows = self.groups.ep.exchange_sizes(ranks.rows_per_rank)
        outgoing = message[ranks.tokens(sum(sent_rows))]
        fields = unpack(self.groups.ep.all_to_all(outgoing, sent_rows, received_rows))
        rows, *extra, weights, ids = (field.contiguous() for field in fields)
        handle = ReceivedRowsHandle(rows=rows.shape[0], ranks=ranks, sent_rows=sent_rows, received_rows=received_rows)
        return RowsWithIds(rows, weights, ids, tuple(extra)), handle

    def combine_with_ids(
        self, expert_output: torch.Tensor, handle: Handle, output: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One all-to-all. The token's rank adds its rows up in float32, ranks ascending. Host sync: no."""
        stage = "All2AllVDispatcher.combine_with_ids"
        handle = consume(
            check_handle(handle, ReceivedRowsHandle, stage),
            ReceivedRowsHandle,
            expert_output,
            stage=stage,
            name="expert_output",
            meaning="a row for each row of dispatch_with_ids",
        )
        returned = self.groups.ep.all_to_all(expert_output, handle.received_rows, handle.sent_rows)
        row_of_rank = handle.ranks.row_of_rank()
        if returned.is_cuda:
            return weighted_sum(returned, row_of_rank, row_of_rank, torch.ones_like(row_of_rank, dtype=torch.float32))
        combined: torch.Tensor = ops_of(returned).finalize_routing(returned, row_of_rank)
        return combined
