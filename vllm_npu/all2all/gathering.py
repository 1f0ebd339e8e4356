"""Managers that bring all tokens to all ranks: the strategies allgather and naive under vLLM's names agrs and naive.

A manager gathers the padding rows of sequence parallelism too, since vLLM counts them. The strategies leave these rows out.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from vllm_npu.all2all.base import All2AllManager, RowsOfRanks, Taken
from vllm_npu.strategies.dispatch.rows_with_ids import RowsWithIds
from vllm_npu.strategies.prepare_finalize.allgather import AllGatherPrepareAndFinalize
from vllm_npu.strategies.prepare_finalize.naive_multicast import NaiveMulticastPrepareAndFinalize
from vllm_npu.transport.base import Groups


class GatheringManager(All2AllManager):
    """Gathers as `strategy` does. Host sync: no. Graph capture: yes (NCCL). No state of a call is kept."""

    strategy: ClassVar[type[AllGatherPrepareAndFinalize]]

    def __init__(self, groups: Groups, rows_of_ranks: RowsOfRanks, cpu_group: dist.ProcessGroup | None = None) -> None:
        super().__init__(groups, rows_of_ranks, cpu_group)
        self._strategy = self.strategy(groups)

    def dispatch_router_logits(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: list[torch.Tensor] | None = None,
    ) -> tuple[Any, ...]:
        """Return the rows, router logits and extra tensors of all ranks, in rank order. COLLECTIVE."""
        self._note(Taken(self.name, self.name), captured=True)  # a graph can take it as well
        tensors = (hidden_states, router_logits, *(extra_tensors or ()))
        rows, logits, *extra = self._gather(tensors, is_sequence_parallel)
        return (rows, logits) if extra_tensors is None else (rows, logits, extra)

    def combine(self, hidden_states: torch.Tensor, is_sequence_parallel: bool = False) -> torch.Tensor:
        """Return this rank's rows of the sum over ranks. COLLECTIVE: one reduce-scatter."""
        return self._group(is_sequence_parallel).reduce_scatter(hidden_states, list(self._rows_of_ranks()))

    def _dispatch(self, tokens: RowsWithIds, is_sequence_parallel: bool) -> RowsWithIds:
        """Gather the rows, weights, ids and extra tensors of all ranks, in rank order."""
        self._note(Taken(self.name, self.name), captured=True)
        tensors = (tokens.rows, tokens.topk_weights, tokens.topk_ids, *tokens.extra_tensors)
        rows, weights, ids, *extra = self._gather(tensors, is_sequence_parallel)
        return RowsWithIds(rows, weights, ids, tuple(extra))

    def _gather(self, tensors: Sequence[torch.Tensor], is_sequence_parallel: bool) -> list[torch.Tensor]:
        """Gather tensors [rows, ...] with any further dimensions. The results are contiguous."""
        transport = self._group(is_sequence_parallel)
        rows = self._rows(transport, tensors[0].shape[0])
        flat = [x.reshape(x.shape[0], prod(x.shape[1:])) for x in tensors]
        gathered = self._strategy.gather_rows(flat, rows, transport)
        return [whole.contiguous().view(sum(rows), *x.shape[1:]) for whole, x in zip(gathered, tensors, strict=True)]


class AgRsAll2AllManager(GatheringManager):
    """The strategy allgather: an all-gather, then a reduce-scatter. Uneven sizes travel without padding.

    A small step gathers rows, weights and ids as one message. vLLM's own manager of this name needs a collective for each.
    """

    name = "agrs"
    strategy = AllGatherPrepareAndFinalize


class NaiveAll2AllManager(GatheringManager):
    """The strategy naive: each rank with tokens broadcasts them in turn. vLLM no longer ships a manager of this name.

    Three things differ from vLLM's former manager. Without sequence parallelism the broadcasts go over DP, not over EP. Ranks
    without tokens broadcast nothing. combine is a reduce-scatter, where vLLM added up all rows on all ranks.
    """

    name = "naive"
    strategy = NaiveMulticastPrepareAndFinalize
