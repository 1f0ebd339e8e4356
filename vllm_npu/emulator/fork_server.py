"""A process that imports torch and torch_npu once, on the emulated device, and forks ranks from itself.

An interpreter needs two to four seconds of CPU time to import both. A fork needs a few hundredths of a second. ForkServer is
the client's end; main() is the process. The process opens no device and starts no
thread before it forks, because a fork keeps neither of them.

A forked rank gets all its environment variables at the fork. Some variables are read earlier, while torch and torch_npu are
imported. So a server forks only ranks whose variables of that kind are its own: see import_time_variables.
"""

import contextlib
import gc
import importlib
import logging
import multiprocessing
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from vllm_npu import envs
from vllm_npu.emulator.launcher import end_with_parent

logger = logging.getLogger("vllm.npu.emulator")

START_SECONDS = 240.0  # for a server to import torch and torch_npu on a busy machine
MOST_SERVERS = 4  # at a time, in one ForkServers; each holds about 300 MB
MOST_FDS = 16  # of one request
LENGTH = struct.Struct("=Q")  # of a message, in bytes
STATUS = struct.Struct("=q")  # a process id, then an exit code
SERVER_ENDED = -signal.SIGKILL  # exit code of a rank whose server has ended: the rank dies with the server

# Variables that nothing reads before the fork. The emulated device reads its settings when a device is opened, and torch_npu
# its queue's. The number of OpenMP threads is set in the rank. Two prefixes: this package reads its variables when it needs
# them, and pytest sets PYTEST_CURRENT_TEST anew for each test.
READ_AFTER_FORK = frozenset(
    {
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "ASCEND_RT_VISIBLE_DEVICES",
        "HCCL_BUFFSIZE",
        "OMP_NUM_THREADS",
        "TASK_QUEUE_ENABLE",
        "TORCH_HCCL_ASYNC_ERROR_HANDLING",
    }
)
READ_AFTER_FORK_PREFIXES = ("VLLM_NPU_", "PYTEST_")
READ_AT_IMPORT = frozenset({envs.EMULATOR.name, envs.EMULATOR_CANN.name, envs.EMULATOR_LIBRARIES.name})


class ForkServerError(RuntimeError):
    """Ranks cannot be forked here. Start each rank in an interpreter of its own."""


def import_time_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that the imports of torch and torch_npu may read. Unknown variables count as such."""
    return {
        name: text
        for name, text in environment.items()
        if name in READ_AT_IMPORT or not (name in READ_AFTER_FORK or name.startswith(READ_AFTER_FORK_PREFIXES))
    }


@dataclass(frozen=True, slots=True)
class PassedConnection:
    """Stands in a request for a Connection, whose file descriptor travels beside the request."""

    index: int  # among the descriptors of the request's connections


@dataclass(frozen=True, slots=True)
class Request:
    """One process to fork."""

    environment: dict[str, str]  # all of it
    folder: str  # working directory
    search_path: list[str]  # entries of sys.path that the process needs
    call: bytes  # pickled: a function at the top of a module, and its arguments


# --- The client's end ---


class ForkedProcess:
    """A process that the server forked. It leads a session and a process group of its own."""

    def __init__(self, status: int) -> None:
        self._status = status  # a pipe: the process id, then the exit code
        self._code: int | None = None
        told = os.read(status, STATUS.size)
        if len(told) < STATUS.size:
            os.close(status)
            raise ForkServerError("the fork server has ended")
        (self.pid,) = STATUS.unpack(told)

    def fileno(self) -> int:
        """A file descriptor that is readable once the process has ended. It is closed after the exit code was read."""
        return self._status

    def poll(self) -> int | None:
        """The exit code, minus the signal's number where a signal ended the process. None while the process runs."""
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait until the process has ended, or `timeout` seconds. Returns as poll() does."""
        return self._wait(None if timeout is None else max(0, round(timeout * 1000)))

    def kill(self) -> None:
        """Send SIGKILL to the process, if it runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def _wait(self, milliseconds: int | None) -> int | None:
        if self._code is None:
            poll = select.poll()  # select.select takes no descriptor above 1023
            poll.register(self._status, select.POLLIN)
            if poll.poll(milliseconds):
                told = os.read(self._status, STATUS.size)
                os.close(self._status)
                (self._code,) = STATUS.unpack(told) if len(told) == STATUS.size else (SERVER_ENDED,)
        return self._code


class ForkServer:
    """Starts the server process, and asks it for forks. LOCAL. Starting takes two to four seconds of CPU time.

    The server is an interpreter with `arguments`, and with the number of its end of the control socket as the last argument, or
    in `control_variable` where that is given. `arguments` may start another program than main(); it calls serve_on(). `folder`
    is the working directory of the server and of the forked processes; None: that of this process at the time of the fork.
    Raises ForkServerError where the process cannot fork ranks.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        arguments: Sequence[str],
        control_variable: str | None = None,
        folder: Path | None = None,
    ) -> None:
        if not hasattr(os, "fork"):
            raise ForkServerError("this system has no os.fork")
        self._folder = folder
        self._lock = threading.Lock()  # one request at a time
        self._control, theirs = socket.socketpair()
        with theirs, tempfile.TemporaryFile() as printed:
            number = str(theirs.fileno())
            self._process = subprocess.Popen(
                [sys.executable, *arguments, *([] if control_variable else [number])],
                # One thread each: a fork must not find a pool of threads.
                env={
                    **environment,
                    **({control_variable: number} if control_variable else {}),
                    "OMP_NUM_THREADS": "1",
                    "OPENBLAS_NUM_THREADS": "1",
                },
                cwd=folder,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                start_new_session=True,  # Ctrl-C is for the client, which then ends the ranks
            )
            theirs.close()
            fault = self._fault()
            if fault:
                self.close()
                printed.seek(0)
                raise ForkServerError(f"{fault}\n{printed.read().decode(errors='replace')}".strip())

    def _fault(self) -> str:
        """What the process says once it has imported torch and torch_npu: nothing, or why it cannot fork."""
        self._control.settimeout(START_SECONDS)
        try:
            message = receive(self._control)
        except TimeoutError:
            return f"the fork server did not start in {START_SECONDS:.0f} s"
        finally:
            self._control.settimeout(None)
        return "the fork server ended while it started" if message is None else message[0].decode()

    def fork(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        environment: Mapping[str, str],
        output: tuple[int, int] = (1, 2),
    ) -> ForkedProcess:
        """Call function(*arguments) in a forked process, with this environment.

        The function is at the top of a module; arguments are picklable, or Connections. The process exits with 0 when the
        function has returned, with 1 when it has raised. `output` are file descriptors of this process: the forked
        process's standard output and error. Raises ForkServerError where the server has ended.
        """
        connections = [each.fileno() for each in arguments if isinstance(each, Connection)]
        passed = iter(range(len(connections)))
        sent = [PassedConnection(next(passed)) if isinstance(each, Connection) else each for each in arguments]
        request = Request(
            dict(environment),
            str(self._folder or Path.cwd()),
            [str(entry) for entry in sys.path],
            pickle.dumps((function, sent)),
        )
        status, theirs = os.pipe()
        try:
            with self._lock:
                send(self._control, pickle.dumps(request), [theirs, *output, *connections])
        except OSError as error:
            os.close(status)
            raise ForkServerError("the fork server has ended") from error
        finally:
            os.close(theirs)
        return ForkedProcess(status)

    def close(self) -> None:
        """End the server, and with it all processes that it forked."""
        self._control.close()
        self._process.wait()


class ForkServers:
    """A ForkServer for each set of variables that the imports of torch and torch_npu may read.

    `modules` are imported in each server beside these two.
    """

    def __init__(self, modules: Sequence[str] = ()) -> None:
        self._program = f"from {__name__} import main; main({list(modules)!r})"
        self._servers: dict[frozenset[tuple[str, str]], ForkServer] = {}  # the last one used is the last

    def server(self, environment: Mapping[str, str]) -> ForkServer:
        """A server for ranks with this environment, started where there is none. Raises ForkServerError as ForkServer does."""
        variables = import_time_variables(environment)
        key = frozenset(variables.items())
        if key not in self._servers:
            if len(self._servers) == MOST_SERVERS:
                self._servers.pop(next(iter(self._servers))).close()
            self._servers[key] = ForkServer(variables, ("-c", self._program))
        self._servers[key] = self._servers.pop(key)
        return self._servers[key]

    def close(self) -> None:
        while self._servers:
            self._servers.popitem()[1].close()


class PoolProcess:
    """A forked process with the part of multiprocessing.Process's interface that rank pools use."""

    def __init__(self, servers: ForkServers, target: Callable[..., Any], arguments: Sequence[Any]) -> None:
        self._servers, self._target, self._arguments = servers, target, arguments
        self._process: ForkedProcess | None = None

    def start(self) -> None:
        """Fork the process with the environment, standard output and error that this process has now."""
        environment = dict(os.environ)
        self._process = self._servers.server(environment).fork(self._target, self._arguments, environment)

    def join(self, timeout: float | None = None) -> None:
        if self._process is not None:
            self._process.wait(timeout)

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def exitcode(self) -> int | None:
        return None if self._process is None else self._process.poll()


class ForkContext:
    """The part of a multiprocessing context that rank pools use; its processes are forked by fork servers."""

    def __init__(self, servers: ForkServers) -> None:
        self._servers = servers

    def Pipe(self) -> tuple[Connection, Connection]:
        return multiprocessing.Pipe()

    def Process(self, target: Callable[..., Any], args: Sequence[Any], daemon: bool = True) -> PoolProcess:
        """Every process is a daemon: it ends with its server, and the server ends with this process."""
        return PoolProcess(self._servers, target, args)


# --- Messages: a length, then the bytes. File descriptors travel with the length. ---


def send(control: socket.socket, message: bytes, fds: Sequence[int] = ()) -> None:
    socket.send_fds(control, [LENGTH.pack(len(message))], fds)
    control.sendall(message)


def receive(control: socket.socket) -> tuple[bytes, list[int]] | None:
    """The next message and its file descriptors, or None once the other end is closed."""
    head, fds, _, _ = socket.recv_fds(control, LENGTH.size, MOST_FDS)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    message = bytearray()
    while len(message) < length:
        part = control.recv(length - len(message))
        if not part:
            return None
        message += part
    return bytes(message), fds


# --- The process ---


def fault_of_this_process() -> str:
    """Why this process cannot fork ranks, or nothing."""
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        return f"its imports left {threads} threads, and a fork keeps one"
    import torch_npu

    return "its imports opened a device, and a fork keeps none" if torch_npu.npu.is_initialized() else ""


def serve(control: socket.socket) -> None:
    """Fork what the client asks for and report exit codes, until the client closes its end."""
    statuses: dict[int, int] = {}  # by process id: the pipe that takes the exit code
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    own = (control.fileno(), woken, wakes)
    while True:
        readable, _, _ = select.select([control.fileno(), woken], [], [])
        if woken in readable:
            os.read(woken, 4096)
            report_ended(statuses)
        if control.fileno() in readable:
            received = receive(control)
            if received is None:
                break
            message, (status, *fds) = received
            server = os.getpid()
            pid = os.fork()
            if pid == 0:
                run_forked(pickle.loads(message), fds, server, (*own, status, *statuses.values()))
            for fd in fds:
                os.close(fd)
            statuses[pid] = status
            tell(status, pid)
    for pid in statuses:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def tell(status: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # the client no longer wants to know
        os.write(status, STATUS.pack(number))


def report_ended(statuses: dict[int, int]) -> None:
    while statuses:
        pid, how = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        status = statuses.pop(pid)
        tell(status, os.waitstatus_to_exitcode(how))
        os.close(status)


def run_forked(request: Request, fds: Sequence[int], server: int, inherited: Sequence[int]) -> NoReturn:
    """In the new process: call what was asked for, and exit."""
    code = 1
    try:
        os.setsid()
        end_with_parent()
        if os.getppid() != server:
            os._exit(1)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for fd in inherited:
            os.close(fd)
        output, errors, *connections = fds
        os.dup2(output, 1)
        os.dup2(errors, 2)
        os.close(output)
        os.close(errors)
        become(request)
        function, arguments = pickle.loads(request.call)
        function(
            *(Connection(connections[each.index]) if isinstance(each, PassedConnection) else each for each in arguments)
        )
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001 - the end of a process, as an interpreter ends it
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # taking torch and torch_npu down in good order takes a second


def become(request: Request) -> None:
    """Give this process what a new interpreter would have found."""
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    sys.path[0] = request.folder  # as `python -m` does
    sys.path += [entry for entry in request.search_path if entry not in sys.path]
    threads = request.environment.get("OMP_NUM_THREADS", "").partition(",")[0]
    import torch

    torch.set_num_threads(int(threads) if threads.isdecimal() and int(threads) > 0 else os.cpu_count() or 1)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # Python's own generator is seeded anew at each fork


def serve_on(number: int) -> None:
    """Fork what the client asks for over the socket with this file descriptor, after torch_npu has been imported."""
    control = socket.socket(fileno=number)
    fault = fault_of_this_process()
    send(control, fault.encode())
    if not fault:
        gc.freeze()  # a collection in a rank would write to pages that ranks share
        serve(control)


def main(modules: Sequence[str]) -> None:
    import torch_npu  # noqa: F401

    for module in modules:
        importlib.import_module(module)
    serve_on(int(sys.argv[1]))
