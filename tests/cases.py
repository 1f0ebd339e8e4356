"""Inputs and comparisons that several test files share."""

import torch
from hypothesis import strategies as st

from vllm_npu.core.topology import ParallelTopology

MAX_RANKS = 16
GRIDS = [(tp, dp) for tp in range(1, MAX_RANKS + 1) for dp in range(1, MAX_RANKS // tp + 1)]  # (tp_size, dp_size)

SEEDS = st.integers(0, 2**32 - 1)


def topologies(tp_size: int, dp_size: int, *, expert_parallel: bool = True) -> list[ParallelTopology]:
    """The grid as each of its ranks sees it, in rank order."""
    return [
        ParallelTopology.of_rank(rank, tp_size=tp_size, dp_size=dp_size, expert_parallel=expert_parallel)
        for rank in range(tp_size * dp_size)
    ]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distinct_ids(num_tokens: int, top_k: int, num_experts: int, generator: torch.Generator) -> torch.Tensor:
    """[num_tokens, top_k] int64 expert ids, distinct in a row, uniform."""
    return torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :top_k]


def small_integers(*shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Integers of -3..3: sums and products of a few are exact in every floating-point dtype."""
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes: NaN equals NaN, and 0 differs from -0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (x.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)
