"""Naive multicast: each rank broadcasts its tokens in turn; all outputs are added up everywhere. The yardstick: any backend
that can broadcast runs it. vLLM no longer ships it."""

from collections.abc import Sequence

import torch

from vllm_npu.all2all.base import GatheringManager
from vllm_npu.core.token_layout import offsets
from vllm_npu.transport.base import Transport


class NaiveAll2AllManager(GatheringManager):
    """Unlike vLLM's former manager of this name, broadcasts stay in the group that shares the step (DP, not EP, without
    sequence parallelism), and ranks without tokens broadcast nothing. Host sync: no. Graph capture: yes (NCCL)."""

    def combine(self, hidden_states: torch.Tensor, is_sequence_parallel: bool = False) -> torch.Tensor:
        """This rank's rows of the sum over ranks, in memory of their own. COLLECTIVE: one all-reduce."""
        transport = self._group(is_sequence_parallel)
        starts = offsets(self._rows_of_ranks())
        return transport.all_reduce(hidden_states)[starts[transport.rank] : starts[transport.rank + 1]].clone()

    def _gather(self, x: torch.Tensor, rows: Sequence[int], transport: Transport) -> torch.Tensor:
        parts = []
        for source, count in enumerate(rows):
            part = x if source == transport.rank else x.new_empty((count, x.shape[1]))
            parts.append(transport.broadcast(part, source) if count else part)
        return torch.cat(parts)
