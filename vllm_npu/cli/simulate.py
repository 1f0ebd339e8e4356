"""`vllm-npu simulate`: estimated times of a layer's exchange on clusters of 2 to 768 ranks."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from vllm_npu.cli.charts import import_pyplot
from vllm_npu.cli.outputs import JsonPath, in_a_folder, write_rows
from vllm_npu.cli.shared_options import Dtype, HiddenSize, TopK
from vllm_npu.core.limits import MoELayer
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.strategies.table import ALL_STRATEGIES
from vllm_npu.tools.calibration import PublishedTime, calibration_of, is_one_number, published_times
from vllm_npu.tools.layers import moe_layer
from vllm_npu.tools.link_model import Fabric, fabrics
from vllm_npu.tools.simulation import Estimate, Workload, estimates, fastest

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
            name: [[_leader(estimates(figures, workload(ep_size, step))) for ep_size in sizes] for step in STEPS]
            for name, figures in chosen.items()
        }
        _draw(pyplot, best, sizes, chosen, f"{_describe(layer)}, skew {skew:g}", plot)


class Leader(NamedTuple):
    """The strategy with the shortest estimate of an exchange."""

    strategy: str
    is_certain: bool  # whether its interval ends before any other's begins


def _leader(found: Sequence[Estimate]) -> Leader:
    shortest = fastest(found)
    others = [each.exchange_us * each.low for each in found if each is not shortest and each.reason is None]
    return Leader(shortest.strategy, shortest.exchange_us * shortest.high < min(others, default=float("inf")))


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
                dispatch, combine = (_interval(time, time, each) for time in (each.dispatch_us, each.combine_us))
                step = each.layer_us * layers / 1e3
                whole = _interval(step, each.exchange_us * layers / 1e3, each, digits=1)
                table.add_row(str(ep_size), name, dispatch, combine, f"{each.experts_us:,.0f}", whole, "yes")
        table.add_section()
    Console(width=None if Console().is_terminal else 140).print(table)


def _interval(time: float, exchange: float, of: Estimate, digits: int = 0) -> str:
    """A time, of which `exchange` may be off by the estimate's interval."""
    if is_one_number(of.low, of.high):
        return f"{time:,.{digits}f}"
    return f"{time + exchange * (of.low - 1):,.{digits}f}–{time + exchange * (of.high - 1):,.{digits}f}"


def published_table(compared: Sequence[PublishedTime]) -> list[str]:
    """The lines of a Markdown table. docs/simulate.md contains them."""
    lines = ["| published | EP | stage | published | estimated | error | half |", "|---|---|---|---|---|---|---|"]
    for each in compared:
        calibration = calibration_of(each.path)
        digits = 1 if each.published < 10 else 0
        estimated = f"{each.in_unit(each.estimated_us):,.{digits}f}"
        if not is_one_number(calibration.low, calibration.high):
            estimated = "–".join(f"{end:,.{digits}f}" for end in each.interval)
        lines.append(
            f"| {each.source} | {each.ep_size} | {each.stage} | {each.published:g} {each.unit} | {estimated} | "
            f"{each.error:+.0%} | {'fit' if each.fits else 'test'} |"
        )
    return lines


def _print_published(compared: Sequence[PublishedTime], json_path: Path | None) -> None:
    print("\n".join(published_table(compared)))
    write_rows(
        json_path, [{**asdict(each), "estimated_us": each.estimated_us, "error": each.error} for each in compared]
    )


def _draw(
    pyplot: Any,
    best: dict[str, list[list[Leader]]],
    sizes: list[int],
    chosen: dict[str, Fabric],
    title: str,
    path: Path,
) -> None:
    """Draw one field for each cluster: ranks on the x axis, tokens on the y axis, a colour for the fastest strategy, pale where
    the intervals of two strategies overlap."""
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
    for field, (name, leaders) in zip(axes.flat, best.items(), strict=False):
        numbers = [[names.index(leader.strategy) for leader in line] for line in leaders]
        field.pcolormesh(
            numbers,
            cmap=ListedColormap(colours),
            vmin=-0.5,
            vmax=len(names) - 0.5,
            alpha=[[1.0 if leader.is_certain else 0.4 for leader in line] for line in leaders],
            edgecolors="white",
            linewidth=0.5,
        )
        field.set_xticks([index + 0.5 for index in range(len(sizes))], labels=[str(size) for size in sizes])
        field.set_yticks([index + 0.5 for index in range(len(STEPS))], labels=[str(step) for step in STEPS])
        field.set(xlabel="EP size", ylabel="tokens of a rank")
        field.set_title(f"{name}: {chosen[name].summary}", fontsize=7, wrap=True)
    used = {leader.strategy for leaders in best.values() for line in leaders for leader in line}
    patches = [Patch(color=colours[names.index(name)], label=name) for name in names if name in used]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches))
    figure.suptitle(f"Shortest dispatch + combine, estimated: {title}; pale: another may be shorter", fontsize=9)
    figure.savefig(path, dpi=110)
