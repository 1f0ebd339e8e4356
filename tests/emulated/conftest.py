"""The emulated device for the tests of this folder: in the pytest process itself, and in ranks of their own."""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from vllm_npu import emulator
from vllm_npu.emulator import build, cann

ROOT = Path(__file__).resolve().parents[2]
RANK_PROGRAM = Path(__file__).resolve().parent / "rank_program.py"
TIMEOUT = 240.0  # seconds for all ranks of one launch, their imports included


def missing() -> str | None:
    """What the emulated device lacks here, or None."""
    real = cann.find()
    return f"a machine without a real CANN ({real})" if real else build.missing()


MISSING = missing()
if MISSING is None:
    emulator.enable()
    import torch_npu  # noqa: F401  # test modules name npu devices when they are imported


class ModuleThatCannotRun(pytest.Module):
    """A test module whose imports need the emulated device, where there is none."""

    def collect(self) -> Iterable[pytest.Item]:
        pytest.skip(f"needs the emulated Ascend device: {MISSING}", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if MISSING is None:
        return None
    return ModuleThatCannotRun.from_parent(parent, path=module_path)


@dataclass
class Outcome:
    """How a launch of ranks ended."""

    code: int
    output: str  # standard output and error of all ranks
    returned: list[Any] = field(default_factory=list)  # by rank; None for a rank that returned nothing


def launch(arguments: list[str], num_ranks: int, soc: str, env: dict[str, str], timeout: float) -> Outcome:
    command = [sys.executable, "-m", "vllm_npu.emulator", "run", "--nproc", str(num_ranks), "--soc", soc, *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Outcome(done.returncode, done.stdout)


RunInRanks = Callable[..., Outcome]


@pytest.fixture
def launch_script(tmp_path: Path) -> RunInRanks:
    """launch_script(text, num_ranks, soc=..., env=..., options=[...]): runs a Python script in emulated ranks."""

    def run(
        text: str,
        num_ranks: int,
        soc: str = "A3",
        env: dict[str, str] | None = None,
        options: list[str] | None = None,
        timeout: float = TIMEOUT,
    ) -> Outcome:
        script = tmp_path / "script.py"
        script.write_text(text)
        return launch([*(options or []), str(script)], num_ranks, soc, env or {}, timeout)

    return run


@pytest.fixture
def run_in_ranks() -> RunInRanks:
    """run_in_ranks(function, num_ranks, *arguments): calls function(rank, num_ranks, *arguments) in emulated ranks.

    The function belongs to a test module; each rank has its device set and an HCCL process group open. What it returns
    must be picklable. Fails the test if a rank fails, unless may_fail is set.
    """

    def run(
        function: Callable[..., Any],
        num_ranks: int,
        *arguments: Any,
        soc: str = "A3",
        env: dict[str, str] | None = None,
        may_fail: bool = False,
        timeout: float = TIMEOUT,
    ) -> Outcome:
        with tempfile.TemporaryDirectory(prefix="vllm_npu_ranks.") as folder:
            Path(folder, "arguments").write_bytes(pickle.dumps(arguments))
            target = f"{function.__module__}:{function.__qualname__}"
            outcome = launch([str(RANK_PROGRAM), target, folder], num_ranks, soc, env or {}, timeout)
            for rank in range(num_ranks):
                result = Path(folder, f"rank{rank}")
                outcome.returned.append(pickle.loads(result.read_bytes()) if result.exists() else None)
        if outcome.code != 0 and not may_fail:
            pytest.fail(f"{target} on {num_ranks} ranks ended with {outcome.code}:\n{outcome.output}", pytrace=False)
        return outcome

    return run
