"""Generates greedy tokens with one engine of vLLM beside vllm-ascend, once for each strategy.

    python tests/ascend/engine_program.py '{"model": FOLDER, "tp": 2, "strategies": ["mc2"]}'

Prints one JSON line: the tokens of each prompt by strategy, and the strategies that the workers ran. Without `strategies` the
engine has no section of this package, and the only entry is "vllm-ascend".
"""

import json
import sys
from typing import Any

OWN = "vllm-ascend"


def main(given: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams

    from vllm_npu.tools.engines.tiny_models import demo_prompts

    strategies = given.get("strategies", [])
    engine = LLM(
        given["model"],
        dtype="float16",
        enforce_eager=True,
        tensor_parallel_size=given["tp"],
        enable_expert_parallel=True,
        max_model_len=64,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        enable_prefix_caching=False,
        **({"additional_config": {"vllm_npu": {"moe_comm": "auto"}}} if strategies else {}),
    )
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    tokens, ran = {}, {}
    for strategy in strategies or [OWN]:
        if strategies:
            engine.collective_rpc("set_moe_comm", args=(strategy,))
        outputs = engine.generate(demo_prompts(), greedy, use_tqdm=False)
        tokens[strategy] = [list(each.outputs[0].token_ids) for each in outputs]
        if strategies:
            ran[strategy] = [counters["strategy"] for counters in engine.collective_rpc("moe_comm_counters")]
    print(json.dumps({"tokens": tokens, "ran": ran}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
