"""Engines in bfloat16, which most checkpoints are: how far their log-probabilities are from those in float32.

Tokens prove little here, since rounding changes them. So each strategy has to be as near to float32 as vanilla vLLM on one
worker is, on every rank, and no rank may be off in one direction.
"""

import random
from pathlib import Path
from statistics import fmean, median, stdev

import pytest

from tests.vllm.forked_engine import FORKED
from vllm_npu.strategies.table import STRATEGIES
from vllm_npu.tools.demo.vanilla_demo import DP2_EP
from vllm_npu.tools.engines.engine_processes import Parallelism
from vllm_npu.tools.engines.engine_set import EngineSet
from vllm_npu.tools.engines.tiny_models import QWEN3_MOE

LENGTH, NUM_PROMPTS = 16, 128
PROMPTS = [
    [random.Random(f"{seed}").randrange(QWEN3_MOE.config["vocab_size"]) for _ in range(LENGTH)]
    for seed in range(NUM_PROMPTS)
]
# Of vanilla's median distance. The median, because rounding now and then chooses another expert, and such a prompt is far off.
ALLOWED = 1.10


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
        distance = median(abs(each) for prompt in of_vanilla for each in prompt)
        assert distance > 0, "bfloat16 did not round"
        for strategy, found in zip(STRATEGIES, ours, strict=True):
            own = differences(found[rank::2], exact[rank::2])
            own_distance = median(abs(each) for prompt in own for each in prompt)
            assert own_distance <= ALLOWED * distance, (strategy, rank)
            # Tokens of one prompt are off by nearly the same, so a prompt counts as one sample.
            shifts = [fmean(got) - fmean(other) for got, other in zip(own, of_vanilla, strict=True)]
            assert abs(fmean(shifts)) <= 4 * stdev(shifts) / len(shifts) ** 0.5, (strategy, rank)
            print(
                f"{strategy}, rank {rank}: {own_distance:.5f} nats, vanilla vLLM {distance:.5f}; shift {fmean(shifts):.5f}"
            )


def differences(of: list[list[float]], exact: list[list[float]]) -> list[list[float]]:
    """By prompt and token, in nats."""
    return [
        [got - want for got, want in zip(prompt, expected, strict=True)]
        for prompt, expected in zip(of, exact, strict=True)
    ]
