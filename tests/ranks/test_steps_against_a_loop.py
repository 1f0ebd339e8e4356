"""Every strategy beside a plain loop over tokens and experts in float64, with an expert several times in a row.

On threads and over gloo here. tests/emulated/test_strategies.py runs the same on NPU tensors.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.cases import distinct_ids, seeded, small_integers
from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.core.topology import ExpertPlacement
from vllm_npu.errors import InvalidInputError
from vllm_npu.strategies.select import build
from vllm_npu.strategies.table import STRATEGIES
from vllm_npu.tools.launch import Rank

EXPERTS, TOP_K = 12, 3


def loop_in_float64(hidden_states: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Expert e multiplies by e + 1."""
    x, w, chosen = (each.cpu().double().numpy() for each in (hidden_states, weights, ids))
    total = np.zeros_like(x)
    for token in range(x.shape[0]):
        for k in range(chosen.shape[1]):
            total[token] += w[token, k] * (chosen[token, k] + 1) * x[token]
    return torch.from_numpy(total)


def experts_of(rank: Rank) -> Callable[..., torch.Tensor]:
    first = ExpertPlacement(EXPERTS, rank.num_ranks).first_expert(rank.rank)

    def run(rows: torch.Tensor, tokens_per_expert: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
        output = torch.full(rows.shape, float("nan"), dtype=rows.dtype, device=rows.device)
        start = 0
        for expert, count in enumerate(tokens_per_expert.tolist()):
            output[start : start + count] = rows[start : start + count] * (first + expert + 1)
            start += count
        return output

    return run


def step_of(rank: Rank, seed: int) -> StepPlan:
    counts = [(seed + 3 * other) % 7 for other in range(rank.num_ranks)]
    return StepPlan(num_tokens_across_dp=tuple(counts), sharding=TokenSharding.REPLICATED)


def tokens_of(
    rank: Rank, step: StepPlan, seed: int, hidden: int, dtype: torch.dtype, *, repeated: bool
) -> list[torch.Tensor]:
    """Small integers, so that every sum is exact in each dtype: hidden states, weights, ids."""
    tokens, generator = step.num_tokens_across_dp[rank.rank], seeded(100 * seed + rank.rank)
    if repeated:
        ids = torch.randint(EXPERTS, (tokens, TOP_K), generator=generator, device="cpu")
        ids[::2] = ids[::2, :1]  # one expert all through the row
    else:
        ids = distinct_ids(tokens, TOP_K, EXPERTS, generator)
    weights = torch.randint(1, 3, (tokens, TOP_K), generator=generator, device="cpu").float()
    hidden_states = small_integers(tokens, hidden, generator=generator, dtype=dtype)
    return [each.to(rank.device) for each in (hidden_states, weights, ids.int())]


def check_step(
    rank: Rank, strategy: str, seed: int, hidden: int, dtype: torch.dtype, *, repeated: bool = False
) -> None:
    step = step_of(rank, seed)
    given = tokens_of(rank, step, seed, hidden, dtype, repeated=repeated)
    pipeline = build(strategy, rank.groups(tp_size=1, dp_size=rank.num_ranks), EXPERTS)
    output = pipeline.run(*given, experts_of(rank), step).hidden_states
    torch.testing.assert_close(output.cpu().double(), loop_in_float64(*given), rtol=0, atol=0)


def weights_of_one_expert_add_up(rank: Rank, strategy: str, hidden: int = 8) -> None:
    for seed, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16) if rank.device.type == "cpu" else
                                 (torch.bfloat16, torch.float16)):  # fmt: skip
        check_step(rank, strategy, seed, hidden, dtype, repeated=True)


def is_refused(rank: Rank, strategy: str, error: type[Exception], match: str, hidden: int = 8) -> None:
    step = StepPlan(num_tokens_across_dp=(3,) * rank.num_ranks, sharding=TokenSharding.REPLICATED)
    given = tokens_of(rank, step, 0, hidden, torch.bfloat16, repeated=True)
    pipeline = build(strategy, rank.groups(tp_size=1, dp_size=rank.num_ranks), EXPERTS)
    with pytest.raises(error, match=match):
        pipeline.run(*given, experts_of(rank), step).hidden_states.cpu()


TRANSPORTS = pytest.mark.parametrize("transport", ["threaded", "gloo"])


@TRANSPORTS
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "mc2"])
def test_the_weights_of_an_expert_that_stands_several_times_in_a_row_add_up(pools, transport, strategy):
    pools(transport, 3).run(weights_of_one_expert_add_up, strategy)


@TRANSPORTS
def test_mc2_refuses_an_expert_that_stands_several_times_in_a_row(pools, transport):
    pools(transport, 3).run(is_refused, "mc2", InvalidInputError, "mc2 takes an expert only once in a row")
