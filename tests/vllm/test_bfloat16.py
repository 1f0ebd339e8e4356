"""Engines in bfloat16, which most checkpoints are: how far their log-probabilities are from those in float32.

Tokens prove little here, since rounding changes them. So each strategy has to be as near to float32 as vanilla vLLM on one
worker is, on every rank, and no rank may be off in one direction.
"""

import random
from math import exp, log, sqrt
from pathlib import Path
from statistics import fmean, stdev

import pytest

from tests.vllm.forked_engine import FORKED
from vllm_npu.strategies.table import STRATEGIES
from vllm_npu.tools.demo.vanilla_demo import DP2_EP
from vllm_npu.tools.engines.engine_processes import Parallelism
from vllm_npu.tools.engines.engine_set import EngineSet
from vllm_npu.tools.engines.tiny_models import QWEN3_MOE

LENGTH, NUM_PROMPTS = 16, 320
PROMPTS = [random.Random(seed).choices(range(QWEN3_MOE.config["vocab_size"]), k=LENGTH) for seed in range(NUM_PROMPTS)]
# A prompt counts as one sample, since the errors of its tokens are no independent ones.
ERRORS_ALLOWED = 3  # standard errors of the mean
LARGEST_ERROR = 0.06  # so a strategy that is farther from float32 by a fifth is found


def logprobs(
    model: Path, parallelism: Parallelism, strategies: list[str | None], dtype: str, caches: Path, folder: Path
) -> list[list[list[float]]]:
    """By strategy and prompt: the log-probabilities (nats) of the prompt's tokens."""
    engines = EngineSet(
        model,
        parallelism,
        strategies=strategies,
        prompts=PROMPTS,
        max_tokens=[1] * len(PROMPTS),
        folder=folder,
        caches=caches,
        dtype=dtype,
        measure_prompts=True,
        **FORKED,
    )
    with engines:
        engines.wait_until_ready()
        found = [engines.generate().prompt_logprobs for _ in strategies]
    return [each for each in found if each is not None]


@pytest.mark.nightly  # size: three engines; test_moe_runner.py runs the layer in bfloat16
def test_no_strategy_and_no_rank_is_farther_from_float32_than_vanilla_vllm(checkpoint, caches, tmp_path):
    model = checkpoint(QWEN3_MOE)
    (exact,) = logprobs(model, Parallelism(), [None], "float32", caches, tmp_path / "float32")
    (vanilla,) = logprobs(model, Parallelism(), [None], "bfloat16", caches, tmp_path / "vanilla")
    ours = logprobs(model, DP2_EP, [*STRATEGIES], "bfloat16", caches, tmp_path / "ours")

    for rank in range(2):
        of_vanilla = differences(vanilla[rank::2], exact[rank::2])
        assert all(distance(prompt) > 0 for prompt in of_vanilla), "bfloat16 did not round"
        for strategy, found in zip(STRATEGIES, ours, strict=True):
            own = differences(found[rank::2], exact[rank::2])
            pairs = list(zip(own, of_vanilla, strict=True))
            ratios = [log(distance(prompt) / distance(other)) for prompt, other in pairs]
            shifts = [fmean(prompt) - fmean(other) for prompt, other in pairs]
            print(
                f"{strategy}, rank {rank}: {exp(fmean(ratios)):.3f} of vanilla's distance, shift {fmean(shifts):.5f} nats"
            )
            assert standard_error(ratios) < LARGEST_ERROR
            assert fmean(ratios) <= ERRORS_ALLOWED * standard_error(ratios), (strategy, rank)
            assert abs(fmean(shifts)) <= ERRORS_ALLOWED * standard_error(shifts), (strategy, rank)


def distance(prompt: list[float]) -> float:
    return fmean(map(abs, prompt))


def standard_error(samples: list[float]) -> float:
    return stdev(samples) / sqrt(len(samples))


def differences(of: list[list[float]], exact: list[list[float]]) -> list[list[float]]:
    """By prompt and token, in nats."""
    return [
        [got - want for got, want in zip(prompt, expected, strict=True)]
        for prompt, expected in zip(of, exact, strict=True)
    ]
