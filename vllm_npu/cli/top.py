"""`vllm-npu top`: the ranks of a running engine, live."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from vllm_npu.cli.outputs import JsonPath, write_rows
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.tools.top.rows import RankRow
from vllm_npu.tools.top.sources import Source, source_of

UNKNOWN = "-"


def top(
    place: Annotated[
        str,
        typer.Argument(
            metavar="URL|FOLDER", help="The server, or the folder in which the ranks record their collectives."
        ),
    ],
    seconds: Annotated[float, typer.Option(min=0.1, help="Between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one table, and end.")] = False,
    json_path: JsonPath = None,
) -> None:
    """Show the ranks of a running engine: strategy, tokens and bytes a second, who waits since when, who is late, the epoch.

    A server shows steps, tokens and bytes (VLLM_NPU_METRICS=1). A folder of traces shows the collective in which each rank is,
    and for whom others wait (VLLM_NPU_RECORD=FOLDER). Ends with Ctrl-C.
    """
    source, console = source_of(place), Console()
    rows = source.rows()
    if once or not console.is_terminal:
        if place.startswith("http"):
            time.sleep(seconds)  # a rate needs two looks
            rows = source.rows()
        console.print(table(rows, place))
    else:
        rows = _watch(source, rows, place, seconds, console)
    write_rows(json_path, [asdict(row) for row in rows])


def _watch(source: Source, rows: list[RankRow], place: str, seconds: float, console: Console) -> list[RankRow]:
    """Show the rows until Ctrl-C, and return the last ones."""
    try:
        with Live(table(rows, place), console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(seconds)
                try:
                    rows = source.rows()
                    live.update(table(rows, place), refresh=True)
                except UnsupportedConfigError as error:  # the server may be starting again
                    live.update(table(rows, f"{place}: {error}"), refresh=True)
    except KeyboardInterrupt:
        return rows


def table(rows: Sequence[RankRow], title: str) -> Table:
    """The rows as a table. A rank that others wait for is red."""
    drawn = Table(
        *("rank", "strategy", "step", "tokens/s", "MB/s sent", "waiting since", "late", "epoch", "collective"),
        title=title,
    )
    for row in rows:
        drawn.add_row(
            str(row.rank),
            row.strategy or UNKNOWN,
            _number(row.step, "d"),
            _number(row.tokens, ",.0f"),
            _number(None if row.sent_bytes is None else row.sent_bytes / 1e6, ",.2f"),
            _number(row.waiting_seconds, ".1f", " s"),
            _number(row.late_seconds, ".1f", " s"),
            _number(row.epoch, "d"),
            row.call or UNKNOWN,
            style="bold red" if row.late_seconds is not None else "",
        )
    return drawn


def _number(value: float | None, form: str, unit: str = "") -> str:
    return UNKNOWN if value is None else f"{value:{form}}{unit}"
