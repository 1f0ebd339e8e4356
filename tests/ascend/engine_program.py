"""Generates greedy tokens with one engine of vLLM beside vllm-ascend, once for each strategy.

    python tests/ascend/engine_program.py '{"model": FOLDER, "tp": 2, "strategies": ["mc2"]}'

Prints one JSON line: the tokens of each prompt by strategy, the strategies that the workers ran, the drafts and the accepted
ones by strategy, the placements of experts that the ranks had, and the counts of moe_comm=compare. Without `strategies` the
engine has no section of this package, and the only entry is "vllm-ascend". These keys are optional: "options" has more
arguments of the engine, "max_tokens" is a number or a list with one for each prompt (4 without it), with "rounds" each
strategy generates as often, and "moe_comm" is what the engine starts with and keeps. "adapter" is the folder of a LoRA adapter,
which every second prompt has. With "margins" the line has, by strategy and prompt, the smallest difference between the
logarithms of the two likeliest tokens' probabilities.
"""

import json
import sys
from typing import Any

OWN = "vllm-ascend"


def placement(worker: Any) -> list[Any]:
    """Where the experts are on this rank, as vllm-ascend's EPLB keeps it: the local place of each expert in each layer."""
    adaptor = worker.model_runner.eplb_updator.adaptor
    return [places.tolist() for places in adaptor.expert_map_per_layer_cpu.values()]


def drafts(engine: Any) -> list[float]:
    """Tokens that the drafter proposed since the start, and those that were accepted."""
    values = {metric.name: getattr(metric, "value", 0) for metric in engine.get_metrics()}
    return [values.get(f"vllm:spec_decode_num_{kind}_tokens", 0) for kind in ("draft", "accepted")]


def margin_of(steps: Any) -> float:
    """The smallest difference between the two likeliest tokens of a step. A third entry is the token that was taken."""
    best = [sorted((each.logprob for each in step.values()), reverse=True) for step in steps]
    return min(first - second for first, second, *_ in best)


def main(given: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from vllm_npu.tools.engines.tiny_models import demo_prompts

    strategies = given.get("strategies", [])
    options = given.get("options", {})
    ours = {"vllm_npu": {"moe_comm": given.get("moe_comm", "auto")}} if strategies else {}
    additional = options.pop("additional_config", {}) | ours
    arguments = {
        "dtype": "float16",
        "enforce_eager": True,
        "tensor_parallel_size": given["tp"],
        "enable_expert_parallel": True,
        "max_model_len": 64,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "additional_config": additional,
    }
    engine = LLM(given["model"], **arguments | options)
    limits = given.get("max_tokens", 4)
    each_limit = limits if isinstance(limits, list) else [limits] * len(demo_prompts())
    logprobs = 2 if given.get("margins") else None
    greedy = [
        SamplingParams(temperature=0, max_tokens=limit, ignore_eos=True, logprobs=logprobs) for limit in each_limit
    ]
    adapters = None
    if "adapter" in given:
        request = LoRARequest("adapter", 1, given["adapter"])
        adapters = [request if number % 2 else None for number in range(len(demo_prompts()))]
    tokens: dict[str, list[list[int]]] = {}
    margins: dict[str, list[float]] = {}
    ran, compared, drafted, placements = {}, {}, {}, []
    for strategy in strategies or [OWN]:
        if strategies and "moe_comm" not in given:
            engine.collective_rpc("set_moe_comm", args=(strategy,))
        before, tokens[strategy] = drafts(engine), []
        for _ in range(given.get("rounds", 1)):
            outputs = engine.generate(demo_prompts(), greedy, use_tqdm=False, lora_request=adapters)
            tokens[strategy] += [list(each.outputs[0].token_ids) for each in outputs]
            margins[strategy] = [margin_of(each.outputs[0].logprobs) for each in outputs if logprobs]
            if "eplb_config" in additional:
                placements.append(engine.collective_rpc(placement))
        drafted[strategy] = [now - then for now, then in zip(drafts(engine), before, strict=True)]
        if strategies:
            counters = engine.collective_rpc("moe_comm_counters")
            ran[strategy] = [each["strategy"] for each in counters]
            compared[strategy] = [each.get("comparison") for each in counters]
    report = {
        "tokens": tokens,
        "ran": ran,
        "margins": margins,
        "compared": compared,
        "drafted": drafted,
        "placements": placements,
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
