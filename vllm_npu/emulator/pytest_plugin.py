"""A fixture that runs a function of a test module in emulated ranks. In the topmost conftest.py:

    pytest_plugins = ["vllm_npu.emulator.pytest_plugin"]

or on the command line: `pytest -p vllm_npu.emulator.pytest_plugin`. It is no entry point: who does not ask for it pays
nothing.
"""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from vllm_npu.emulator import build, cann, rank_program
from vllm_npu.errors import InvalidInputError

TIMEOUT = 240.0  # seconds for all ranks of one launch, their imports included


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


def launch(arguments: list[str], num_ranks: int, soc: str, env: dict[str, str], timeout: float) -> Outcome:
    """Runs a script with its arguments in emulated ranks. Fails the test where they do not end in `timeout` seconds."""
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
        pytest.fail(
            f"{num_ranks} emulated ranks did not end in {timeout:.0f} s; they printed:\n{printed}", pytrace=False
        )
    return Outcome(done.returncode, done.stdout)


def call_of(function: Callable[..., Any]) -> rank_program.Call:
    """How a rank finds the function. Raises InvalidInputError for one that it would not find."""
    module = sys.modules[function.__module__]
    if getattr(module, function.__name__, None) is not function or module.__file__ is None:
        raise InvalidInputError(
            f"run_in_ranks: {function.__qualname__} is not at the top of a module; move it there, so that each rank finds it"
        )
    return rank_program.Call(module.__name__, module.__file__, function.__name__, [str(entry) for entry in sys.path])


@pytest.fixture
def run_in_ranks() -> RunInRanks:
    """run_in_ranks(function, num_ranks, *arguments): calls function(rank, num_ranks, *arguments) in emulated ranks.

    The function is one at the top of a test module. Each rank is a process of its own, which imports that module, with
    its device set and an HCCL process group open. Arguments and what is returned must be picklable. Fails the test if a
    rank fails, unless may_fail is set. `soc` is a chip or a family, `env` are environment variables of the ranks, and
    `timeout` is in seconds. Skips the test where the emulated device cannot be had.
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
        call = call_of(function)
        with tempfile.TemporaryDirectory(prefix="vllm_npu_ranks.") as name:
            folder = Path(name)
            (folder / rank_program.CALL).write_bytes(pickle.dumps(call))
            (folder / rank_program.ARGUMENTS).write_bytes(pickle.dumps(arguments))
            outcome = launch(["-m", rank_program.__name__, name], num_ranks, soc, env or {}, timeout)
            for rank in range(num_ranks):
                result = rank_program.result_file(folder, rank)
                outcome.returned.append(pickle.loads(result.read_bytes()) if result.exists() else None)
        if outcome.code != 0 and not may_fail:
            what = f"{call.module}:{call.function} on {num_ranks} ranks ended with {outcome.code}"
            pytest.fail(f"{what}:\n{outcome.output}", pytrace=False)
        return outcome

    return run
