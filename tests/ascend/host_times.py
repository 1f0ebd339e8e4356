"""Host time of prepare and finalize: vllm-ascend's own classes and ours take turns on the same steps in one run. Then the host
time of a whole decode layer, eager and as a replayed graph, by vllm-ascend's communication and by ours.

    scripts/setup.sh --ascend   # prints a python
    PYTHON -m tests.ascend.host_times [CHIP [ROUNDS]]

The device is emulated, so the times show the host's work for a layer, and nothing about an NPU. Each stream has its own thread,
so a call returns before its collective has run, as on a device. The processor time of the calling thread is measured.

In the first table routing is not measured: vllm-ascend moves router logits, ours the weights and ids chosen from them.
The second table has the whole layer. Its paths run one after another in one process.

Only vllm-ascend's classes pad and concatenate. On the emulated device such an op runs on the calling thread and waits for its
stream. With one layer between two synchronisations this wait is short. With eight layers it is the time of the collectives.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from tests.ascend.layer_program import Sizes, make_layers

THEIRS, THROUGH_TORCH, OURS = "vllm-ascend's class", "ours, torch.distributed", "ours, C++ operators"
WARM_UP = 5
LAYERS = (1, 8)
# {strategy: (TP size, DP size, steps)}; a step has the number of tokens of each DP rank
WORKLOADS: dict[str, tuple[int, int, list[list[int]]]] = {
    "allgather": (1, 2, [[8, 8], [64, 64], [8, 5]]),
    "all2all": (2, 1, [[8], [64]]),
}
GRIDS = {"DP2": (1, 2), "TP2": (2, 1)}  # (TP size, DP size)
DECODE_TOKENS = 8  # of each data-parallel rank
OWN_METHODS = ["MC2", "ALLGATHER"]
LAYER = {"hidden": 2048, "experts": 64, "top_k": 8, "dtype": "bfloat16"}


def main(given: dict[str, Any]) -> None:
    """Run one rank. Print the microseconds a layer in each round, for each step, class and number of layers."""
    config, _ = make_layers(given, [Sizes(*(given[name] for name in Sizes._fields))])

    from vllm.config import set_current_vllm_config
    from vllm_ascend.ascend_forward_context import MoECommType, set_ascend_forward_context
    from vllm_ascend.ops.fused_moe.moe_comm_method import get_moe_comm_method

    from vllm_npu.core.step_plan import StepPlan, TokenSharding
    from vllm_npu.plugin.groups import model_groups
    from vllm_npu.strategies.select import build
    from vllm_npu.transport.base import Groups

    kind = {"allgather": MoECommType.ALLGATHER, "all2all": MoECommType.ALLTOALL}[given["strategy"]]
    theirs = get_moe_comm_method(kind).prepare_finalize
    groups = model_groups(expert_parallel=True)
    without = [type(each)(each.process_group, each.group) for each in (groups.tp, groups.dp, groups.ep)]
    for transport in without:
        transport._has_ops = lambda: False
    stages = {
        way: build(given["strategy"], each, given["experts"]).prepare_finalize
        for way, each in ((THROUGH_TORCH, Groups(groups.topology, *without)), (OURS, groups))
    }
    device = torch.device("npu", int(os.environ["RANK"]))

    def measure(counts: list[int]) -> list[dict[str, Any]]:
        tokens = counts[groups.topology.dp_rank]
        hidden = torch.randn(tokens, given["hidden"], device="cpu").bfloat16().to(device)
        logits = torch.randn(tokens, given["experts"], device="cpu").bfloat16().to(device)
        weights = torch.rand(tokens, given["top_k"], device="cpu").to(device)
        ids = torch.zeros(tokens, given["top_k"], dtype=torch.int32, device="cpu").to(device)
        step = StepPlan(num_tokens_across_dp=tuple(counts), sharding=TokenSharding.REPLICATED)

        def by_theirs() -> torch.Tensor:
            prepared = theirs.prepare(hidden, logits)
            return theirs.finalize(prepared.hidden_states, False, prepared.padded_hidden_states_shape)

        def by_ours(way: str) -> torch.Tensor:
            prepared = stages[way].prepare(hidden, (weights, ids), step)
            return stages[way].finalize(prepared.hidden_states, prepared.handle).hidden_states

        ways: dict[str, Callable[[], torch.Tensor]] = {
            THEIRS: by_theirs, THROUGH_TORCH: lambda: by_ours(THROUGH_TORCH), OURS: lambda: by_ours(OURS)
        }  # fmt: skip
        of_all_ranks = torch.tensor(counts, dtype=torch.int32) if given["dp"] > 1 else None
        with (
            torch.inference_mode(),
            set_current_vllm_config(config),
            set_ascend_forward_context(
                None, config, num_tokens=tokens, num_tokens_across_dp=of_all_ranks, num_actual_tokens=tokens
            ),
        ):
            reference = by_theirs().cpu()
            for way, function in ways.items():
                assert torch.equal(function().cpu(), reference), f"{way} {counts}"
            return [
                {
                    "counts": counts,
                    "layers": layers,
                    "times": _take_turns(ways, layers, given["rounds"], groups.ep.barrier),
                }
                for layers in LAYERS
            ]

    rows = [row for counts in given["steps"] for row in measure(counts)]
    print(json.dumps({"rank": int(os.environ["RANK"]), "rows": rows}), flush=True)


def _take_turns(
    ways: dict[str, Callable[[], torch.Tensor]], layers: int, rounds: int, barrier: Callable[[], None]
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(WARM_UP + rounds):
        for way, function in ways.items():
            torch.npu.synchronize()
            barrier()
            torch.npu.synchronize()
            start = time.thread_time()
            results = [function() for _ in range(layers)]
            end = time.thread_time()
            torch.npu.synchronize()
            del results
            if turn >= WARM_UP:
                times[way].append((end - start) * 1e6 / layers)
    return times


def table(chip: str, rounds: int) -> None:
    """Launch the ranks of each strategy, and print a table of their times. The slower rank of each round counts."""
    from tests.ascend.test_layer import run

    print(f"Load before: {os.getloadavg()[0]:.2f}; {len(os.sched_getaffinity(0))} cores, 2 ranks, emulated {chip}, {LAYER}, "
          f"{rounds} rounds.\n")  # fmt: skip
    print("| emulated | tokens | layers in a row | by | host µs (median) | p10 | p90 | of vllm-ascend's |")
    print("|---|---|---|---|---|---|---|---|")
    for strategy, (tp, dp, steps) in WORKLOADS.items():
        outcome, reports = run(
            chip,
            tp,
            dp,
            **LAYER,
            strategy=strategy,
            steps=steps,
            rounds=rounds,
            program=Path(__file__),
            env={"VLLM_NPU_EMULATOR_ASYNC": "1", "VLLM_LOGGING_LEVEL": "ERROR"},
        )
        if outcome.code != 0:
            sys.exit(re.sub(r"\n{2,}", "\n", outcome.output))
        for row, other in zip(*(report["rows"] for report in reports), strict=True):
            base = 0.0
            for way, own in row["times"].items():
                taken = [max(pair) for pair in zip(own, other["times"][way], strict=True)]
                tenths = quantiles(taken, n=10)
                base = base or median(taken)
                print(f"| {strategy} | {'/'.join(map(str, row['counts']))} | {row['layers']} | {way} | {median(taken):,.0f} "
                      f"| {tenths[0]:,.0f} | {tenths[8]:,.0f} | {median(taken) / base:.2f} |", flush=True)  # fmt: skip


def layer_table(chip: str, rounds: int) -> None:
    """Launch the ranks of each grid, and print a table of a decode layer's host times. The slower rank of each round counts."""
    from tests.ascend.test_layer import run

    print("\n| emulated | communication | eager, host µs (median) | p10 | p90 | captured | p10 | p90 |")
    print("|---|---|---|---|---|---|---|---|")
    for grid, (tp, dp) in GRIDS.items():
        outcome, reports = run(
            chip,
            tp,
            dp,
            **LAYER,
            graph=True,
            rounds=rounds,
            steps=[[DECODE_TOKENS] * dp],
            own=OWN_METHODS,
            strategies=["mc2", "allgather"],
            env={"VLLM_NPU_EMULATOR_ASYNC": "1", "VLLM_LOGGING_LEVEL": "ERROR"},
        )
        if outcome.code != 0:
            sys.exit(re.sub(r"\n{2,}", "\n", outcome.output))
        for row, other in zip(*(report["rows"] for report in reports), strict=True):
            cells = []
            for way, own in row["host_us"].items():
                taken = [max(pair) for pair in zip(own, other["host_us"][way], strict=True)][WARM_UP:]
                tenths = quantiles(taken, n=10)
                cells += [f"{value:,.0f}" for value in (median(taken), tenths[0], tenths[8])]
            print(f"| {grid} | {row['path']} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if "RANK" in os.environ:
        main(json.loads(sys.argv[1]))
    else:
        chip, rounds = (sys.argv[1:2] or ["A3"])[0], int((sys.argv[2:3] or ["60"])[0])
        table(chip, rounds)
        layer_table(chip, rounds)
