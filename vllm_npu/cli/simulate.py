"""`vllm-npu simulate`: estimated times of a layer's exchange on clusters of 2 to 768 ranks."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_npu.cli.charts import import_pyplot
from vllm_npu.cli.outputs import JsonPath, in_a_folder, write_rows
from vllm_npu.cli.shared_options import Dtype, HiddenSize, TopK
from vllm_npu.core.limits import MoELayer
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.strategies.table import ALL_STRATEGIES
from vllm_npu.tools.layers import moe_layer
from vllm_npu.tools.simulation import (
    Estimate,
    Fabric,
    PublishedTime,
    Workload,
    estimates,
    fabrics,
    fastest,
    published_times,
)

EP_SIZES = "2,4,8,16,32,64,128,256,384,512,768"
STEPS = [1 << power for power in range(13)]  # tokens of a rank: 1 to 4096


def simulate(
    fabric: Annotated[str, typer.Option(help=f"Clusters, separated by commas: {', '.join(fabrics())}.")] = ",".join(
        fabrics()
    ),
    ep: Annotated[str, typer.Option(help="Numbers of data-parallel ranks, separated by commas.")] = EP_SIZES,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each rank.")] = 128,
    experts: Annotated[
        int,
        typer.Option(min=1, help="Experts of the layer. Redundant ones make ranks equal."),
    ] = 256,
    topk: TopK = 8,
    hidden: HiddenSize = 7168,
    intermediate: Annotated[int, typer.Option(min=1, help="Intermediate size of an expert.")] = 2048,
    layers: Annotated[int, typer.Option(min=1, help="MoE layers of the model.")] = 58,
    dtype: Dtype = "bfloat16",
    skew: Annotated[
        float, typer.Option(min=0, help="Exponent of a Zipf law of the experts' popularity; 0: uniform.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the popularity and of the rows that ranks receive.")] = 0,
    published: Annotated[
        bool, typer.Option("--published", help="Compare estimates with published times instead.")
    ] = False,
    json_path: JsonPath = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            callback=in_a_folder, help="Draw the fastest strategy for each size in this file: .png, .svg, .pdf."
        ),
    ] = None,
) -> None:
    """Estimate the times of dispatch, combine and all MoE layers of a step from bandwidths and start-up times of clusters.

    Nothing runs. The estimates ignore contention, the time of the host and overlap. --published compares such estimates with
    times that others have measured. The defaults are DeepSeek-V3's layer.
    """
    if published:
        _print_published(published_times(), json_path)
        return
    chosen = {name: _fabric(name) for name in fabric.split(",")}
    sizes = _sizes(ep)
    layer = moe_layer(experts, topk, hidden, dtype)
    pyplot = None if plot is None else import_pyplot()

    def workload(ep_size: int, num_tokens: int) -> Workload:
        return Workload(
            layer=layer, ep_size=ep_size, tokens=num_tokens, intermediate_size=intermediate, skew=skew, seed=seed
        )

    rows = []
    for name, figures in chosen.items():
        found = {ep_size: estimates(figures, workload(ep_size, tokens)) for ep_size in sizes}
        _print_estimates(f"{name}: {figures.summary}; {tokens} tokens a rank", found, layers)
        rows += [
            {
                "fabric": name,
                "ep_size": ep_size,
                "tokens": tokens,
                "step_ms": each.layer_us * layers / 1e3,
                **asdict(each),
            }
            for ep_size, each_found in found.items()
            for each in each_found
            if each.reason is None
        ]
    write_rows(json_path, rows)
    if plot is not None:
        best = {
            name: [
                [fastest(estimates(figures, workload(ep_size, step))).strategy for ep_size in sizes] for step in STEPS
            ]
            for name, figures in chosen.items()
        }
        _draw(pyplot, best, sizes, chosen, f"{_describe(layer)}, skew {skew:g}", plot)


def _fabric(name: str) -> Fabric:
    if name not in fabrics():
        raise UnsupportedConfigError(f"unknown --fabric {name!r}; there are: {', '.join(fabrics())}")
    return fabrics()[name]


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(each) for each in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 2 or max(sizes) > 768:
        raise UnsupportedConfigError(f"--ep {text!r}: give sizes from 2 to 768 by commas, such as 8,64,768")
    return sizes


def _describe(layer: MoELayer) -> str:
    return f"{layer.num_experts} experts top {layer.top_k}, hidden size {layer.hidden_size}"


def _print_estimates(title: str, found: dict[int, list[Estimate]], layers: int) -> None:
    table = Table(
        "EP", "strategy", "dispatch µs", "combine µs", "experts µs", f"{layers} layers ms", "runs", title=title
    )
    for ep_size, each_found in found.items():
        shortest = fastest(each_found)
        for each in each_found:
            name = f"[bold]{each.strategy}[/bold]" if each is shortest else each.strategy
            if each.reason is not None:
                table.add_row(str(ep_size), name, "", "", "", "", f"no: {each.reason}")
            else:
                times = (f"{each.dispatch_us:,.0f}", f"{each.combine_us:,.0f}", f"{each.experts_us:,.0f}")
                table.add_row(str(ep_size), name, *times, f"{each.layer_us * layers / 1e3:,.1f}", "yes")
        table.add_section()
    Console(width=None if Console().is_terminal else 140).print(table)


def published_table(compared: list[PublishedTime]) -> list[str]:
    """The lines of a Markdown table. docs/simulate.md contains them."""
    lines = ["| published | EP | stage | published | estimated | error |", "|---|---|---|---|---|---|"]
    for each in compared:
        error = f"{each.error:+.0%}{' (fitted)' if each.fitted else ''}"
        digits = 1 if each.published < 10 else 0
        lines.append(
            f"| {each.source} | {each.ep_size} | {each.stage} | {each.published:g} {each.unit} | "
            f"{each.estimated:,.{digits}f} | {error} |"
        )
    return lines


def _print_published(compared: list[PublishedTime], json_path: Path | None) -> None:
    print("\n".join(published_table(compared)))
    write_rows(json_path, [{**asdict(each), "error": each.error} for each in compared])


def _draw(
    pyplot: Any, best: dict[str, list[list[str]]], sizes: list[int], chosen: dict[str, Fabric], title: str, path: Path
) -> None:
    """Draw one field for each cluster: ranks on the x axis, tokens on the y axis, a colour for the fastest strategy."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    names = list(ALL_STRATEGIES)
    colours = [pyplot.get_cmap("tab10")(index) for index in range(len(names))]
    columns = min(len(best), 2)
    lines = -(-len(best) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(6.2 * columns, 4.2 * lines), constrained_layout=True, squeeze=False
    )
    for field in axes.flat[len(best) :]:
        field.set_visible(False)
    for field, (name, strategies) in zip(axes.flat, best.items(), strict=False):
        numbers = [[names.index(strategy) for strategy in line] for line in strategies]
        field.pcolormesh(
            numbers, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(names) - 0.5, edgecolors="white", linewidth=0.5
        )
        field.set_xticks([index + 0.5 for index in range(len(sizes))], labels=[str(size) for size in sizes])
        field.set_yticks([index + 0.5 for index in range(len(STEPS))], labels=[str(step) for step in STEPS])
        field.set(xlabel="EP size", ylabel="tokens of a rank")
        field.set_title(f"{name}: {chosen[name].summary}", fontsize=7, wrap=True)
    used = {strategy for strategies in best.values() for line in strategies for strategy in line}
    patches = [Patch(color=colours[names.index(name)], label=name) for name in names if name in used]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches))
    figure.suptitle(f"Shortest dispatch + combine, estimated: {title}", fontsize=9)
    figure.savefig(path, dpi=110)
