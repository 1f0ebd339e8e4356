"""What both demos share: their folders, how they show progress and how a stop signal ends them."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from vllm_npu.tools.engines.stop_signals import StopSignals

ShowStage = Callable[[str], AbstractContextManager[None]]
"""Shows the text to the user while a block runs, and the seconds that it took afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSession:
    """One run of a demo."""

    folder: Path  # temporary, removed at the end
    log_folder: Path | None  # where the user wants to keep the engines' logs; None: nowhere
    show: ShowStage
    stop_signals: StopSignals

    @property
    def caches(self) -> Path:
        """The folder of vLLM's caches, which all engines of the run share."""
        return self.folder / "caches"

    @contextmanager
    def logs_kept(self, folder_name: str) -> Iterator[None]:
        """Copy the logs in `folder / folder_name` to `log_folder` after the block, also after an error."""
        try:
            yield
        finally:
            if self.log_folder is not None:
                self.log_folder.mkdir(parents=True, exist_ok=True)
                for log in (self.folder / folder_name).glob("*.log"):
                    shutil.copy(log, self.log_folder / f"{folder_name}-{log.name}")


@contextmanager
def demo_session(log_folder: Path | None, show: ShowStage) -> Iterator[DemoSession]:
    """A session with a new temporary folder. Raises Interrupted at a stop signal. Removes the folder in any case."""
    with StopSignals() as stop_signals:
        folder: Path | None = None
        try:
            with stop_signals.held():
                folder = Path(tempfile.mkdtemp(prefix="vllm-npu-demo-"))
            yield DemoSession(folder=folder, log_folder=log_folder, show=show, stop_signals=stop_signals)
        finally:
            with stop_signals.held():
                if folder is not None:
                    shutil.rmtree(folder, ignore_errors=True)


def count_identical(got: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> int:
    """Number of positions with the same token. Both hold one list of tokens for each prompt; `got` may be empty."""
    return sum(
        got_token == want_token
        for got_tokens, want_tokens in zip(got, expected, strict=bool(got))
        for got_token, want_token in zip(got_tokens, want_tokens, strict=False)
    )
