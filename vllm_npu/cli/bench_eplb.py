"""`vllm-npu bench eplb`: times of every communicator that moves experts between ranks, in one run."""

from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_npu.cli.charts import import_pyplot
from vllm_npu.cli.outputs import JsonPath, PlotPath, conditions_title, write_rows
from vllm_npu.cli.shared_options import SeveralRanks
from vllm_npu.cli.transport_choice import BETWEEN_PROCESSES
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.tools.eplb_benchmark import (
    HIDDEN_SIZE,
    INTERMEDIATE_SIZE,
    EplbResult,
    EplbWorkload,
    Peers,
    measure_eplb,
)
from vllm_npu.tools.layers import DTYPES
from vllm_npu.tools.rank_pools import measuring_conditions, open_rank_pool

if TYPE_CHECKING:
    from vllm_npu.tools.vllm_eplb import Balance

TRANSPORTS_OF_VLLM = ("gloo", "nccl")  # vLLM has communicators for the devices of these transports


def bench_eplb(
    transport: Annotated[str, typer.Option(help=f"How ranks communicate: {', '.join(BETWEEN_PROCESSES)}.")] = "gloo",
    ranks: SeveralRanks = 2,
    experts: Annotated[int, typer.Option(min=1, help="Experts that each rank sends and receives.")] = 4,
    scale: Annotated[int, typer.Option(min=1, help="Divisor of both sizes of DeepSeek-V3's experts.")] = 8,
    dtype: Annotated[str, typer.Option(help=f"dtype of the weights: {', '.join(DTYPES)}.")] = "bfloat16",
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds. Each round moves the experts once by every communicator.")
    ] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the load that is balanced.")] = 0,
    plot: PlotPath = None,
    json_path: JsonPath = None,
) -> None:
    """Measure the move of experts to the next rank by every communicator of the device. Experts have DeepSeek-V3's shape,
    scaled down.

    The slowest rank gives the time of a round. The weights that arrive are compared with those that were sent. If vLLM is
    installed, its own communicators are measured too, and its policy balances a skewed load of DeepSeek-V3's experts by
    arithmetic.
    """
    if plot is not None:
        import_pyplot()
    if transport not in BETWEEN_PROCESSES:
        raise UnsupportedConfigError(f"unknown transport {transport!r}; there are: {', '.join(BETWEEN_PROCESSES)}")
    if dtype not in DTYPES:
        raise UnsupportedConfigError(f"unknown dtype {dtype!r}; there are: {', '.join(DTYPES)}")
    if INTERMEDIATE_SIZE % scale or HIDDEN_SIZE % scale:
        raise UnsupportedConfigError(
            f"--scale {scale} does not divide {HIDDEN_SIZE} and {INTERMEDIATE_SIZE}; take a power of 2"
        )
    workload = EplbWorkload(experts=experts, scale=scale, dtype=DTYPES[dtype], rounds=rounds)
    peers, balances = _of_vllm(transport, seed)
    with open_rank_pool(transport, ranks) as (pool, device):
        results = pool.run(measure_eplb, workload, peers)[0]
    conditions = {
        **measuring_conditions(transport, ranks, device),
        "experts": experts,
        "scale": scale,
        "dtype": dtype,
        "rounds": rounds,
        "mib_per_rank": round(workload.bytes_per_rank / 2**20, 2),
    }
    table = Table(
        "communicator", "ms (median)", "min", "max", "GB/s a rank",
        title=conditions_title(conditions),
    )  # fmt: skip
    fastest = min(results, key=lambda each: each.ms_median)
    for result in results:
        table.add_row(
            f"[bold]{result.name}[/bold]" if result is fastest else result.name,
            f"{result.ms_median:,.2f}", f"{result.ms_min:,.2f}", f"{result.ms_max:,.2f}", f"{result.gb_per_second:.2f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    if balances:
        title = f"fullest rank's load over the mean: {balances[0].conditions}"
        table = Table("ranks", "redundant experts", "at the start", "as vLLM's policy places them", title=title)
        for each in balances:
            table.add_row(str(each.ranks), str(each.redundant_experts), f"{each.before:.3f}", f"{each.after:.3f}")
        console.print(table)
    else:
        console.print(
            "vLLM's communicators and its policy are left out: vLLM is not installed, or has none for this device"
        )
    if plot is not None:
        _draw(results, balances, conditions, plot)
    write_rows(json_path, [*({**conditions, **asdict(result)} for result in results), *map(asdict, balances)])


def _of_vllm(transport: str, seed: int) -> "tuple[Peers | None, list[Balance]]":
    """vLLM's communicators, and the balance that its policy reaches. Nothing if vLLM is missing or has none for the device."""
    if transport not in TRANSPORTS_OF_VLLM or find_spec("vllm") is None:
        return None, []
    from vllm_npu.tools.vllm_eplb import CASES, balance, vllm_communicators

    return vllm_communicators, [balance(ranks, redundant, seed) for ranks, redundant in CASES]


def _draw(
    results: "Sequence[EplbResult]", balances: "Sequence[Balance]", conditions: dict[str, Any], path: Path
) -> None:
    """Draw the times as bars, with whiskers from the fastest to the slowest round, and beside them the balance of each load."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(1, 2 if balances else 1, figsize=(11, 4.5), squeeze=False, constrained_layout=True)
    medians = [each.ms_median for each in results]
    reach = [[each.ms_median - each.ms_min for each in results], [each.ms_max - each.ms_median for each in results]]
    names = [f"{each.name}\n{each.gb_per_second:.2f} GB/s" for each in results]
    axes[0, 0].bar(names, medians, yerr=reach, capsize=4)
    axes[0, 0].set(ylabel="ms (median; whiskers: fastest and slowest round)")
    axes[0, 0].set_title(conditions_title(conditions), fontsize=7, wrap=True)
    if balances:
        places = range(len(balances))
        for offset, label, values in (
            (-0.2, "at the start", [each.before for each in balances]),
            (0.2, "as vLLM's policy places them", [each.after for each in balances]),
        ):
            bars = axes[0, 1].bar([place + offset for place in places], values, width=0.4, label=label)
            axes[0, 1].bar_label(bars, fmt="%.2f", fontsize=8)
        axes[0, 1].axhline(1, color="black", linewidth=0.8)
        axes[0, 1].set_xticks(list(places), [f"{each.ranks} ranks\n+{each.redundant_experts}" for each in balances])
        axes[0, 1].set(ylabel="fullest rank's load over the mean")
        axes[0, 1].set_title(f"arithmetic: {balances[0].conditions}", fontsize=7, wrap=True)
        axes[0, 1].legend(fontsize=8)
    figure.savefig(path, dpi=150)
