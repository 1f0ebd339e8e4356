"""`vllm-npu bench`: times of every strategy and of its peers, in one run."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_npu.cli.charts import import_pyplot
from vllm_npu.cli.outputs import JsonPath, PlotPath, conditions_title, write_rows
from vllm_npu.cli.shared_options import (
    Dtype,
    Experts,
    HiddenSize,
    SeveralRanks,
    TopK,
)
from vllm_npu.cli.transport_choice import BETWEEN_PROCESSES, chosen_transport
from vllm_npu.core.topology import ExpertPlacement
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.tools.benchmark import STRATEGY, Workload, best, counts_of, measure, with_ratios
from vllm_npu.tools.layers import moe_layer
from vllm_npu.tools.rank_pools import measuring_conditions, open_rank_pool


def bench(
    transport: Annotated[str, typer.Option(help=f"How ranks communicate: {', '.join(BETWEEN_PROCESSES)}.")] = "gloo",
    ranks: SeveralRanks = 4,
    tokens: Annotated[str, typer.Option(help="Tokens of a rank; separate several counts by commas.")] = "1,8,64,512",
    skew: Annotated[
        float, typer.Option(min=1, help="All ranks except the first have this many times fewer tokens.")
    ] = 1,
    hidden: HiddenSize = 2048,
    experts: Experts = 64,
    topk: TopK = 8,
    dtype: Dtype = "bfloat16",
    rounds: Annotated[int, typer.Option(min=3, help="Rounds. Each round measures every exchange once.")] = 30,
    graph: Annotated[bool, typer.Option("--graph", help="Replay captured CUDA graphs.")] = False,
    json_path: JsonPath = None,
    plot: PlotPath = None,
) -> None:
    """Measure the exchange of one layer's tokens by every strategy and by its peers: vLLM's AgRs, the original design's
    allgather and multicast, and single collectives.

    No expert runs. Each round measures all exchanges in turn, and the slowest rank gives the time. Ratios are to AgRs.
    Transport symmetric means nccl, with that strategy alone beside the peers.
    """
    if transport not in BETWEEN_PROCESSES:
        raise UnsupportedConfigError(f"unknown transport {transport!r}; there are: {', '.join(BETWEEN_PROCESSES)}")
    transport, only = chosen_transport(transport, None)
    layer = moe_layer(experts, topk, hidden, dtype)
    ExpertPlacement(experts, ranks)
    if plot is not None:
        import_pyplot()
    workloads = [
        Workload(counts=counts_of(count, ranks, skew), layer=layer, rounds=rounds, graph=graph, only=only)
        for count in _counts(tokens)
    ]
    rows: list[dict[str, Any]] = []
    with open_rank_pool(transport, ranks) as (pool, device):
        conditions = {
            **measuring_conditions(transport, ranks, device),
            "hidden_size": hidden,
            "experts": experts,
            "top_k": topk,
            "dtype": dtype,
            "rounds": rounds,
            "graph": graph,
        }
        title = conditions_title(conditions)
        table = Table(
            "tokens", "exchange", "µs (median)", "p10", "p90", "of AgRs", "collectives", "KiB sent a rank", "of link",
            title=title,
        )  # fmt: skip
        for workload in track(workloads, "measuring", console=Console(stderr=True)):
            results = pool.run(measure, workload)[0]
            fastest = best(results)
            for result, ratio in with_ratios(results):
                rows.append(
                    {
                        **conditions,
                        **asdict(result),
                        "strategy": result.name,
                        "tokens": list(workload.counts),
                        "ratio": round(ratio, 3),
                    }
                )
                table.add_row(
                    "/".join(map(str, workload.counts)) if skew > 1 else str(workload.counts[0]),
                    f"[bold]{result.name}[/bold]" if result is fastest else result.name,
                    f"{result.us_median:,.0f}", f"{result.us_p10:,.0f}", f"{result.us_p90:,.0f}", f"{ratio:.2f}",
                    str(result.collectives), f"{result.bytes_sent_per_rank / 1024:,.0f}",
                    f"{result.share_of_limit:.0%}",
                )  # fmt: skip
            table.add_section()
            table.caption = f"link: {results[0].link}, {results[0].link_gb_per_s:,.1f} GB/s sent by a rank"
    Console(width=None if Console().is_terminal else 140).print(table)
    write_rows(json_path, rows)
    if plot is not None:
        _draw(rows, title, plot)


def _counts(text: str) -> list[int]:
    try:
        counts = [int(each) for each in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise UnsupportedConfigError(f"--tokens {text!r}: give counts of 1 or more by commas, such as 1,8,512")
    return counts


def _draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw time over tokens on logarithmic axes: lines for strategies, dashes for peers, a band from p10 to p90."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 6), constrained_layout=True)
    for name in dict.fromkeys(row["strategy"] for row in rows):
        own = [row for row in rows if row["strategy"] == name]
        tokens = [max(row["tokens"]) for row in own]
        style = "-o" if own[0]["kind"] == STRATEGY else "--"
        (line,) = axes.plot(tokens, [row["us_median"] for row in own], style, label=name, markersize=4)
        low, high = ([row[key] for row in own] for key in ("us_p10", "us_p90"))
        axes.fill_between(tokens, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel="tokens of the fullest rank", ylabel="µs for one layer's exchange")
    axes.set_xticks(sorted({max(row["tokens"]) for row in rows}), labels=sorted({max(row["tokens"]) for row in rows}))
    axes.set_title(title, fontsize=7, wrap=True)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
