"""Notice that an engine or a worker has failed while a server of vLLM starts.

vLLM's server looks at its engine cores alone, and an engine core looks at the pipes of its workers. An end that such a look
does not see leaves the server waiting for its engines. An engine core of vLLM 0.23 that cannot start may also wait for its
workers without end: only the log tells of it.
"""

import time
from pathlib import Path
from typing import Final

from vllm_npu.tools.engines.process_tree import ProcessTree

TITLES: Final = ("::EngineCore", "::Worker")  # vLLM names these processes VLLM::EngineCore_DP0 and VLLM::Worker_DP0_EP0
FAILURES: Final = (
    "EngineCore failed to start.",
    "WorkerProc failed to start.",
)  # vLLM's lines, the same from 0.23 to 0.32
OWN_END_SECONDS: Final = 20.0  # for vLLM to log the reason and to end by itself; it gives its processes 5 s


class StartWatch:
    """The engine cores and workers of a tree. Use it only until the server is up: later, vLLM may end some in good order.

    `log` is the file that the tree writes to, if it writes to a file.
    """

    def __init__(self, tree: ProcessTree, log: Path | None = None) -> None:
        self._tree, self._log = tree, log
        self._seen: dict[int, str] = {}
        self._first_failure: float | None = None

    def workers(self) -> dict[int, str]:
        """The name of each engine core and worker that lives, by its id: a process changes its name. About 10 ms.

        A child has its parent's name until it runs a program of its own. Neither an engine core nor a worker has a child of its
        kind, so a process whose parent is of its kind is such a copy.
        """
        found = {pid: _title(pid) for pid in self._tree.members()}
        kinds = {pid: kind for pid, title in found.items() if (kind := _kind(title)) is not None}
        return {pid: found[pid] for pid, kind in kinds.items() if kinds.get(_parent(pid)) != kind}

    def failure(self) -> str | None:
        """A sentence about processes that had failed OWN_END_SECONDS ago; None while there is no such process."""
        self._seen |= self.workers()
        alive = set(self._tree.members())
        ended = sorted(title for pid, title in self._seen.items() if pid not in alive)
        logged = self._logged()
        if not ended and logged is None:
            return None
        self._first_failure = self._first_failure or time.monotonic()
        if time.monotonic() - self._first_failure < OWN_END_SECONDS:
            return None
        what = f"{' and '.join(ended)} ended while the server started" if ended else f"its log says {logged!r}"
        return f"{what}, and the server did not end"

    def _logged(self) -> str | None:
        """The first of FAILURES in the log."""
        text = "" if self._log is None else self._log.read_text(errors="replace")
        return next((line for line in FAILURES if line in text), None)


def _kind(title: str) -> str | None:
    """The one of TITLES that the name of a process holds."""
    return next((kind for kind in TITLES if kind in title), None)


def _parent(pid: int) -> int:
    """The id of a process's parent; 0 if the process has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _title(pid: int) -> str:
    """The name that a process shows; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].decode(errors="replace").strip()
    except OSError:
        return ""
