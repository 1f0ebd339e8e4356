"""What commands that start engines show: the stages of the run, the end by a stop signal, and tables of a log's width."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vllm_npu.tools.demo.session import DemoSession, demo_session
from vllm_npu.tools.engines.stop_signals import Interrupted

LOG_WIDTH = 120  # columns of a table, if the output is not a terminal


@contextmanager
def shown_session(log_folder: Path | None) -> Iterator[DemoSession]:
    """A session whose stages are shown. A stop signal ends the command with its exit status."""
    stage = Stage()
    try:
        with demo_session(log_folder, stage.show) as session:
            yield session
    except Interrupted as interruption:
        stage.say(f"{interruption}: processes and temporary files are gone")
        raise typer.Exit(interruption.exit_status) from None


def console_for_tables() -> Console:
    """Standard output, as wide as LOG_WIDTH where it is no terminal."""
    console = Console()
    if not console.is_terminal:
        console.width = LOG_WIDTH
    return console


class Stage:
    """Shows on standard error what runs: a spinner on a terminal, or one line at the beginning and one at the end."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def show(self, text: str) -> Iterator[None]:
        """Show the text while the block runs, and the seconds that it took afterwards."""
        started = time.monotonic()
        if self._console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            with Progress(*columns, console=self._console, transient=True) as progress:
                progress.add_task(text, total=None)
                yield
        else:
            self.say(f"… {text}")
            yield
        self.say(f"✓ {text} ({time.monotonic() - started:.0f} s)")
