"""`vllm-npu bench eplb`: every way of moving experts between ranks, in one run."""

import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from vllm_npu.cli.bench import BETWEEN_PROCESSES
from vllm_npu.cli.devices import rank_pool
from vllm_npu.cli.layers import DTYPES
from vllm_npu.eplb.benchmark import HIDDEN_SIZE, INTERMEDIATE_SIZE, EplbWorkload, measure_eplb
from vllm_npu.errors import UnsupportedConfigError


def bench_eplb(
    transport: Annotated[str, typer.Option(help=f"How ranks talk: {', '.join(BETWEEN_PROCESSES)}.")] = "gloo",
    ranks: Annotated[int, typer.Option(min=2, max=16, help="Ranks to start on this machine.")] = 2,
    experts: Annotated[int, typer.Option(min=1, help="Experts that each rank sends and receives.")] = 4,
    scale: Annotated[int, typer.Option(min=1, help="Divides both sizes of DeepSeek-V3's experts.")] = 8,
    dtype: Annotated[str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}.")] = "bfloat16",
    rounds: Annotated[int, typer.Option(min=1, help="Each moves the experts once by every communicator.")] = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
) -> None:
    """Time the move of experts of DeepSeek-V3's shape, scaled down, to the next rank, through every communicator of the device.

    A round's time is its slowest rank's. What arrived is compared with what was sent.
    """
    if transport not in BETWEEN_PROCESSES:
        raise UnsupportedConfigError(f"unknown transport {transport!r}; there are: {', '.join(BETWEEN_PROCESSES)}")
    if dtype not in DTYPES:
        raise UnsupportedConfigError(f"unknown dtype {dtype!r}; there are: {', '.join(DTYPES)}")
    if INTERMEDIATE_SIZE % scale or HIDDEN_SIZE % scale:
        raise UnsupportedConfigError(
            f"--scale {scale} does not divide {HIDDEN_SIZE} and {INTERMEDIATE_SIZE}; take a power of 2"
        )
    workload = EplbWorkload(experts=experts, scale=scale, dtype=DTYPES[dtype], rounds=rounds)
    with rank_pool(transport, ranks) as (pool, device):
        results = pool.run(measure_eplb, workload)[0]
    conditions = {
        "device": torch.cuda.get_device_name() if device == "GPU" else device,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transport": transport,
        "ranks": ranks,
        "experts": experts,
        "scale": scale,
        "dtype": dtype,
        "rounds": rounds,
        "mib_per_rank": round(workload.bytes_per_rank / 2**20, 2),
    }
    table = Table(
        "communicator", "ms (median)", "min", "max", "GB/s a rank",
        title=", ".join(f"{name} {value}" for name, value in conditions.items()),
    )  # fmt: skip
    fastest = min(results, key=lambda each: each.ms_median)
    for result in results:
        table.add_row(
            f"[bold]{result.name}[/bold]" if result is fastest else result.name,
            f"{result.ms_median:,.2f}", f"{result.ms_min:,.2f}", f"{result.ms_max:,.2f}", f"{result.gb_per_second:.2f}",
        )  # fmt: skip
    Console().print(table)
    if json_path is not None:
        rows = [{**conditions, **asdict(result)} for result in results]
        json_path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
