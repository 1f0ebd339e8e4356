"""Where commands write what they found: the options that name files, and files of rows."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer


def in_a_folder(path: Path | None) -> Path | None:
    """An option's callback: the folder has to be there before the work begins, not after it."""
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent}; create it")
    return path


JsonPath = Annotated[Path | None, typer.Option("--json", callback=in_a_folder, help="Write the results here.")]
PlotPath = Annotated[
    Path | None, typer.Option(callback=in_a_folder, help="Draw them here: .png, .svg or .pdf (needs matplotlib).")
]


def write_rows(path: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """A JSON list, a line for each row; nothing where no file was asked for."""
    if path is not None:
        path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
