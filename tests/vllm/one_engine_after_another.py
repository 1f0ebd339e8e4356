"""One rank of two: offline engines of vLLM in this process, one after another, each with other groups.

Usage: one_engine_after_another.py MODEL PROMPTS.json TPxDP...    started as torchrun starts ranks, with RANK and WORLD_SIZE
PROMPTS.json holds pairs of a prompt's tokens and the number of tokens to generate. The tokens are the last line of the output.
"""

import gc
import json
import os
import sys
from pathlib import Path


def main() -> None:
    import torch.distributed as dist
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

    model, prompts, *topologies = sys.argv[1:]
    wanted = json.loads(Path(prompts).read_text())
    first_port = int(os.environ["MASTER_PORT"])
    tokens = []
    for number, topology in enumerate(topologies):
        os.environ["MASTER_PORT"] = str(first_port + number)
        tp_size, dp_size = map(int, topology.split("x"))
        engine = LLM(
            model=model,
            dtype="float32",
            tensor_parallel_size=tp_size,
            data_parallel_size=dp_size,
            enable_expert_parallel=True,
            distributed_executor_backend="external_launcher",
            enforce_eager=True,
            max_model_len=256,
            max_num_seqs=8,
            kv_cache_memory_bytes=64 << 20,
            seed=0,
            additional_config={"vllm_npu": {"moe_comm": "all2all" if number % 2 == 0 else "allgather"}},
        )
        answers = engine.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in wanted],
            [
                SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
                for _, count in wanted
            ],
            use_tqdm=False,
        )
        tokens.append([list(answer.outputs[0].token_ids) for answer in answers])
        engine.llm_engine.engine_core.shutdown()
        del engine, answers
        gc.collect()
        destroy_model_parallel()
        destroy_distributed_environment()
        assert not dist.is_initialized()
    print(json.dumps(tokens), flush=True)


if __name__ == "__main__":
    main()
