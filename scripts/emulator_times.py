"""Measures times of the emulated Ascend device on this machine, and prints the table of docs/emulator.md.

Usage: $PY scripts/emulator_times.py [--build]    with the python of scripts/setup.sh --emulator, on an idle machine

The numbers show how long tests take. They say nothing about an NPU. --build also measures a build from scratch, in a temporary
folder.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

LAUNCHES = 5
WARM_UP, REPEATS = 5, 40
CALLS = 200  # calls of an operator in one sample
TOKENS, HIDDEN, EXPERTS_PER_RANK, TOP_K = 64, 1024, 4, 4
ENABLE = "import vllm_npu.emulator; vllm_npu.emulator.enable(); "


@dataclass(frozen=True)
class TimedRow:
    """One line of the table."""

    what: str
    unit: str  # s, ms or µs
    samples: list[float]  # in seconds

    def __str__(self) -> str:
        scale = {"s": 1.0, "ms": 1e3, "µs": 1e6}[self.unit]
        values = (value * scale for value in spread(self.samples))
        low, middle, high = (
            f"{value:,.0f} {self.unit}" if value >= 100 else f"{value:.3g} {self.unit}" for value in values
        )
        return f"| {self.what} | {middle} | {low} | {high} |"


def spread(samples: list[float]) -> tuple[float, float, float]:
    """The 10th, 50th and 90th percentiles."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return tenths[0], statistics.median(samples), tenths[8]


# --- measurements, each in a new process ---


def timed(function: Callable[[], object], repeats: int = REPEATS, calls: int = 1) -> list[float]:
    """Seconds of one call, measured `repeats` times."""
    for _ in range(WARM_UP):
        function()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        samples.append((time.perf_counter() - start) / calls)
    return samples


def measure_operators() -> dict[str, list[float]]:
    import torch
    import torch_npu  # noqa: F401

    torch.set_num_threads(1)
    found = {}
    for device in ("npu", "cpu"):
        x = torch.ones(16, device=device)
        found[device] = timed(lambda x=x: x + 1, calls=CALLS)
    return found


def measure_ranks() -> dict[str, list[float]]:
    """Measure in each rank: the start of the process group, an all-reduce, and a layer's dispatch and combine."""
    import torch
    import torch.distributed as dist
    import torch_npu  # noqa: F401

    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("npu", rank)
    torch.npu.set_device(device)
    start = time.perf_counter()
    dist.init_process_group("hccl")
    one = torch.ones(1, device=device)
    dist.all_reduce(one)  # the first collective makes HCCL's communicator
    torch.npu.synchronize()
    found = {"init": [time.perf_counter() - start]}

    mebibyte = torch.ones(1 << 18, device=device)

    def reduce() -> None:
        dist.all_reduce(mebibyte)
        torch.npu.synchronize()

    found["all_reduce"] = timed(reduce)

    experts = EXPERTS_PER_RANK * num_ranks
    members = {
        "group_ep": dist.group.WORLD._get_backend(device).get_hccl_comm_name(rank),
        "ep_world_size": num_ranks,
        "ep_rank_id": rank,
        "moe_expert_num": experts,
    }
    torch.manual_seed(rank)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16).to(device)
    ids = torch.rand(TOKENS, experts).argsort(1)[:, :TOP_K].int().to(device)
    weights = torch.rand(TOKENS, TOP_K).to(device)

    def there_and_back() -> None:
        rows, _, assist, _, counts, *_ = torch.ops.npu.npu_moe_distribute_dispatch_v2(x, ids, **members)
        torch.ops.npu.npu_moe_distribute_combine_v2(rows, ids, assist, counts, weights, **members)
        torch.npu.synchronize()

    found["layer"] = timed(there_and_back)
    dist.destroy_process_group()
    return found


MEASUREMENTS = {"operators": measure_operators, "ranks": measure_ranks}


# --- the main process ---


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def in_emulated_ranks(measurement: str, num_ranks: int) -> dict[str, list[float]]:
    """Times of the slowest rank."""
    arguments = ("-m", "vllm_npu.emulator", "run", "--soc", "A3", "--nproc", str(num_ranks), __file__)
    with tempfile.TemporaryDirectory() as folder:
        run(*arguments, "--measure", measurement, "--folder", folder)
        by_rank = [json.loads(Path(folder, str(rank)).read_text()) for rank in range(num_ranks)]
    return {name: [max(times) for times in zip(*(each[name] for each in by_rank), strict=True)] for name in by_rank[0]}


def seconds_of(*command: str, **environment: str) -> float:
    start = time.perf_counter()
    run(*command, **environment)
    return time.perf_counter() - start


def rows(with_build: bool) -> Iterator[TimedRow]:
    if with_build:
        with tempfile.TemporaryDirectory() as folder:
            built = seconds_of("-m", "vllm_npu.emulator", "build", VLLM_NPU_ENV_HOME=folder)
        yield TimedRow("build of the libraries, once", "s", [built])
    for what, code in (
        ("`import torch`", "import torch"),
        ("`enable()`, `import torch, torch_npu`", ENABLE + "import torch, torch_npu"),
        ("the same and `torch.ones(1, device='npu')`", ENABLE + "import torch, torch_npu; torch.ones(1, device='npu')"),
    ):
        yield TimedRow(f"process that does {what}", "s", [seconds_of("-c", code) for _ in range(LAUNCHES)])
    operators = in_emulated_ranks("operators", 1)
    for device in ("npu", "cpu"):
        yield TimedRow(f"`x + 1` of 16 float32 on {device}", "µs", operators[device])
    for num_ranks in (2, 4):
        launches = [in_emulated_ranks("ranks", num_ranks) for _ in range(LAUNCHES)]
        for name, what in (
            ("init", "`init_process_group` and the first `all_reduce`"),
            ("all_reduce", "`all_reduce` of 1 MiB"),
            ("layer", f"dispatch_v2 and combine_v2 of {TOKENS} tokens a rank, hidden size {HIDDEN}, top-{TOP_K}, bf16"),
        ):
            samples = [sample for launch in launches for sample in launch[name]]
            yield TimedRow(f"{what}, {num_ranks} ranks", "ms", samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true", help="measure a build as well")
    parser.add_argument("--measure", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        (options.folder / os.environ["RANK"]).write_text(json.dumps(MEASUREMENTS[options.measure]()))
        return
    load = os.getloadavg()[0]
    print(f"Load before: {load:.2f}. {len(os.sched_getaffinity(0))} cores, {platform.machine()}.\n")
    print("| emulated | median | p10 | p90 |\n|---|---|---|---|")
    for row in rows(options.build):
        print(row, flush=True)


if __name__ == "__main__":
    main()
