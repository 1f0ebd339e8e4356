"""What vLLM's scheduler does with its requests after a step that broke, in one process and without a model's weights."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm_npu.tools.engines.tiny_models import QWEN3_MOE, TinyModel

BLOCK = 32  # tokens
BLOCKS = 64
PROMPT = list(range(3 * BLOCK + 5))  # three full blocks, and a part of one


@pytest.fixture
def scheduler(checkpoint: Callable[[TinyModel], Path]) -> Iterator[Any]:
    """vLLM's own, as an engine core builds it, with cached prefixes."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import init_none_hash
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    init_none_hash(sha256)
    config = EngineArgs(
        str(checkpoint(QWEN3_MOE)), block_size=BLOCK, enable_prefix_caching=True, enforce_eager=True, max_model_len=256
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = BLOCKS
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
    groups = [KVCacheGroupSpec(["model.layers.0.self_attn.attn"], spec)]
    started = Scheduler(
        config,
        KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups),
        StructuredOutputManager(config),
        block_size=BLOCK,
        hash_block_size=BLOCK,
    )
    yield started
    started.shutdown()


def request(name: str, prompt: Sequence[int] = PROMPT) -> Any:
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request

    params = SamplingParams(max_tokens=8, ignore_eos=True)
    return Request(name, list(prompt), params, None, block_hasher=get_request_block_hasher(BLOCK, sha256))


def cached_tokens(scheduler: Any, asked: Any) -> int:
    """The tokens of a request that the scheduler would not compute, because it takes their blocks for filled."""
    return int(scheduler.kv_cache_manager.get_computed_blocks(asked)[1])


def end_step(scheduler: Any, scheduled: Any, token: int) -> dict[str, list[int]]:
    """The workers give `token` to every request of the step. Returns what each client gets."""
    from vllm.v1.outputs import ModelRunnerOutput

    names = list(scheduled.num_scheduled_tokens)
    output = ModelRunnerOutput(names, {name: place for place, name in enumerate(names)}, [[token] for _ in names])
    outputs = scheduler.update_from_output(scheduled, output)
    return {each.request_id: each.new_token_ids for client in outputs.values() for each in client.outputs}


def test_blocks_of_a_broken_step_count_as_cached_until_they_are_forgotten(scheduler):
    """Nothing has been computed, and nothing may be taken for computed: not by the request itself, and by no later one."""
    from vllm_npu.plugin.cpu.engine_retry import _requeue

    scheduler.add_request(request("broken"))
    assert scheduler.schedule().num_scheduled_tokens == {"broken": len(PROMPT)}
    # The reason to forget: if this fails, vLLM counts blocks when they are filled, and _requeue need not forget them.
    assert cached_tokens(scheduler, request("later")) == 3 * BLOCK

    _requeue(scheduler)

    assert cached_tokens(scheduler, request("later")) == 0
    again = scheduler.schedule()
    assert again.num_scheduled_tokens == {"broken": len(PROMPT)}
    [new] = again.scheduled_new_reqs
    assert new.num_computed_tokens == 0
    assert end_step(scheduler, again, token=7) == {"broken": [7]}
    assert cached_tokens(scheduler, request("later")) == 3 * BLOCK


def test_a_request_goes_on_from_its_tokens_and_loses_none(scheduler):
    """The output of the broken step never comes, and that of the step after it counts. The worker knows the request."""
    from vllm_npu.plugin.cpu.engine_retry import _requeue

    scheduler.add_request(request("long"))
    assert end_step(scheduler, scheduler.schedule(), token=7) == {"long": [7]}
    assert scheduler.schedule().num_scheduled_tokens == {"long": 1}

    _requeue(scheduler)

    again = scheduler.schedule()
    assert again.num_scheduled_tokens == {"long": len(PROMPT) + 1}
    assert again.scheduled_new_reqs == []
    assert again.scheduled_cached_reqs.resumed_req_ids == {"long"}
    assert again.scheduled_cached_reqs.num_computed_tokens == [0]
    assert end_step(scheduler, again, token=8) == {"long": [8]}
    assert list(scheduler.requests["long"].output_token_ids) == [7, 8]
