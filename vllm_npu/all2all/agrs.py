"""AgRs: an all-gather before the experts, a reduce-scatter after them."""

from collections.abc import Sequence

import torch

from vllm_npu.all2all.base import GatheringManager
from vllm_npu.transport.base import Transport


class AgRsAll2AllManager(GatheringManager):
    """Uneven sizes go without padding. Small steps gather rows, weights and ids as one message, where vLLM's own manager of
    this name makes a collective of each. Host sync: no. Graph capture: yes (NCCL)."""

    def combine(self, hidden_states: torch.Tensor, is_sequence_parallel: bool = False) -> torch.Tensor:
        """This rank's rows of the sum over ranks. COLLECTIVE: one reduce-scatter."""
        transport = self._group(is_sequence_parallel)
        return transport.reduce_scatter(hidden_states, list(self._rows_of_ranks()))

    def _gather(self, x: torch.Tensor, rows: Sequence[int], transport: Transport) -> torch.Tensor:
        return transport.all_gather(x, rows)
