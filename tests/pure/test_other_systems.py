"""doctor, plan and simulate start where Python lacks the functions that it has on Linux only."""

import json
import os
import subprocess
import sys

import pytest

IMPORT_TORCH = "import torch, numpy\n"  # first: these packages decide by the real sys.platform
# Python has these on Linux, and not on macOS or not on Windows.
LINUX_ONLY = """
import os, select, signal, sys
for module, names in (
    (os, "memfd_create pidfd_open sched_getaffinity sched_setaffinity statvfs uname geteuid getsid killpg"),
    (signal, "pidfd_send_signal SIGHUP SIGKILL"),
    (select, "epoll"),
):
    for name in names.split():
        delattr(module, name)
os.__all__ = [name for name in os.__all__ if hasattr(os, name)]
"""
RUN = """
sys.argv = ["vllm-npu", *sys.argv[1:]]
from vllm_npu.cli import main
main()
"""
LAYER = ["--experts", "64", "--topk", "4", "--hidden", "2048"]


def run_after(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code + RUN, *arguments],
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_doctor_starts():
    done = run_after(LINUX_ONLY, "doctor", "--json")
    assert "Traceback" not in done.stderr
    findings = json.loads(done.stdout)["findings"]
    assert not [each for each in findings if "this check failed" in each["what"]]
    [cores] = [each for each in findings if each["check"] == "cores"]
    assert cores["what"].startswith(str(os.cpu_count()))
    [shared] = [each for each in findings if each["check"] == "/dev/shm"]
    assert (shared["status"], "sockets" in shared["what"]) == ("ok", True)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["plan", "--soc", "A3", "--ep", "4", *LAYER], "auto takes"),
        (["simulate", "--fabric", "a3", "--ep", "8"], "dispatch"),
    ],
    ids=["plan", "simulate"],
)
def test_commands_that_only_compute_start(arguments, shown):
    done = run_after(IMPORT_TORCH + LINUX_ONLY, *arguments)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout


def test_a_system_without_prctl_leaves_its_request_out():
    """`sys.platform` is Windows's while the module is imported, and loading the C library by no name fails as it does there."""
    code = (
        "import sys; sys.platform = 'win32'; import ctypes; ctypes.CDLL = None; "
        "from vllm_npu.child_processes import signal_when_parent_dies; signal_when_parent_dies(9); print('started')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "started\n", done.stderr
