"""What experts take that find their rows by expert id, as vLLM's fused experts do."""

from typing import NamedTuple

import torch


class RowsWithIds(
    NamedTuple
):  # made once for each layer: a named tuple takes a fourth of a frozen dataclass's host time
    """Rows, each with the ids and weights of k experts. k differs between dispatchers, and is 1 for expert-major rows.

    Experts leave out ids of other ranks. A row that no expert of this rank takes has ids of another rank only.
    """

    rows: torch.Tensor  # [num_rows, hidden_size]
    topk_weights: torch.Tensor  # [num_rows, k] float32
    topk_ids: torch.Tensor  # [num_rows, k] int32 or int64, global expert ids
    extra_tensors: tuple[torch.Tensor, ...] = ()  # each [num_rows, ...], for example scales of quantised rows


def ids_of_expert_major_rows(
    num_rows: int,
    tokens_per_expert: torch.Tensor,  # [num_local_experts] int64
    *,
    first_expert: int,  # global id of this rank's first expert
    foreign_expert: int,  # global id of any expert of another rank
) -> torch.Tensor:  # [num_rows, 1] int32
    """Return the global expert id of each row. Rows past sum(tokens_per_expert) get foreign_expert. No host sync."""
    ends = tokens_per_expert.cumsum(0)
    local = torch.searchsorted(ends, torch.arange(num_rows, device=ends.device), right=True)
    ids = torch.where(local < tokens_per_expert.shape[0], local + first_expert, foreign_expert)
    return ids.to(torch.int32)[:, None]
