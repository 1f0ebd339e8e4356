"""`vllm-npu demo` as a user runs it. It passes, and it leaves nothing behind when it is stopped.

A Ctrl-C while several engines generate is in test_engine.py.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.time_limits import PATIENCE_SECONDS
from tests.vllm.processes import kill_processes_of, processes_of
from vllm_npu.strategies.table import STRATEGIES

pytestmark = pytest.mark.slow

README = Path(__file__).parents[2] / "README.md"
DEMO = [sys.executable, "-m", "vllm_npu.cli", "demo"]


def test_every_strategy_passes(short_folder: Path, tmp_path: Path, shared_memory_unchanged: None) -> None:
    report = tmp_path / "report.json"
    finished = subprocess.run(
        [*DEMO, "--json", str(report)], env=environment(short_folder), capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr

    results = json.loads(report.read_text())
    assert results["passed"]
    assert results["problems"] == []
    [reference] = results["references"]
    assert reference["smallest_margin"] > 1e-3
    num_tokens = sum(map(len, reference["tokens"]))
    assert reference["distinct_tokens"] > num_tokens // 2, "decoding degenerates"
    assert [row["strategy"] for row in results["comparisons"]] == list(STRATEGIES)
    for row in results["comparisons"]:
        assert row["passed"]
        assert row["strategies_run"] == [row["strategy"]]
        assert row["tokens_identical"] == row["tokens_total"] == num_tokens
        assert row["first_difference"] is None
        assert row["collectives_per_moe_layer"] > 0
        assert sum(row["collectives"].values()) > 0
        assert row["bytes_sent_per_token_per_layer"] > 0
        assert f"{num_tokens}/{num_tokens}" in finished.stdout
        shown = f"{row['strategy']} | {num_tokens}/{num_tokens} | {row['collectives_per_moe_layer']:.1f} |"
        assert shown in README.read_text(encoding="utf-8")  # bytes depend on which requests meet in a step
    assert leftovers(short_folder) == []
    assert processes_of(short_folder) == []


def test_interrupt_leaves_nothing_behind(short_folder: Path, shared_memory_unchanged: None) -> None:
    """Ctrl-C while the reference engine starts."""
    with running_demo(short_folder) as demo:
        wait_for(demo, "starting vanilla vLLM")
        assert len(children_of(demo.pid)) == 1
        demo.send_signal(signal.SIGINT)
        demo.communicate(timeout=PATIENCE_SECONDS)
    assert demo.returncode == 128 + signal.SIGINT
    assert leftovers(short_folder) == []
    assert processes_of(short_folder) == []


def test_death_of_an_engine_is_reported_and_leaves_nothing_behind(
    short_folder: Path, tmp_path: Path, shared_memory_unchanged: None
) -> None:
    """The reference engine is killed from outside while it starts."""
    report = tmp_path / "report.json"
    with running_demo(short_folder, "--json", str(report)) as demo:
        wait_for(demo, "starting vanilla vLLM")
        [engine] = children_of(demo.pid)
        os.kill(engine, signal.SIGKILL)
        demo.communicate(timeout=PATIENCE_SECONDS)
    assert demo.returncode == 1
    results = json.loads(report.read_text())
    assert not results["passed"]
    assert "ended with exit status -9 while starting" in results["problems"][0]
    assert leftovers(short_folder) == []
    assert processes_of(short_folder) == []


def environment(folder: Path) -> dict[str, str]:
    """This process's environment with `folder` as the temporary folder. processes_of() finds the demo's processes by it."""
    return os.environ | {"TMPDIR": str(folder)}


def leftovers(folder: Path) -> list[Path]:
    """Files that the demo left in its temporary folder."""
    return list(folder.iterdir())


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextmanager
def running_demo(folder: Path, *options: str) -> Iterator["subprocess.Popen[str]"]:
    """Start the demo as a process. Kill it if the test fails."""
    demo = subprocess.Popen(
        [*DEMO, *options], env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield demo
    finally:
        if demo.poll() is None:
            kill_processes_of(folder)
            demo.communicate()


def wait_for(demo: "subprocess.Popen[str]", text: str) -> None:
    """Read the demo's lines until one holds `text`."""
    said = ""
    assert demo.stderr is not None
    for line in demo.stderr:
        said += line
        if text in line:
            return
    pytest.fail(f"the demo ended without saying {text!r}:\n{said}")
