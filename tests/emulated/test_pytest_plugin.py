"""The pytest fixture, as somebody else's project uses it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.emulated

CONFTEST = 'pytest_plugins = ["vllm_npu.emulator.pytest_plugin"]\n'
PROJECT = """
from dataclasses import dataclass

import neighbour


@dataclass
class Sum:
    value: float


def all_reduce(rank, num_ranks, scale):
    import torch

    x = torch.full((3,), scale.value * (rank + 1), device="npu")
    torch.distributed.all_reduce(x)
    return Sum(x.sum().item() + neighbour.ZERO)


def fail_on_rank_1(rank, num_ranks):
    assert rank != 1, "rank 1 is meant to fail"
    return rank


def sleep(rank, num_ranks):
    import time

    time.sleep(600)


def test_passes(run_in_ranks):
    assert run_in_ranks(all_reduce, 3, Sum(2.0)).returned == [Sum(36.0)] * 3


def test_fails(run_in_ranks):
    run_in_ranks(fail_on_rank_1, 2)


def test_may_fail(run_in_ranks):
    outcome = run_in_ranks(fail_on_rank_1, 2, may_fail=True)
    assert outcome.code == 1
    assert outcome.returned == [0, None]


def test_nested(run_in_ranks):
    run_in_ranks(lambda rank, num_ranks: None, 2)


def test_times_out(run_in_ranks):
    run_in_ranks(sleep, 1, timeout=3)
"""

KILLED = """
import os
import pathlib
import signal
import time


def kill_pytest(rank, num_ranks, pytest_process):
    pathlib.Path(__file__).with_name("rank").write_text(str(os.getpid()))
    os.kill(pytest_process, signal.SIGKILL)
    time.sleep(600)


def test_killed(run_in_ranks):
    run_in_ranks(kill_pytest, 1, os.getpid())
"""


@pytest.fixture
def run_pytest(tmp_path):
    """Runs pytest on a project of its own, which lies where nothing of this checkout does."""
    tests = tmp_path / "tests"
    tests.mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tests / "test_project.py").write_text(PROJECT)
    (tests / "neighbour.py").write_text("ZERO = 0\n")

    def run(*arguments: str, **environment: str) -> str:
        command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", *arguments]
        env = {**os.environ, "PYTHONPATH": str(tests), **environment}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
        return done.stdout + done.stderr

    return run


@pytest.mark.parametrize("mode", ["prepend", "importlib"])
def test_a_function_runs_in_ranks_and_returns_objects_of_its_module(run_pytest, mode):
    output = run_pytest(f"--import-mode={mode}", "-k", "test_passes")
    assert "1 passed" in output, output


def test_how_a_test_fails(run_pytest):
    output = run_pytest("-k", "test_fails or test_may_fail or test_nested or test_times_out")
    assert "1 passed" in output, output
    assert "3 failed" in output, output
    assert "test_project:fail_on_rank_1 on 2 ranks ended with 1:" in output
    assert "AssertionError: rank 1 is meant to fail" in output
    assert "run_in_ranks: test_nested.<locals>.<lambda> is not at the top of a module; move it there" in output
    assert "1 emulated ranks did not end in 3 s; they printed:" in output


def test_ranks_are_new_interpreters_where_a_process_cannot_fork(run_pytest, tmp_path):
    with open(tmp_path / "conftest.py", "a") as file:
        file.write("import os\n\ndel os.fork\n")
    output = run_pytest("-k", "test_passes")
    assert "1 passed" in output, output
    assert "a new interpreter for each rank, which takes seconds: this system has no os.fork" in output


def test_nothing_is_left_of_the_ranks_of_a_killed_pytest(run_pytest, tmp_path):
    """The process that forks ranks ends with pytest, and the ranks end with that process."""
    (tmp_path / "tests" / "test_project.py").write_text(KILLED)
    run_pytest("-k", "test_killed")
    rank = int((tmp_path / "tests" / "rank").read_text())
    deadline = time.monotonic() + 60
    while is_running(rank):
        assert time.monotonic() < deadline, "60 s after the death of pytest, the rank still runs"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_it_skips_where_the_device_cannot_be_had(run_pytest):
    output = run_pytest("-k", "test_passes", ASCEND_HOME_PATH="/somewhere")
    assert "1 skipped" in output, output
    assert "needs the emulated Ascend device: a machine without a real CANN (ASCEND_HOME_PATH=/somewhere)" in output


def test_pytest_does_not_load_it_unless_it_is_asked_for(run_pytest, tmp_path):
    (tmp_path / "conftest.py").unlink()
    output = run_pytest("-k", "test_passes")
    assert "fixture 'run_in_ranks' not found" in output, output
