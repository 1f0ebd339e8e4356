"""Outputs of commands: options that name a file, files of rows, titles of tables and charts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer


def in_a_folder(path: Path | None) -> Path | None:
    """Callback of an option that names a file: refuse a missing folder before the work begins."""
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent}; create it")
    return path


JsonPath = Annotated[
    Path | None, typer.Option("--json", callback=in_a_folder, help="Write the results to this JSON file.")
]
PlotPath = Annotated[
    Path | None,
    typer.Option(callback=in_a_folder, help="Draw the results in this file: .png, .svg or .pdf (needs matplotlib)."),
]


def write_rows(path: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSON list with one line for each row. Without a path, do nothing."""
    if path is not None:
        path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def conditions_title(conditions: Mapping[str, Any]) -> str:
    """Title of a table or a chart, from the conditions of a measurement."""
    return ", ".join(f"{name} {value}" for name, value in conditions.items())
