"""Real vLLM on GPUs with every all2all manager and strategy: compares tokens with vLLM's own, and measures steps.

Usage: python scripts/vllm_on_gpus.py [--dp 2] [--tp 1] [--graphs] [--measure] [--choices vllm,agrs,symmetric,...] [--json FILE]
       [--layers 24] [--sequences 1,8,64,256] [--quantization fp8_per_block]

Starts one engine for each data-parallel rank. The running engines change their manager, so that all choices run on the same
weights. Each change captures graphs again. "vllm" is vLLM's own allgather_reducescatter. Without --measure, the script compares
greedy tokens of a tiny Qwen3-MoE in float16 with vLLM's own. The model is that of `demo --ascend-emulated`, whose tokens
survive rounding. With --measure, it measures a model of Qwen3-30B-A3B's shape with fewer layers and random weights: a prefill
step of 4096 tokens on each rank, and decode steps of each number of --sequences. --quantization fp8_per_block quantises the
weights while vLLM loads them; the tiny model then has experts that are wide enough for blocks.
With VLLM_NPU_SHARE_GPUS=1 all ranks are on the first GPU: tokens mean something then, and times do not.
--start-with CHOICE selects one choice by additional_config, as a user does, and compares nothing.
"""

import argparse
import json
import multiprocessing as mp
import os
import queue
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_npu import envs
from vllm_npu.transport.nccl import NcclTransport

OWN = "vllm"
STRATEGY_CHOICES = [f"moe_comm={name}" for name in ("allgather", "naive", "symmetric", "mc2", "all2all")]
CHOICES = (OWN, "agrs", "naive", *STRATEGY_CHOICES, OWN)
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 4,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "intermediate_size": 6144, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "vocab_size": 32768, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False, "bos_token_id": 0, "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}  # fmt: skip
PREFILL_PROMPTS, PREFILL_TOKENS = 8, 512  # for each rank: one step of 4096 tokens
DECODE_STEPS = 64
FP8_BLOCK = 128
ROUNDS = 7


def section(choice: str) -> dict[str, str]:
    """The vllm_npu section that selects a choice."""
    if choice == OWN:
        return {}
    key, _, value = choice.rpartition("=")
    return {key or "all2all": value}


def change_manager(worker: Any, choice: str, graphs: bool) -> str:
    """Put another manager into the running engine. Runs in each of vLLM's workers. COLLECTIVE."""
    import torch
    from vllm.compilation.cuda_graph import CUDAGraphWrapper
    from vllm.config import set_current_vllm_config
    from vllm.distributed import get_ep_group
    from vllm.distributed.device_communicators.all2all import AgRsAll2AllManager
    from vllm.v1.worker.workspace import unlock_workspace

    from vllm_npu.plugin.options import SECTION, Options

    communicator = get_ep_group().device_communicator
    vllm_config = worker.vllm_config
    torch.cuda.synchronize()
    if graphs:
        CUDAGraphWrapper.clear_all_graphs()
        unlock_workspace()
    communicator.all2all_manager.destroy()
    with set_current_vllm_config(vllm_config):
        if choice == OWN:
            communicator.all2all_manager = AgRsAll2AllManager(communicator.cpu_group)
        else:
            vllm_config.additional_config = {SECTION: section(choice)}
            communicator.all2all_manager = communicator.build_manager(vllm_config, Options.of(vllm_config))
        if graphs:
            worker.model_runner.capture_model()
    return type(getattr(communicator.all2all_manager, "inner", communicator.all2all_manager)).__name__


def rank_main(rank: int, options: argparse.Namespace, model: str, port: int, barrier: Any, answers: Any) -> None:
    """One data-parallel rank's engine."""
    shared = envs.SHARE_GPUS.read_flag()
    if shared:
        NcclTransport.device_of(rank)  # tells NCCL and torch
    if options.dp > 1:
        os.environ.update(
            VLLM_DP_RANK=str(rank), VLLM_DP_RANK_LOCAL=str(0 if shared else rank), VLLM_DP_SIZE=str(options.dp),
            VLLM_DP_MASTER_IP="127.0.0.1", VLLM_DP_MASTER_PORT=str(port),
        )  # fmt: skip
    from vllm import LLM, SamplingParams

    def generate(prompts: list[list[int]], lengths: list[int], logprobs: int | None = None) -> tuple[list[Any], float]:
        sampling = [
            SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False, logprobs=logprobs)
            for n in lengths
        ]
        barrier.wait()
        start = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return [output.outputs[0] for output in outputs], time.perf_counter() - start

    started = time.perf_counter()
    llm = LLM(
        model=model, skip_tokenizer_init=True, dtype="bfloat16" if options.measure else "float16",
        tensor_parallel_size=options.tp, enable_expert_parallel=True, enforce_eager=not options.graphs, max_model_len=1024,
        max_num_seqs=max(options.sequences), max_num_batched_tokens=4096, quantization=options.quantization,
        kv_cache_memory_bytes=2 << 30, gpu_memory_utilization=0.2,
        enable_prefix_caching=False, disable_log_stats=True, load_format="dummy" if options.measure else "auto",
        additional_config={"vllm_npu": section(options.start_with or OWN)},
        compilation_config={"cudagraph_capture_sizes": sorted({1, 2, 4, 8, *options.sequences})},
    )  # fmt: skip
    results = []
    for choice in [options.start_with] if options.start_with else options.choices.split(","):
        name = "as started"
        if not options.start_with and options.dp > 1:
            time.sleep(3)  # until the last empty steps of the engines, which wait for each other, have ended
            name = llm.collective_rpc(change_manager, args=(choice, options.graphs))[0]
        result: dict[str, Any] = {"choice": choice, "manager": name, "start_seconds": time.perf_counter() - started}
        if options.measure:
            result |= measure(generate, options.sequences)
        else:
            from vllm_npu.tools.demo.ascend_demo import MAX_TOKENS
            from vllm_npu.tools.engines.tiny_models import demo_prompts

            share = slice(rank, None, options.dp)
            outputs, result["seconds"] = generate(demo_prompts()[share], MAX_TOKENS[share], logprobs=2)
            result["tokens"] = [list(output.token_ids) for output in outputs]
            result["margins"] = [[margin(position) for position in output.logprobs] for output in outputs]
        results.append(result)
        print(
            f"rank {rank}: {choice} ({name}) after {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True
        )
        barrier.wait()
    answers.put((rank, results))
    barrier.wait()
    llm.llm_engine.engine_core.shutdown()


def margin(position: dict[int, Any]) -> float:
    """Gap in log-probability (nats) between the best and the second-best token."""
    best, second = sorted((entry.logprob for entry in position.values()), reverse=True)[:2]
    return float(best - second)


def measure(generate: Any, sequences: list[int]) -> dict[str, list[float]]:
    """Milliseconds of a prefill step and of decode steps, including all work of vLLM around the model: samples by name."""
    prompts = [[(31 * i + 7 * j) % 30000 + 2 for j in range(PREFILL_TOKENS)] for i in range(PREFILL_PROMPTS)]
    found: dict[str, list[float]] = {"prefill_ms": []}
    for round_ in range(ROUNDS + 1):
        seconds = generate(prompts, [1] * len(prompts))[1]
        if round_:  # the first warms up
            found["prefill_ms"].append(1e3 * seconds)
    for number in sequences:
        short = [[(31 * i + 7 * j) % 30000 + 2 for j in range(8)] for i in range(number)]
        samples = found[f"decode_{number}_ms"] = []
        for round_ in range(ROUNDS + 1):
            once = generate(short, [1] * number)[1]
            many = generate(short, [1 + DECODE_STEPS] * number)[1]
            if round_:
                samples.append(1e3 * (many - once) / DECODE_STEPS)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dp", type=int, default=2)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--choices", default=",".join(CHOICES))
    parser.add_argument("--start-with")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequences", type=lambda text: [int(each) for each in text.split(",")], default=[64])
    parser.add_argument("--quantization")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from vllm_npu.child_processes import free_port

    os.environ["VLLM_NPU_CUDA_PLATFORM"] = "1"
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # collective_rpc of change_manager
    if options.graphs and not options.start_with:
        left_out = {"moe_comm=all2all"}  # its sizes are read on the host
        options.choices = ",".join(each for each in options.choices.split(",") if each not in left_out)
    with tempfile.TemporaryDirectory() as folder:
        if options.measure:
            (Path(folder) / "config.json").write_text(
                json.dumps({**QWEN3_30B_A3B, "num_hidden_layers": options.layers})
            )
        else:
            from vllm_npu.tools.demo.ascend_demo import MODELS
            from vllm_npu.tools.engines.tiny_models import write_tiny_model

            model = MODELS[0]
            if options.quantization is not None:
                wide = {"moe_intermediate_size": FP8_BLOCK, "num_experts": 16}  # the router is quantised too
                model = replace(model, config={**model.config, **wide})
            write_tiny_model(model, Path(folder))
        port = free_port()
        spawn = mp.get_context("spawn")
        barrier, answers = spawn.Barrier(options.dp), spawn.Queue()
        ranks = [
            spawn.Process(target=rank_main, args=(rank, options, folder, port, barrier, answers))
            for rank in range(options.dp)
        ]
        for process in ranks:
            process.start()
        found: dict[int, list[dict[str, Any]]] = {}
        while len(found) < len(ranks):
            if any(process.exitcode not in (None, 0) for process in ranks):
                for process in ranks:
                    process.terminate()
                return 1
            try:
                rank, results = answers.get(timeout=1)
            except queue.Empty:
                continue
            found[rank] = results
        status = report(options, [found[rank] for rank in range(options.dp)])
        for process in ranks:
            process.join(20)
            process.terminate()
    return status


def report(options: argparse.Namespace, found: list[list[dict[str, Any]]]) -> int:
    """Print one line for each choice and write JSON. Return 1 if tokens differ from vLLM's own."""
    differ, rows = False, []
    where = f"DP{options.dp} TP{options.tp} EP {'graphs' if options.graphs else 'eager'}"
    where += f" {options.quantization}" if options.quantization else ""
    for index, own in enumerate(found[0]):
        row = {"where": where, "choice": own["choice"], "manager": own["manager"]}
        if options.measure:
            for key in ("prefill_ms", *(f"decode_{number}_ms" for number in options.sequences)):
                samples = [max(ranks) for ranks in zip(*(results[index][key] for results in found), strict=True)]
                row[key] = [round(statistics.median(samples), 3), round(min(samples), 3), round(max(samples), 3)]
        else:
            tokens = [results[index]["tokens"] for results in found]
            expected = [results[0]["tokens"] for results in found]
            pairs = [
                (token, other)
                for own_rank, first in zip(tokens, expected, strict=True)
                for prompt, reference in zip(own_rank, first, strict=True)
                for token, other in zip(prompt, reference, strict=True)
            ]
            same = sum(a == b for a, b in pairs)
            row["identical"] = f"{same}/{len(pairs)}"
            row["first_tokens"] = tokens[0][0][:4]
            row["margins_where_tokens_part"] = [
                round(own["margins"][prompt][step], 4)
                for own, first in zip(
                    [results[0] for results in found], [results[index] for results in found], strict=True
                )
                for prompt, (reference, other) in enumerate(zip(own["tokens"], first["tokens"], strict=True))
                for step in [next((i for i, (a, b) in enumerate(zip(reference, other, strict=True)) if a != b), None)]
                if step is not None
            ]
            differ |= same != len(pairs)
        rows.append(row)
        print(json.dumps(row), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"rows": rows, "ranks": found}) + "\n")
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
