"""The sum of the experts' rows on NPUs, and every strategy beside a plain loop in float64, on emulated ranks."""

import numpy as np
import pytest
import torch

from tests.cases import seeded
from tests.emulated.references import half_units, sum_of_pairs
from tests.emulated.test_token_ops import ranks_on
from tests.ranks.test_steps_against_a_loop import (
    EXPERTS,
    check_step,
    is_refused,
    step_of,
    tokens_of,
    weights_of_one_expert_add_up,
)
from vllm_npu.strategies.select import build
from vllm_npu.tools.launch import Rank

pytestmark = pytest.mark.emulated

TOKENS, TOP_K, HIDDEN = 33, 8, 64
HIDDEN_OF_MC2 = 1024  # the least that A3's op takes
CHIPS = ["A2", "A3", "A5"]
STEPS_AFTER = 100


def rows_and_pairs(top_k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of which the unused ones are NaN, the row of each pair, and float32 weights. A third of the pairs has no row."""
    generator = seeded(top_k)
    pairs = TOKENS * top_k
    weights = torch.rand(TOKENS, top_k, generator=generator)
    row_of_pair = torch.randperm(pairs, generator=generator).view(TOKENS, top_k)
    row_of_pair[torch.rand(TOKENS, top_k, generator=generator) < 1 / 3] = -1
    row_of_pair[0] = -1
    rows = torch.randn(pairs, HIDDEN, generator=generator).to(dtype)
    unused = torch.ones(pairs, dtype=torch.bool).index_fill_(0, row_of_pair[row_of_pair >= 0], False)
    rows[unused] = float("nan")
    return rows, row_of_pair, weights


def sums_round_once(rank: int, num_ranks: int) -> None:
    """A sum differs from the float64 sum by the rounding of the result, and by float32's roundings of products and sums."""
    from vllm_npu.core.limits import UNPERMUTE_MAX_TOP_K
    from vllm_npu.device import npu_ops

    for top_k in (1, 2, TOP_K, UNPERMUTE_MAX_TOP_K + 1):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            rows, row_of_pair, weights = rows_and_pairs(top_k, dtype)
            on_device = (rows.npu(), row_of_pair.npu())
            for given in (weights, None):
                out = npu_ops.finalize_routing(*on_device, None if given is None else given.npu()).cpu()
                factors = torch.ones_like(weights) if given is None else given
                exact = sum_of_pairs(rows, row_of_pair, factors, np.float64)
                in_float32 = 2.0**-24 * (top_k + 1) * sum_of_pairs(rows.abs(), row_of_pair, factors, np.float64)
                assert out.dtype == dtype
                error = (out.double() - exact).abs()
                assert (error <= half_units(exact, dtype) + in_float32).all(), (top_k, dtype, given is None)
                assert (out[0] == 0).all(), "a token without rows"


@pytest.mark.parametrize("soc", CHIPS)
def test_the_sum_of_the_experts_rows_is_rounded_once(run_in_ranks, soc: str) -> None:
    run_in_ranks(sums_round_once, 1, soc=soc)


def steps_after_an_exception(rank: Rank, strategy: str, hidden: int = 8) -> None:
    """All ranks fail between the stages, twice. The errors are kept, and with them the frames that hold the handles."""
    pipeline = build(strategy, rank.groups(tp_size=1, dp_size=rank.num_ranks), EXPERTS)
    errors = []

    def fails(*_: torch.Tensor | None) -> torch.Tensor:
        raise ArithmeticError("the experts failed")

    for seed in range(2):
        step = step_of(rank, seed)
        given = tokens_of(rank, step, seed, hidden, torch.bfloat16, repeated=False)
        with pytest.raises(ArithmeticError, match="the experts failed") as raised:
            pipeline.run(*given, fails, step)
        errors.append(raised.value)
    for seed in range(STEPS_AFTER):
        check_step(rank, strategy, seed, hidden, torch.bfloat16)
    assert len(errors) == 2


@pytest.mark.parametrize("soc", CHIPS)
def test_the_weights_of_an_expert_that_stands_several_times_in_a_row_add_up(warm, monkeypatch, soc: str) -> None:
    with ranks_on(warm, monkeypatch, soc, 2, {}) as pool:
        for strategy in ("all2all", "allgather", "naive"):
            pool.run(weights_of_one_expert_add_up, strategy)
        pool.run(is_refused, "mc2", RuntimeError, "expert_ids has an id twice in the row of one token", HIDDEN_OF_MC2)


@pytest.mark.parametrize(("soc", "strategy"), [("A3", name) for name in ("all2all", "allgather", "naive", "mc2")])
def test_a_hundred_steps_after_an_exception_between_dispatch_and_combine(warm, monkeypatch, soc, strategy) -> None:
    with ranks_on(warm, monkeypatch, soc, 2, {}) as pool:
        pool.run(steps_after_an_exception, strategy, HIDDEN_OF_MC2 if strategy == "mc2" else HIDDEN)
