"""Naive multicast: AllGather by one broadcast from each rank that has tokens. For fabrics without an all-gather."""

from collections.abc import Sequence

import torch

from vllm_npu.core.token_layout import pack
from vllm_npu.strategies.prepare_finalize.allgather import AllGatherPrepareAndFinalize
from vllm_npu.transport.base import Transport


class NaiveMulticastPrepareAndFinalize(AllGatherPrepareAndFinalize):
    """AllGather whose prepare costs one broadcast for each rank that has tokens, in place of one all-gather.

    COLLECTIVE over dp (ep for a sliced input). No rank broadcasts for a rank without tokens. finalize is AllGather's.
    """

    def _gather(
        self, tensors: Sequence[torch.Tensor], real_rows: Sequence[int], transport: Transport
    ) -> list[torch.Tensor]:
        message, unpack = pack(tensors)
        return unpack(multicast(message, real_rows, transport))


def multicast(
    x: torch.Tensor,  # [rows[rank], ...]
    rows: Sequence[int],  # rows of each rank of the group
    transport: Transport,
) -> torch.Tensor:  # [sum(rows), ...], in rank order
    """Gather the rows of all ranks. COLLECTIVE: one broadcast from each rank that has rows. Host sync: no."""
    parts = [
        transport.broadcast(x if source == transport.rank else x.new_empty((count, *x.shape[1:])), source)
        for source, count in enumerate(rows)
        if count
    ]
    return torch.cat(parts) if parts else x
