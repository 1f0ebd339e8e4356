"""Take down a process with everything that it started, and remove their files in /dev/shm. Linux only.

vLLM's processes start others (engine core, workers, resource trackers). If one of them is killed, the others may stay, and so
may their shared memory. A tree is therefore a session of its own: a process stays in its session when its parent ends. The tree
notes which shared memory its processes map while they live.
"""

import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from vllm_npu.child_processes import signal_when_parent_dies

SHARED_MEMORY_FOLDER = Path("/dev/shm")


class ProcessTree:
    """One process in a session of its own, with all its descendants.

    If this program dies without cleaning up (SIGKILL), the kernel sends the first process SIGTERM. Start trees from the
    main thread: the kernel looks at the thread that started the process.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        stdin: int | IO[bytes] | None = None,  # as for subprocess.Popen
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
    ) -> None:
        self._files_before = set(_shared_memory_files())
        self._mapped: set[int] = set()  # inodes in /dev/shm that the tree has mapped so far
        self.process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=_terminate_with_parent,
        )

    def members(self) -> list[int]:
        """The id of every living process of the tree, its first process included while it lives."""
        session = self.process.pid
        return [int(entry) for entry in os.listdir("/proc") if entry.isdecimal() and _lives_in(session, int(entry))]

    def note_shared_memory(self) -> None:
        """Remember which files in /dev/shm the tree maps now; `stop` removes those that are left. About 10 ms."""
        for pid in self.members():
            self._mapped |= mapped_shared_memory(pid)

    def terminate(self) -> None:
        """Ask the first process to end (SIGTERM); returns at once."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def terminate_all(self) -> None:
        """Ask every process of the tree to end (SIGTERM). Returns at once. Notes their shared memory before."""
        self.note_shared_memory()
        for pid in self.members():
            _signal(pid, self.process.pid, signal.SIGTERM)

    def stop(self, grace_seconds: float) -> None:
        """Wait up to `grace_seconds` for the tree to end by itself, then kill what is left of it.

        Returns when no process of the tree is left and its shared memory is removed. Safe to call again.
        """
        self.note_shared_memory()
        deadline = time.monotonic() + grace_seconds
        while (members := self.members()) and (left := deadline - time.monotonic()) > 0:
            _wait_for_end(members, left)
        self.note_shared_memory()
        while members := self.members():
            for pid in members:
                _signal(pid, self.process.pid, signal.SIGKILL)
            _wait_for_end(members, 1.0)
        self.process.wait()
        for path, inode in _shared_memory_files().items():
            if inode in self._mapped and path not in self._files_before:
                path.unlink(missing_ok=True)


def _terminate_with_parent() -> None:
    """Runs in the child between fork and exec: ask the kernel for SIGTERM when the parent dies."""
    signal_when_parent_dies(signal.SIGTERM)


def _lives_in(session: int, pid: int) -> bool:
    """Whether process `pid` is in `session` and has not ended. A zombie has ended."""
    try:
        if os.getsid(pid) != session:
            return False
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return False  # gone meanwhile
    return state not in ("Z", "X")


def _wait_for_end(pids: Sequence[int], timeout: float) -> None:
    """Wait until all these processes have ended, at most `timeout` seconds."""
    deadline = time.monotonic() + timeout
    with ExitStack() as stack:
        poller = select.poll()
        alive = set()
        for pid in pids:
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            stack.callback(os.close, descriptor)
            poller.register(descriptor, select.POLLIN)
            alive.add(descriptor)
        while alive and (left := deadline - time.monotonic()) > 0:
            for descriptor, _ in poller.poll(left * 1000):
                poller.unregister(descriptor)
                alive.discard(descriptor)


def _signal(pid: int, session: int, signum: signal.Signals) -> None:
    """Send a signal to process `pid` if it is still in `session`. The kernel may have given the number to another process."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if _lives_in(session, pid):
            signal.pidfd_send_signal(descriptor, signum)
    except ProcessLookupError:
        return
    finally:
        os.close(descriptor)


def mapped_shared_memory(pid: int) -> set[int]:
    """Inodes in /dev/shm that process `pid` maps. Empty if the process has ended or belongs to another user.

    Paths would not do: a process maps a semaphore that it creates under a temporary name, and the C library removes that name.
    """
    try:
        mappings = Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except OSError:
        return set()
    return {
        int(fields[4])
        for line in mappings.splitlines()
        if len(fields := line.split(maxsplit=5)) == 6 and fields[5].startswith(f"{SHARED_MEMORY_FOLDER}/")
    }


def _shared_memory_files() -> dict[Path, int]:
    """Path and inode of every file in /dev/shm."""
    if not SHARED_MEMORY_FOLDER.is_dir():
        return {}
    with os.scandir(SHARED_MEMORY_FOLDER) as entries:
        return {Path(entry.path): entry.inode() for entry in entries}
