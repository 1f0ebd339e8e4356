"""Settings, lanes and fixtures of all tests."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.time_limits import on_this_machine
from vllm_npu.tools.launch import RANK_POOLS, RankPool

# The same examples in every run: a failure on one machine is a failure on all.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=60, print_blob=True)
settings.load_profile("ci")

POOL_TIMEOUT = 20.0  # seconds that a rank waits for another one, on a quiet machine
NIGHTLY = "nightly"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests marked nightly, unless -m speaks of them or the command line names them by their ids."""
    if NIGHTLY in config.option.markexpr:
        return
    named = tuple(argument for argument in config.args if "::" in argument)
    left_out = [item for item in items if item.get_closest_marker(NIGHTLY) and not item.nodeid.startswith(named)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Give the seconds of the tests in each folder."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[str(Path(report.nodeid.partition("::")[0]).parent)] += report.duration
    if seconds:
        terminalreporter.write_line(
            "seconds: " + ", ".join(f"{folder} {seconds[folder]:.0f}" for folder in sorted(seconds))
        )


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[str, int], RankPool]]:
    """pools(kind, num_ranks) is a pool of RANK_POOLS. The first call starts it, and all tests share it."""
    opened: dict[tuple[str, int], RankPool] = {}

    def pool(kind: str, num_ranks: int) -> RankPool:
        if (kind, num_ranks) not in opened:
            opened[kind, num_ranks] = RANK_POOLS[kind](num_ranks, timeout=on_this_machine(POOL_TIMEOUT))
        return opened[kind, num_ranks]

    yield pool
    for each in opened.values():
        each.close()


@pytest.fixture
def nothing_left_behind() -> Iterator[None]:
    """Fail if the test leaves processes that it started, or files of this package in /dev/shm."""

    def left() -> tuple[set[Path], set[str]]:
        return set(Path("/dev/shm").glob("vllm_npu*")), set(_children(os.getpid()))

    before = left()
    yield
    files, processes = left()
    assert processes - before[1] == set()
    assert {file for file in files - before[0] if str(os.getpid()) in file.name} == set()


MULTIPROCESSING_KEEPS = ("resource_tracker", "forkserver")  # they live until this process ends


def _children(process: int) -> list[str]:
    """Processes that `process` started and that have not ended."""
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        found += (task / "children").read_text().split()
    commands = {child: Path(f"/proc/{child}/cmdline").read_text() for child in found}
    return [child for child, text in commands.items() if not any(name in text for name in MULTIPROCESSING_KEEPS)]
