"""Engines one after another in the same processes: each on vLLM groups of its own, and nothing of them stays."""

import gc
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from tests.time_limits import PATIENCE_SECONDS
from tests.vllm.vllm_ranks import IMPORTED_ONCE
from vllm_npu.child_processes import free_port
from vllm_npu.tools.engines.tiny_models import QWEN3_MOE, demo_prompts
from vllm_npu.tools.launch import ProcessRankPool, Rank

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

TOPOLOGIES = [(2, 1), (1, 2), (2, 1), (1, 2), (2, 1), (1, 2)]  # TP, DP
MAPS, DESCRIPTORS = Path("/proc/self/maps"), Path("/proc/self/fd")


def generate_with_each_engine(rank: Rank, model: str, ports: list[int]) -> tuple[list[Any], list[str], list[int]]:
    """Tokens and topology of each engine, and the number of open descriptors after each."""
    import torch.distributed as dist
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

    from vllm_npu.transport import gloo

    os.environ |= {
        "RANK": str(rank.rank),
        "LOCAL_RANK": str(rank.rank),
        "WORLD_SIZE": str(rank.num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    gloo.WINDOW_MIN_BYTES = 1024  # a tiny model's messages go through shared memory too
    dist.destroy_process_group()  # the pool's own
    tokens, topologies, descriptors = [], [], []
    for number, (tp_size, dp_size) in enumerate(TOPOLOGIES):
        os.environ["MASTER_PORT"] = str(ports[number])
        engine = LLM(
            model=model,
            skip_tokenizer_init=True,
            dtype="float32",
            tensor_parallel_size=tp_size,
            data_parallel_size=dp_size,
            enable_expert_parallel=True,
            distributed_executor_backend="external_launcher",
            enforce_eager=True,
            max_model_len=256,
            max_num_seqs=8,
            kv_cache_memory_bytes=64 << 20,
            disable_log_stats=True,
            seed=0,
        )
        prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in demo_prompts()]
        sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        tokens.append([list(output.outputs[0].token_ids) for output in outputs])
        topologies.append(topology_that_moved_tokens())
        assert "memfd:vllm_npu_window" in MAPS.read_text()
        engine.llm_engine.engine_core.shutdown()
        del engine, outputs
        gc.collect()
        destroy_model_parallel()
        if number + 1 < len(TOPOLOGIES):  # the pool ends the last one
            destroy_distributed_environment()
        gc.collect()
        assert "memfd:vllm_npu_window" not in MAPS.read_text(), f"engine {number} left a window"
        descriptors.append(len(os.listdir(DESCRIPTORS)))
    return tokens, topologies, descriptors


def topology_that_moved_tokens() -> str:
    from vllm_npu.plugin.groups import model_groups

    return str(model_groups(expert_parallel=True).topology)


def test_engines_of_other_sizes_one_after_another_in_one_process(checkpoint, short_folder, monkeypatch):
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(short_folder))
    multiprocessing.set_forkserver_preload([*IMPORTED_ONCE])
    ports = [free_port() for _ in TOPOLOGIES]
    with ProcessRankPool(2, timeout=PATIENCE_SECONDS, start_method="forkserver") as pool:
        for tokens, topologies, descriptors in pool.run(generate_with_each_engine, str(checkpoint(QWEN3_MOE)), ports):
            assert tokens == [tokens[0]] * len(TOPOLOGIES)
            assert topologies == [topologies[0], topologies[1]] * (len(TOPOLOGIES) // 2)
            assert topologies[0] != topologies[1]
            assert descriptors[-1] == descriptors[-3] == descriptors[-5], descriptors
            assert descriptors[-2] == descriptors[-4], descriptors
