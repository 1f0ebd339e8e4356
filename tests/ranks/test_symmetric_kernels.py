"""The kernels of the symmetric strategy after a failure, on CPUs in Triton's interpreter. tests/cuda runs them on GPUs."""

import inspect
import json
import logging
import os
import subprocess
import sys

import pytest

from tests.time_limits import PATIENCE_SECONDS

pytest.importorskip("triton", reason="needs Triton")

import triton
from triton.runtime.jit import JITFunction

from vllm_npu.transport.kernels.launch import DIRECT_LAUNCH, _launches_directly

NUM_RANKS = 3


@pytest.fixture(scope="module")
def seen() -> dict[str, list[dict[str, object]]]:
    """What each rank saw, by scenario."""
    program = [sys.executable, "-m", "tests.ranks.interpreted_kernels", str(NUM_RANKS)]
    run = subprocess.run(
        program,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_abandoned_dispatches_leave_good_steps_behind_them(seen):
    assert seen["recovers"] == [{"good": [True] * 14, "missing": {}}] * NUM_RANKS


def test_a_rank_that_alone_abandons_a_dispatch_is_named_by_the_ranks_that_combine_it(seen):
    for rank in seen["last_abandons_alone"]:
        assert rank["good"] == [True]
        assert rank["missing"][str(NUM_RANKS - 1)] == "combine"


def test_a_late_rank_is_named_on_all_ranks_and_names_no_other(seen):
    assert seen["last_is_late"] == [{"good": [True], "missing": {str(NUM_RANKS - 1): "dispatch"}}] * NUM_RANKS


def test_sorted_rows_global_ids_few_multiprocessors_and_rows_in_windows_are_exact(seen):
    assert seen["variants"] == [{"good": [True] * 24, "missing": {}}] * NUM_RANKS


def test_the_installed_triton_launches_as_prepared_launch_does():
    major, minor, *_ = triton.__version__.split(".")
    call = (
        "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata, "
        "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())"
    )
    found = call in " ".join(inspect.getsource(JITFunction.run).split())
    assert found == ((int(major), int(minor)) in DIRECT_LAUNCH)


def test_another_release_of_triton_is_launched_by_its_own_call_and_the_log_says_why(caplog):
    caplog.set_level(logging.WARNING)
    _launches_directly.cache_clear()
    assert [_launches_directly(version) for version in ("3.6.0", "3.9.0+git1", "2.3.1", "4.0.0", "4.0.0")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert [record.args[0] for record in caplog.records] == ["2.3.1", "4.0.0"]
