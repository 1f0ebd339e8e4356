"""vLLM's serving features together with data and expert parallelism: the tokens of vanilla vLLM without the feature."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.forked_engine import FORKED
from vllm_npu.strategies.table import STRATEGIES
from vllm_npu.tools.demo.vanilla_demo import DP2_EP, TP2_DP2_EP
from vllm_npu.tools.engines.engine_processes import Parallelism
from vllm_npu.tools.engines.engine_set import EngineSet
from vllm_npu.tools.engines.tiny_models import DEMO_MAX_TOKENS, QWEN3_MOE, demo_prompts

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
ITSELF = "the checkpoint"  # stands for its folder
ITS_OWN_DRAFTER = {"method": "draft_model", "model": ITSELF, "num_speculative_tokens": 2}
# vLLM's arguments by feature. Steps of 16 tokens cut most prompts in parts, which run beside other ranks' decode steps.
FEATURES: dict[str, dict[str, Any]] = {
    "prefix caching": {"enable_prefix_caching": True},
    "chunked prefill": {"enable_chunked_prefill": True, "max_num_batched_tokens": 16},
    "ngram drafts": {"speculative_config": NGRAM},
    "ngram drafts, chunked": {
        "speculative_config": NGRAM,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 32,
    },
    "asynchronous scheduling": {"async_scheduling": True},
    "synchronous scheduling": {"async_scheduling": False},
    "pipeline stages": {"pipeline_parallel_size": 2},
    "drafts by the model itself": {"speculative_config": ITS_OWN_DRAFTER},
}


@pytest.mark.nightly  # size: an engine for each feature and topology
@pytest.mark.parametrize("parallelism", [DP2_EP, TP2_DP2_EP], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_changes_no_token(
    feature: str, parallelism: Parallelism, checkpoint, vanilla_tokens, caches: Path, tmp_path: Path
) -> None:
    expected = vanilla_tokens(QWEN3_MOE)[: len(DEMO_MAX_TOKENS)]
    strategies = [*STRATEGIES, next(iter(STRATEGIES))]  # a prefix that another strategy computed serves the last one
    engines = EngineSet(
        checkpoint(QWEN3_MOE),
        parallelism,
        strategies=strategies,
        prompts=demo_prompts(),
        max_tokens=DEMO_MAX_TOKENS,
        folder=tmp_path,
        caches=caches,
        engine_args=json.loads(json.dumps(FEATURES[feature]).replace(ITSELF, str(checkpoint(QWEN3_MOE)))),
        **FORKED,
    )
    with engines:
        engines.wait_until_ready()
        for strategy in strategies:
            generation = engines.generate()
            assert generation.tokens == expected, strategy
            assert {worker["strategy"] for worker in generation.counters} == {strategy}
