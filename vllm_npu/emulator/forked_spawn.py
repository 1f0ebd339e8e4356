"""Forks the processes that multiprocessing would spawn, from a process that has imported torch and torch_npu.

A spawned process imports both anew, which takes three seconds of CPU time, and a test of a collective spawns tens of them. Only
judge's processes call fork_spawned_processes(). A process whose environment variables the imports could read, and which differ
from those of a server, gets a server of its own: fork_server.import_time_variables.

What stays as multiprocessing has it: the process's object is pickled, sys.path and the working directory are the parent's, the
test's module is imported anew, and the process ends as an interpreter ends.
What differs: the parent of the process is the server, and the process leads a session.
"""

import ctypes
import io
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import context, reduction, resource_tracker, spawn, util
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

from vllm_npu.emulator.fork_server import MOST_FDS, ForkServerError, ForkServers, logger

OWN_FDS = 5  # of a request: the status, standard output and error, the parent's sentinel, the resource tracker

inherited: Sequence[Connection] = ()  # in a forked process: what the pickled process refers to


@dataclass(frozen=True, slots=True)
class InheritedFd:
    """Stands in the pickled process for a file descriptor, as multiprocessing's DupFd does."""

    index: int

    def detach(self) -> int:
        return os.dup(inherited[self.index].fileno())


class ForkedPopen:
    """What multiprocessing.Process asks of the process it started, for one that a ForkServer forked."""

    method = "spawn"
    DupFd = InheritedFd

    def __init__(self, servers: ForkServers, process: BaseProcess) -> None:
        """Raises ForkServerError where the process cannot be forked; then none has started."""
        util._flush_std_streams()  # type: ignore[attr-defined]
        self._fds: list[int] = []
        self.returncode: int | None = None
        written = io.BytesIO()
        context.set_spawning_popen(self)  # type: ignore[arg-type]
        try:
            reduction.dump(spawn.get_preparation_data(process.name), written)
            reduction.dump(process, written)
        finally:
            context.set_spawning_popen(None)
        if len(self._fds) > MOST_FDS - OWN_FDS:
            raise ForkServerError(
                f"the process inherits {len(self._fds)} file descriptors, more than a request carries"
            )
        # This process's end closes with it. Its child then knows that the parent has ended.
        ended, self._alive = os.pipe()
        tracker: Any = resource_tracker.getfd()  # an int: this call starts the tracker
        passed = [Connection(os.dup(fd)) for fd in (ended, tracker, *self._fds)]
        os.close(ended)
        environment = dict(os.environ)
        self._process = servers.server(environment).fork(run_spawned, [written.getvalue(), *passed], environment)
        self.pid = self._process.pid
        self.sentinel = os.dup(self._process.fileno())

    def duplicate_for_child(self, fd: int) -> int:
        self._fds.append(fd)
        return len(self._fds) - 1

    def poll(self) -> int | None:
        self.returncode = self._process.poll()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        self.returncode = self._process.wait(timeout)
        return self.returncode

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def close(self) -> None:
        os.close(self.sentinel)
        os.close(self._alive)


def modules_of_torch() -> list[str]:
    """What this process has imported of torch and torch_npu: torch's modules for tests take two seconds."""
    return [
        name
        for name, module in sys.modules.items()
        if name.partition(".")[0] in {"torch", "torch_npu"} and getattr(module, "__spec__", None) is not None
    ]


def fork_spawned_processes() -> None:
    """From now on, multiprocessing's method "spawn" forks its processes in this interpreter."""
    servers: list[ForkServers] = []
    spawning: Any = context.SpawnProcess
    popen = spawning._Popen

    def start(process: BaseProcess) -> Any:
        if not servers:
            servers.append(ForkServers(modules_of_torch()))
        try:
            return ForkedPopen(servers[0], process)
        except ForkServerError as error:
            logger.warning("%s; process %s gets an interpreter of its own", error, process.name)
            return popen(process)

    spawning._Popen = staticmethod(start)


def run_spawned(pickled: bytes, parent: Connection, tracker: Connection, *connections: Connection) -> NoReturn:
    """In the forked process: what multiprocessing.spawn does in a new interpreter."""
    global inherited
    inherited = connections
    resource_tracker._resource_tracker._fd = os.dup(tracker.fileno())  # type: ignore[attr-defined]
    current: Any = multiprocessing.process.current_process()
    current._inheriting = True
    reader = io.BytesIO(pickled)
    try:
        spawn.prepare(pickle.load(reader))
        process = pickle.load(reader)
    finally:
        del current._inheriting
    code = process._bootstrap(parent.fileno())
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.pythonapi.Py_Exit(code)  # with all that an interpreter does at its end, where a process may crash
    raise AssertionError("Py_Exit returned")
