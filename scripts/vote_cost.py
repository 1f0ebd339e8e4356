"""Measures how much time the vote on each step's plan adds to a decode step: real vLLM, DP2×EP on the CPU.

Usage: $PY scripts/vote_cost.py [--rounds 8] [--layers 3]    with the python of scripts/setup.sh

Two engines decode the same number of tokens together. Every second block of steps has no vote. The number of the step decides,
and it is the same on both ranks. The time of a step is the time from one plan to the next. The model is tiny, so the vote takes
a larger share of a step than in real models.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

BLOCK = 20  # steps with the vote, then as many without
SKIPPED = 2  # steps at the beginning of a block that do not count
TIMES_FOLDER = "VOTE_COST_FOLDER"


class VoteInBlocks:
    """vLLM's worker extension. vLLM imports this module in a worker for it, and the import changes the planner."""


def install() -> None:
    from vllm_npu.plugin.step_planner import StepPlanner

    start_vote, plan = StepPlanner._start_vote, StepPlanner.plan
    times = (Path(os.environ[TIMES_FOLDER]) / f"{os.getpid()}.times").open("w", buffering=1 << 16)

    def in_blocks(self: Any, step: Any) -> None:
        if self._planned < BLOCK or votes(self._planned):
            start_vote(self, step)

    def timed(self: Any, num_tokens_across_dp: list[int], **options: Any) -> Any:
        print(self._planned, time.perf_counter(), *num_tokens_across_dp, file=times, flush=self._planned % 500 == 0)
        return plan(self, num_tokens_across_dp, **options)

    StepPlanner._start_vote, StepPlanner.plan = in_blocks, timed  # type: ignore[method-assign,assignment]


def votes(step: int) -> bool:
    return step // BLOCK % 2 == 0


def rank_main(rank: int, model: str, port: str, rounds: int) -> None:
    os.environ.update(VLLM_DP_RANK=str(rank), VLLM_DP_RANK_LOCAL=str(rank), VLLM_DP_SIZE="2",
                      VLLM_DP_MASTER_IP="127.0.0.1", VLLM_DP_MASTER_PORT=port)  # fmt: skip
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, skip_tokenizer_init=True, dtype="float32", enable_expert_parallel=True, enforce_eager=True,
              disable_log_stats=True, max_model_len=256, max_num_seqs=8, kv_cache_memory_bytes=64 << 20,
              enable_prefix_caching=False, worker_extension_cls="vote_cost.VoteInBlocks",
              additional_config={"vllm_npu": {"moe_comm": "all2all"}})  # fmt: skip
    prompts: Any = [{"prompt_token_ids": [7 * i + 2, 5, 9]} for i in range(8)]
    for _ in range(rounds):
        llm.generate(
            prompts, SamplingParams(temperature=0, max_tokens=240, ignore_eos=True, detokenize=False), use_tqdm=False
        )
    llm.llm_engine.engine_core.shutdown()


def step_times(file: Path) -> dict[bool, list[float]]:
    """Milliseconds of decode steps with the vote (True) and without it (False), if both ranks have all sequences."""
    found: dict[bool, list[float]] = {True: [], False: []}
    lines = [line.split() for line in file.read_text().splitlines()]
    for (step, began, *counts), (following, ended, *_) in pairwise(lines):
        number = int(step)
        if counts == ["8", "8"] and int(following) == number + 1 and number >= BLOCK and number % BLOCK >= SKIPPED:
            found[votes(number)].append((float(ended) - float(began)) * 1e3)
    return found


def main() -> None:
    from vllm_npu.child_processes import free_port
    from vllm_npu.tools.engines.engine_processes import engine_environment, folder_for_sockets
    from vllm_npu.tools.engines.tiny_models import QWEN3_MOE, write_tiny_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="of 240 decode steps")
    parser.add_argument("--layers", type=int, default=3, help="of the model")
    parser.add_argument("--json", type=Path, dest="json_path")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vote-", dir=folder_for_sockets()) as name:
        folder = Path(name)
        config = dict(QWEN3_MOE.config) | {"num_hidden_layers": options.layers}
        model = write_tiny_model(replace(QWEN3_MOE, config=config), folder / "model")
        environment = engine_environment(folder / "caches", vanilla=False) | {
            "PYTHONPATH": str(Path(__file__).parent), "TMPDIR": name, TIMES_FOLDER: name, "TORCHDYNAMO_DISABLE": "1",
            "VLLM_NPU_COUNT_COLLECTIVES": "0",
        }  # fmt: skip
        port = str(free_port())
        ranks = []
        for rank in range(2):
            code = f"import vote_cost; vote_cost.rank_main({rank}, {str(model)!r}, {port!r}, {options.rounds})"
            ranks.append(subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=sys.stderr))
        codes = [rank.wait() for rank in ranks]
        by_rank = [times for file in sorted(folder.glob("*.times")) if (times := step_times(file))[True]]
    report = {
        "layers": options.layers,
        "rounds": options.rounds,
        "exit_codes": codes,
        "ranks": [_summary(times) for times in by_rank],
    }
    if options.json_path is not None:
        options.json_path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def _summary(times: dict[bool, list[float]]) -> dict[str, Any]:
    with_vote, without = times[True], times[False]
    quantiles = {name: [round(value, 3) for value in statistics.quantiles(each, n=10)] for name, each in
                 (("with", with_vote), ("without", without))}  # fmt: skip
    medians = statistics.median(with_vote), statistics.median(without)
    return {
        "steps": [len(with_vote), len(without)],
        "median_ms_with": round(medians[0], 3),
        "median_ms_without": round(medians[1], 3),
        "share_percent": round((medians[0] / medians[1] - 1) * 100, 2),
        "deciles_ms": quantiles,
    }


if __name__ == "__main__":
    main()
elif TIMES_FOLDER in os.environ and "VLLM_DP_RANK" in os.environ:
    install()
