"""Runs a script in several processes. Each process is a rank with an emulated device of its own."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vllm_npu import envs
from vllm_npu.child_processes import changed_environment, free_port, signal_when_parent_dies
from vllm_npu.emulator import build, cann, loader, shared_memory, soc

STARTUP_FOLDER = Path(__file__).resolve().parent / "startup"
# Seconds; HCCL's own default is half an hour. Less than VLLM_NPU_TRANSPORT_TIMEOUT, because HCCL's error names the ranks.
DEFAULT_EXEC_TIMEOUT = "50"
# torch_npu's own default is 1. Without its queue, an op raises its error in its own call. With the queue, torch_npu drops all
# work after the first error and says nothing, and a thread of each rank polls: about 30 % of a core here.
DEFAULT_TASK_QUEUE = "0"
POLL_SECONDS = 0.02
# After a failure: for the other ranks to report theirs, and again to end by themselves. On a machine without other load.
GRACE_SECONDS = 5.0


class RankProcess(Protocol):
    """A rank's process, which leads a process group of its own. subprocess.Popen and ForkedProcess are such."""

    pid: int

    def poll(self) -> int | None:
        """The exit code, minus the signal's number where a signal ended the process. None while the process runs."""

    def wait(self) -> int | None:
        """Wait until the process has ended."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What to run, and where."""

    command: Sequence[str]  # after the interpreter: a script or -m module, then its arguments
    num_ranks: int
    soc_name: str
    trace: bool = False


def end_with_parent() -> None:
    """In a new process: the kernel ends this process when its parent ends, however the parent ends."""
    signal_when_parent_dies(signal.SIGKILL)


def device_environment(
    soc_name: str, num_ranks: int, run: str, changes: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The variables of this process with `changes`, and those that give every interpreter of a run an emulated device.

    Raises UnsupportedConfigError where a real CANN is there, EmulatorBuildError where the libraries cannot be built.
    """
    variables = {**os.environ, **(changes or {})}
    cann.refuse_if_found(variables)
    variables |= {
        envs.EMULATOR.name: "1",
        envs.EMULATOR_SOC.name: soc.resolve(soc_name),
        envs.EMULATOR_LIBRARIES.name: (changes or {}).get(envs.EMULATOR_LIBRARIES.name) or str(build.build()),
        envs.EMULATOR_RUN.name: run,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(STARTUP_FOLDER), variables.get("PYTHONPATH")))),
    }
    variables.setdefault(loader.AUTOLOAD_VARIABLE, "0")
    variables.setdefault("HCCL_EXEC_TIMEOUT", DEFAULT_EXEC_TIMEOUT)
    variables.setdefault("TASK_QUEUE_ENABLE", DEFAULT_TASK_QUEUE)
    variables.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    return variables


def new_run_name() -> str:
    return f"{os.getpid()}-{secrets.token_hex(4)}"


@contextlib.contextmanager
def emulated_devices(num_ranks: int) -> Iterator[str]:
    """Gives emulated devices to the processes that this process starts meanwhile. Yields the chip's name.

    Raises as device_environment does.
    """
    run_name = new_run_name()
    with changed_environment(device_environment(envs.EMULATOR_SOC.read(), num_ranks, run_name)):
        try:
            yield envs.EMULATOR_SOC.read()
        finally:
            shared_memory.clean_run(run_name)


def rank_environments(common: Mapping[str, str], num_ranks: int) -> Iterator[dict[str, str]]:
    """The environment of each rank: `common`, which is the emulator's, and torchrun's variables."""
    size = str(num_ranks)
    port = str(free_port())
    for rank in range(num_ranks):
        yield {
            **common,
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }


def quiet_share() -> float:
    """Which part of a second's work is done in a second, at the load of the last minute. 1 where nothing else runs.

    A process gets its share of a core, so the share is one by the number of processes for each core. One is added to this
    number, because the load average lags.
    """
    return 1 / (1 + os.getloadavg()[0] / len(os.sched_getaffinity(0)))


class QuietClock:
    """Counts seconds as a machine without other load would need them: time limits mean the same under every load."""

    def __init__(self) -> None:
        self._seconds, self._read = 0.0, time.monotonic()

    def seconds(self) -> float:
        """Since the clock was made. Ask often: the load at the time of asking counts for the time since the last."""
        now = time.monotonic()
        self._seconds += (now - self._read) * quiet_share()
        self._read = now
        return self._seconds


def signal_group(process: RankProcess, signal_number: int) -> None:
    """Sends a signal to a rank and to all processes that the rank started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal_number)


def wait_for_all(processes: Sequence[RankProcess], seconds: float) -> None:
    """Returns once all have ended, or after that time on a machine without other load."""
    clock = QuietClock()
    while clock.seconds() <= seconds and any(process.poll() is None for process in processes):
        time.sleep(POLL_SECONDS)


def end_all(processes: Sequence[RankProcess]) -> None:
    """Ends the ranks and all processes that they started: by SIGTERM, and after some seconds by SIGKILL."""
    for process in processes:
        if process.poll() is None:
            signal_group(process, signal.SIGTERM)
    wait_for_all(processes, GRACE_SECONDS)
    for process in processes:
        signal_group(process, signal.SIGKILL)
    for process in processes:
        process.wait()


def print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def wait_for_ranks(
    processes: Sequence[RankProcess],
    say: Callable[[str], None] = print_to_stderr,
    seconds: float = float("inf"),
) -> int:
    """Waits for all ranks, or until one fails. Returns that rank's exit code, or 128 + the signal that ended the rank.

    Raises TimeoutError where ranks still run after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while True:
        codes = [process.poll() for process in processes]
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None:
            break
        if all(code == 0 for code in codes):
            return 0
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(POLL_SECONDS)
    code = codes[failed] or 0
    what = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
    say(f"vllm_npu emulator: rank {failed} ended with {what}; ending the others")
    wait_for_all(processes, GRACE_SECONDS)
    return code if code > 0 else 128 - code


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Inside, SIGTERM, SIGINT and SIGHUP raise SystemExit in the main thread, so that what was started is ended."""

    def stop(signal_number: int, _frame: object) -> None:
        raise SystemExit(128 + signal_number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run(launch: Launch) -> int:
    """Runs the ranks to their end. Returns 0, or the exit code of the first that failed; then the others are ended.

    Raises UnsupportedConfigError where a real CANN is there, EmulatorBuildError where the libraries cannot be built.
    """
    shared_memory.clean_leftovers()
    run_name = new_run_name()
    processes: list[subprocess.Popen[bytes]] = []
    with stop_on_signals():
        try:
            common = device_environment(launch.soc_name, launch.num_ranks, run_name)
            if launch.trace:
                common[envs.EMULATOR_TRACE.name] = "1"
            for environment in rank_environments(common, launch.num_ranks):
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *launch.command],
                        env=environment,
                        start_new_session=True,
                        preexec_fn=end_with_parent,
                    )
                )
            return wait_for_ranks(processes)
        finally:
            end_all(processes)
            shared_memory.clean_run(run_name)
