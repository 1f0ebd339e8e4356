"""The two collectives of sequence parallelism: gather the slices of all ranks without padding, and reduce-scatter back."""

from collections.abc import Sequence

import torch

from vllm_npu.core.token_layout import pad_rows
from vllm_npu.transport.base import Transport


def gather_and_unpad(
    x: torch.Tensor,  # [rows, ...]: this rank's slice, its real rows first, then padding
    real_rows: Sequence[int],  # number of real rows of each rank of the group
    transport: Transport,
) -> torch.Tensor:  # [sum(real_rows), ...]
    """Gather the real rows of all ranks. COLLECTIVE: one all-gather. Padding does not travel. Host sync: no."""
    return transport.all_gather(x[: real_rows[transport.rank]], real_rows)


def reduce_scatter_and_pad(
    x: torch.Tensor,  # [sum(real_rows), ...]: this rank's summand for every real row
    real_rows: Sequence[int],  # number of real rows of each rank of the group
    rows: int,  # rows of this rank's slice, padding included
    transport: Transport,
) -> torch.Tensor:  # [rows, ...]; padding rows are zero
    """Return this rank's slice of the sum. COLLECTIVE: one reduce-scatter. Host sync: no. The inverse of gather_and_unpad."""
    return pad_rows(transport.reduce_scatter(x, real_rows), rows)
