"""Uneven all-to-all: each token travels once to each rank that has one of its experts, and one row comes back from there.

source:       token + weights + local ids of that rank's experts  --all-to-all-->  destination
destination:  permute -> experts -> weight and sum by token       --all-to-all-->  source: sum over ranks
"""

from dataclasses import dataclass

import torch

from vllm_npu.dispatch.base import Dispatched, Dispatcher, DispatchHandle
from vllm_npu.handles import check_handle
from vllm_npu.routing import ExpertPermutation, RankDestinations, check_topk
from vllm_npu.token_layout import RowFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class All2AllVHandle(DispatchHandle):
    """Returned by All2AllVDispatcher.dispatch, consumed by its combine."""

    destinations: RankDestinations
    permutation: ExpertPermutation
    sent_rows: list[int]  # to each EP rank
    received_rows: list[int]  # from each EP rank


class All2AllVDispatcher(Dispatcher):
    """COLLECTIVE over ep. Host sync: yes (the split sizes). Graph capture: no."""

    def dispatch(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> Dispatched:
        """Two all-to-alls: 8 bytes a rank of counts, then [hidden | weights | ids] of each token once a destination."""
        check_topk(hidden_states, topk_weights, topk_ids, self.placement.num_experts, mask)
        if mask is not None:
            hidden_states, topk_weights, topk_ids = hidden_states[mask], topk_weights[mask], topk_ids[mask]
        destinations = RankDestinations.build(topk_ids, self.placement)
        sent_rows = destinations.rows_per_rank.tolist()
        received_rows = self._exchange_counts(destinations.rows_per_rank)

        outgoing = (
            hidden_states[destinations.tokens],
            topk_weights[destinations.tokens].float(),
            destinations.local_ids(topk_ids, self.placement).int(),
        )
        message = RowFormat.of(outgoing)
        received = self.groups.ep.all_to_all(message.pack(outgoing), sent_rows, received_rows)
        hidden_states, weights, local_ids = message.unpack(received)

        permutation = ExpertPermutation.build(local_ids, weights, self.placement.experts_per_rank)
        return Dispatched(
            expert_input=hidden_states[permutation.source_rows],
            tokens_per_expert=permutation.tokens_per_expert,
            handle=All2AllVHandle(
                expert_rows=permutation.source_rows.numel(),
                destinations=destinations,
                permutation=permutation,
                sent_rows=sent_rows,
                received_rows=received_rows,
            ),
        )

    def combine(self, expert_output: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """One all-to-all of one row a (token, rank), weighted and summed where the experts are. The sum over ranks is in
        float32, ranks ascending, of rows already rounded to expert_output's dtype."""
        handle = check_handle(handle, All2AllVHandle, "All2AllVDispatcher.combine")
        self._check_combine(expert_output, handle)
        weighted = handle.permutation.combine(expert_output)
        returned = self.groups.ep.all_to_all(weighted, handle.received_rows, handle.sent_rows)
        return handle.destinations.sum_returned(returned)

    def _exchange_counts(self, rows_per_rank: torch.Tensor) -> list[int]:
        ones = [1] * self.groups.ep.size
        received: list[int] = self.groups.ep.all_to_all(rows_per_rank, ones, ones).tolist()
        return received
