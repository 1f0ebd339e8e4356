"""Find the processes of a program under test by its temporary folder, also those without a parent; and free ports."""

import os
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path

from vllm_npu.child_processes import free_port


def processes_of(folder: Path) -> list[int]:
    """Living processes that were started with a TMPDIR inside `folder`, and all other processes of their sessions.

    A process of vLLM renames itself, and /proc does not show its environment after that. Its session still shows it.
    """
    marker = f"TMPDIR={folder}".encode()
    found, session_of = set(), {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[0] in "ZX":
                    continue  # has ended
                session_of[int(entry.name)] = os.getsid(int(entry.name))
                if any(variable.startswith(marker) for variable in (entry / "environ").read_bytes().split(b"\0")):
                    found.add(int(entry.name))
            except OSError:
                continue  # gone meanwhile, or not ours
    sessions = {session_of[pid] for pid in found} - {os.getsid(0)}
    return sorted(found | {pid for pid, session in session_of.items() if session in sessions})


def kill_processes_of(folder: Path) -> None:
    """Kill the processes of a test that failed, so that none runs beside the next test.

    multiprocessing's resource trackers are not killed: they remove shared memory, and end after the processes that they serve.
    """
    while found := processes_of(folder):
        for pid in found:
            try:
                if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
            except OSError:
                continue  # gone meanwhile
        time.sleep(0.1)


def free_ports(count: int) -> int:
    """The first of `count` TCP ports one after another that no process uses now."""
    while True:
        first = free_port()
        with ExitStack() as stack:
            try:
                for port in range(first + 1, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        return first
