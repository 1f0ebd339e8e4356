"""The tables of `vllm-npu demo`."""

from collections.abc import Sequence

from rich.table import Table

from vllm_npu.tools.demo.ascend_demo import OFF, ServedRow
from vllm_npu.tools.demo.recipe_demo import RecipeRow
from vllm_npu.tools.demo.vanilla_demo import Reference, StrategyRow


def vanilla_table(references: dict[str, Reference], rows: Sequence[StrategyRow]) -> Table:
    """One line for each reference and each strategy, grouped by model."""
    balanced = any(row.experts_moved is not None for row in rows)
    moving = ", while experts move between ranks (EPLB)" if balanced else ""
    table = Table(title=f"Greedy tokens against vanilla vLLM{moving}", title_justify="left")
    for header in ("model", "topology", "strategy"):
        table.add_column(header, no_wrap=True)
    for header in ("tokens\nidentical", "collectives\nper MoE layer", "bytes sent per\ntoken and layer", "tokens/s"):
        table.add_column(header, justify="right", no_wrap=True)
    if balanced:
        table.add_column("experts\nmoved", justify="right", no_wrap=True)
    for reference in references.values():
        num_tokens = sum(map(len, reference.tokens))
        table.add_row(
            reference.model, "TP1", "vanilla vLLM", "reference", "–", "–", f"{num_tokens / reference.seconds:.1f}"
        )
        for row in (row for row in rows if row.model == reference.model):
            topology = f"{row.topology} compiled" if row.mode.startswith("compiled") else row.topology
            table.add_row(
                row.model,
                topology,
                row.strategy if row.strategies_run == [row.strategy] else f"{row.strategy} → {row.strategies_run}",
                f"{row.tokens_identical}/{row.tokens_total}",
                f"{row.collectives_per_moe_layer:.1f}",
                f"{row.bytes_sent_per_token_per_layer:,.0f}",
                f"{row.tokens_per_second:.1f}",
                *([str(row.experts_moved)] if balanced else []),
                style=None if row.passed else "red",
            )
        table.add_section()
    return table


def ascend_table(rows: Sequence[ServedRow]) -> Table:
    """One line for each strategy, grouped by chip, model, topology and graphs."""
    table = Table(
        title="Greedy tokens over HTTP against vllm-ascend's own path, on emulated NPUs", title_justify="left"
    )
    for header in ("chip", "model", "topology", "graphs", "strategy"):
        table.add_column(header, no_wrap=header != "graphs", overflow="fold")
    for header in ("tokens\nidentical", "collectives\nper MoE layer", "bytes sent\nper MoE layer", "seconds"):
        table.add_column(header, justify="right")
    previous = None
    for row in rows:
        group = row.chip, row.model, row.topology, row.graph_mode or "eager"
        if previous not in (None, group):
            table.add_section()
        previous = group
        if row.not_legal is not None:
            table.add_row(*group, row.strategy, f"not legal: {row.not_legal}", "–", "–", "–")
            continue
        identical = "reference" if row.is_reference else f"{row.tokens_identical}/{row.tokens_total}"
        counted = row.collectives_per_moe_layer is not None and row.bytes_per_moe_layer is not None
        table.add_row(
            *group,
            _asked_and_ran(row),
            identical,
            f"{row.collectives_per_moe_layer:.1f}" if counted else "–",
            f"{row.bytes_per_moe_layer:,.0f}" if counted else "–",
            f"{row.seconds:.1f}",
            style=None if row.passed else "red",
        )
    return table


def recipe_table(rows: Sequence[RecipeRow]) -> Table:
    """One line for each recipe."""
    table = Table(
        title="Recipes on tiny models and emulated A3: tokens with moe_comm=auto against vllm-ascend alone",
        title_justify="left",
    )
    for header in ("recipe", "runs as", "strategy", "tokens\nidentical", "left out"):
        table.add_column(header, overflow="fold")
    for row in rows:
        if row.not_run is not None:
            table.add_row(row.recipe, row.runs_as, "–", f"not run: {row.not_run}", ", ".join(row.left_out))
            continue
        counts = "failed" if row.failed else f"{row.tokens_identical}/{row.tokens_total}"
        table.add_row(
            row.recipe,
            row.runs_as,
            ", ".join(row.ran) or "–",
            counts,
            ", ".join(row.left_out),
            style=None if row.passed else "red",
        )
    return table


def _asked_and_ran(row: ServedRow) -> str:
    if row.strategy == OFF:
        return "vllm-ascend (off)"
    return row.strategy if row.ran in ([], [row.strategy]) else f"{row.strategy} → {', '.join(row.ran)}"
