"""`vllm-npu families`: every MoE family of the installed vLLM on expert-parallel CPUs, as a table."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from vllm_npu.cli.outputs import JsonPath
from vllm_npu.cli.stages import console_for_tables, shown_session
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.tools.engines.engine_processes import require_vllm
from vllm_npu.tools.families.registry import Family, find_families
from vllm_npu.tools.families.sweep import FULL_TOPOLOGIES, QUICK_TOPOLOGIES, FamilyRow, Sweep


def families(
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Run this family; may be given more than once.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Also DP2 without EP, TP2×EP, TP2×DP2×EP and DP3×EP.")] = False,
    json_path: JsonPath = None,
    log_folder: Annotated[Path | None, typer.Option("--logs", help="Keep the engines' logs in this folder.")] = None,
) -> None:
    """Run every MoE family of vLLM's registry on expert-parallel CPUs, with a tiny random model.

    A family is right if every strategy gives the tokens of vanilla vLLM on one rank and of transformers, or if it is refused
    before a process starts. Exit status 1 if a family is wrong or crashes. About a minute for each family, five with --full.
    """
    require_vllm()
    chosen = choose(find_families(), only or [])
    with shown_session(log_folder) as session:
        sweep = Sweep(session, json_path)
        sweep.execute(chosen, FULL_TOPOLOGIES if full else QUICK_TOPOLOGIES)
    console = console_for_tables()
    console.print(table_of(sweep.rows))
    counts = Counter(row.verdict for row in sweep.rows)
    console.print(", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())), highlight=False)
    if any(row.is_fault for row in sweep.rows):
        raise typer.Exit(1)


def choose(found: list[Family], names: list[str]) -> list[Family]:
    """The named families; without names, all. Raises UnsupportedConfigError for a name that vLLM's registry does not have."""
    unknown = sorted(set(names) - {family.name for family in found})
    if unknown:
        raise UnsupportedConfigError(
            f"--only {', '.join(unknown)}: no MoE family of the installed vLLM; there are: "
            f"{', '.join(family.name for family in found)}"
        )
    return [family for family in found if not names or family.name in names]


def table_of(rows: list[FamilyRow]) -> Table:
    """One row for each family and topology."""
    table = Table(title="MoE families on CPUs")
    for column in ("family", "topology", "verdict", "tokens", "vanilla", "reason"):
        table.add_column(column, overflow="fold")
    for row in rows:
        total = row.tokens_total
        tokens = f"{min(row.identical.values())}/{total}" if row.identical else ""
        vanilla = "" if row.vanilla_identical is None else f"{row.vanilla_identical}/{total}"
        table.add_row(row.family, row.topology, row.verdict, tokens, vanilla, row.reason)
    return table
