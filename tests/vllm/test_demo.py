"""`vllm-npu demo` as a user runs it: a program that passes, and that leaves nothing behind when it is stopped."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.vllm.processes import kill_processes_of, processes_of
from vllm_npu.strategies.table import STRATEGIES

pytestmark = pytest.mark.slow

README = Path(__file__).parents[2] / "README.md"
DEMO = [sys.executable, "-m", "vllm_npu.cli", "demo"]
END_SECONDS = 60  # for a stopped demo to be gone


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
    """Ctrl-C while two engines with their workers are at work."""
    with running_demo(short_folder) as demo:
        wait_for(demo, "DP2×EP eager: generating with")
        assert len(processes_of(short_folder)) >= 6, "two engines, each with a core and a worker"
        demo.send_signal(signal.SIGINT)
        demo.communicate(timeout=END_SECONDS)
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
        demo.communicate(timeout=END_SECONDS)
    assert demo.returncode == 1
    results = json.loads(report.read_text())
    assert not results["passed"]
    assert "ended with exit status -9 while starting" in results["problems"][0]
    assert leftovers(short_folder) == []
    assert processes_of(short_folder) == []


def environment(folder: Path) -> dict[str, str]:
    """Ours, but for the temporary folder, by which the demo's processes are found again."""
    return os.environ | {"TMPDIR": str(folder)}


def leftovers(folder: Path) -> list[Path]:
    """What the demo left in its temporary folder."""
    return list(folder.iterdir())


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextmanager
def running_demo(folder: Path, *options: str) -> Iterator["subprocess.Popen[str]"]:
    """The demo as a process; killed if the test fails."""
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
    """Read what the demo says until a line holds `text`."""
    said = ""
    assert demo.stderr is not None
    for line in demo.stderr:
        said += line
        if text in line:
            return
    pytest.fail(f"the demo ended without saying {text!r}:\n{said}")
