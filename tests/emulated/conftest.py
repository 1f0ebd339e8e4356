"""The emulated device for the tests of this folder: in the pytest process itself, and in ranks of their own."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from vllm_npu import emulator
from vllm_npu.emulator.fork_server import ForkContext
from vllm_npu.emulator.pytest_plugin import (
    TIMEOUT,
    Outcome,
    RunInRanks,
    fork_servers,
    launch,
    missing,
    run_in_ranks,
)

__all__ = ["run_in_ranks"]  # pytest takes pytest_plugins from the topmost conftest.py only

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


@pytest.fixture(scope="session")
def warm(pytestconfig: pytest.Config) -> ForkContext:
    """ProcessRankPool(..., start_method=warm): its ranks are forked from a process that has imported torch and torch_npu."""
    return ForkContext(fork_servers(pytestconfig))


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
