"""Naive multicast: AllGather whose gather is a broadcast from each rank that has tokens. For fabrics without a gather."""

from collections.abc import Sequence

import torch

from vllm_npu.core.token_layout import offsets, pack_and_move
from vllm_npu.strategies.prepare_finalize.allgather import AllGatherPrepareAndFinalize
from vllm_npu.transport.base import Transport


class NaiveMulticastPrepareAndFinalize(AllGatherPrepareAndFinalize):
    """As AllGather, but prepare costs one broadcast for each rank that has tokens in place of one all-gather.

    COLLECTIVE over dp (ep where sliced). Ranks without tokens are skipped by all. finalize is AllGather's.
    """

    def _gather(
        self, tensors: Sequence[torch.Tensor], real_rows: Sequence[int], transport: Transport
    ) -> list[torch.Tensor]:
        return pack_and_move(tensors, lambda x: self._multicast(x, real_rows, transport))

    def _multicast(self, x: torch.Tensor, real_rows: Sequence[int], transport: Transport) -> torch.Tensor:
        gathered = x.new_empty((sum(real_rows), *x.shape[1:]))
        starts = offsets(real_rows)
        gathered[starts[transport.rank] : starts[transport.rank + 1]] = x[: real_rows[transport.rank]]
        for source, rows in enumerate(real_rows):
            if rows:
                part = gathered[starts[source] : starts[source + 1]]
                part.copy_(transport.broadcast(part, source))
        return gathered
