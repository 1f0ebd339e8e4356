"""A fixture that runs a function of a test module in emulated ranks. In the topmost conftest.py:

    pytest_plugins = ["vllm_npu.emulator.pytest_plugin"]

or on the command line: `pytest -p vllm_npu.emulator.pytest_plugin`. It is no entry point, so a project that does not name the
plugin does not load it.
"""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest

from vllm_npu.emulator import build, cann, launcher, rank_program, shared_memory
from vllm_npu.emulator.fork_server import ForkedProcess, ForkServerError, ForkServers, logger
from vllm_npu.emulator.rank_program import RankFunction
from vllm_npu.errors import InvalidInputError, VllmNpuError

TIMEOUT = 240.0  # seconds for all ranks of one launch, their imports included
OUTPUT = "output"  # file in the folder of a launch: what all ranks print
SERVERS = pytest.StashKey[ForkServers]()


@dataclass
class Outcome:
    """How a launch of ranks ended."""

    code: int
    output: str  # standard output and error of all ranks
    returned: list[Any] = field(default_factory=list)  # by rank; None for a rank that returned nothing


RunInRanks = Callable[..., Outcome]


def missing() -> str | None:
    """What the emulated device lacks here, or None."""
    real = cann.find()
    return f"a machine without a real CANN ({real})" if real else build.missing()


def fail_late(num_ranks: int, timeout: float, printed: str) -> NoReturn:
    pytest.fail(f"{num_ranks} emulated ranks did not end in {timeout:.0f} s; they printed:\n{printed}", pytrace=False)


def launch(arguments: list[str], num_ranks: int, soc: str, env: Mapping[str, str], timeout: float) -> Outcome:
    """Runs a script with its arguments in emulated ranks, each with an interpreter of its own.

    Fails the test where the ranks do not end in `timeout` seconds.
    """
    command = [sys.executable, "-m", "vllm_npu.emulator", "run", "--nproc", str(num_ranks), "--soc", soc, *arguments]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        printed = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout
        fail_late(num_ranks, timeout, printed or "")
    return Outcome(done.returncode, done.stdout)


def fork_and_wait(
    servers: ForkServers, folder: Path, num_ranks: int, soc: str, env: Mapping[str, str], timeout: float
) -> Outcome:
    """Runs rank_program in forked ranks. Fails the test where the ranks do not end in `timeout` seconds.

    Raises ForkServerError where ranks cannot be forked; then none has run.
    """
    shared_memory.clean_leftovers()
    run_name = launcher.new_run_name()
    try:
        common = launcher.device_environment(soc, num_ranks, run_name, env)
    except VllmNpuError as error:
        return Outcome(2, f"vllm_npu emulator: {error}\n")
    server = servers.server(common)
    processes: list[ForkedProcess] = []
    late = False
    with open(folder / OUTPUT, "ab", buffering=0) as file:

        def say(line: str) -> None:
            file.write(f"{line}\n".encode())

        try:
            for environment in launcher.rank_environments(common, num_ranks):
                output = file.fileno(), file.fileno()
                processes.append(server.fork(rank_program.run, [folder], environment, output))
            code = launcher.wait_for_ranks(processes, say, timeout)
        except TimeoutError:
            code, late = 1, True
        finally:
            launcher.end_all(processes)
            shared_memory.clean_run(run_name)
    printed = (folder / OUTPUT).read_text(errors="replace")
    if late:
        fail_late(num_ranks, timeout, printed)
    return Outcome(code, printed)


def rank_function(function: Callable[..., Any]) -> RankFunction:
    """How a rank finds the function. Raises InvalidInputError for a function that a rank would not find."""
    module = sys.modules[function.__module__]
    if getattr(module, function.__name__, None) is not function or module.__file__ is None:
        raise InvalidInputError(
            f"run_in_ranks: {function.__qualname__} is not at the top of a module; move it there, so that each rank finds it"
        )
    return RankFunction(module.__name__, module.__file__, function.__name__, [str(entry) for entry in sys.path])


def fork_servers(config: pytest.Config) -> ForkServers:
    """The servers of this pytest session, which end with it."""
    if SERVERS not in config.stash:
        servers = config.stash[SERVERS] = ForkServers()
        config.add_cleanup(servers.close)
    return config.stash[SERVERS]


@pytest.fixture
def run_in_ranks(pytestconfig: pytest.Config) -> RunInRanks:
    """run_in_ranks(function, num_ranks, *arguments): calls function(rank, num_ranks, *arguments) in emulated ranks.

    The function is one at the top of a test module. Each rank is a process of its own, which imports that module, with
    its device set and an HCCL process group open. The process is forked from one that has imported torch and torch_npu; where
    that is not possible, the process is a new interpreter, and a log message says why. Arguments and what is returned must be
    picklable. Fails the test if a rank fails, unless may_fail is set. `soc` is a chip or a family, `env` are environment
    variables of the ranks, and `timeout` is in seconds. Skips the test where the emulated device cannot be had.
    """
    lacking = missing()
    if lacking is not None:
        pytest.skip(f"needs the emulated Ascend device: {lacking}")

    def run(
        function: Callable[..., Any],
        num_ranks: int,
        *arguments: Any,
        soc: str = "A3",
        env: dict[str, str] | None = None,
        may_fail: bool = False,
        timeout: float = TIMEOUT,
    ) -> Outcome:
        wanted = rank_function(function)
        with tempfile.TemporaryDirectory(prefix="vllm_npu_ranks.") as name:
            folder = Path(name)
            (folder / rank_program.FUNCTION).write_bytes(pickle.dumps(wanted))
            (folder / rank_program.ARGUMENTS).write_bytes(pickle.dumps(arguments))
            try:
                outcome = fork_and_wait(fork_servers(pytestconfig), folder, num_ranks, soc, env or {}, timeout)
            except ForkServerError as error:
                logger.warning("run_in_ranks starts a new interpreter for each rank, which takes seconds: %s", error)
                outcome = launch(["-m", rank_program.__name__, name], num_ranks, soc, env or {}, timeout)
            for rank in range(num_ranks):
                result = rank_program.result_file(folder, rank)
                outcome.returned.append(pickle.loads(result.read_bytes()) if result.exists() else None)
        if outcome.code != 0 and not may_fail:
            what = f"{wanted.module}:{wanted.function} on {num_ranks} ranks ended with {outcome.code}"
            pytest.fail(f"{what}:\n{outcome.output}", pytrace=False)
        return outcome

    return run
