"""The process tree that the command line puts around vLLM's processes. The test needs no vLLM."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.time_limits import PATIENCE_SECONDS
from vllm_npu.tools.engines import start_watch
from vllm_npu.tools.engines.process_tree import SHARED_MEMORY_FOLDER, ProcessTree, mapped_shared_memory

# The program makes a semaphore and a segment in /dev/shm. It maps the semaphore under a name that no longer exists, and the
# segment under its own name. The child loses its parent when the tree is killed.
PROGRAM = """
import multiprocessing, subprocess, sys
from multiprocessing.shared_memory import SharedMemory
segment = SharedMemory(create=True, size=1 << 20)
lock = multiprocessing.get_context("spawn").Lock()
child = subprocess.Popen([sys.executable, "-c", "import sys; print('ready', flush=True); sys.stdin.read()"],
                         stdin=subprocess.PIPE)
child.wait()
"""


@pytest.mark.parametrize("asked_first", [False, True], ids=["killed", "terminated"])
def test_a_tree_that_ends_leaves_neither_processes_nor_shared_memory(asked_first: bool) -> None:
    before = set(SHARED_MEMORY_FOLDER.iterdir())
    tree = ProcessTree([sys.executable, "-c", PROGRAM], environment=os.environ, stdout=subprocess.PIPE)
    assert tree.process.stdout is not None
    assert tree.process.stdout.readline() == b"ready\n"
    members = tree.members()
    inodes = {inode for pid in members for inode in mapped_shared_memory(pid)}
    made = {path for path in set(SHARED_MEMORY_FOLDER.iterdir()) - before if path.stat().st_ino in inodes}
    assert len(members) >= 3, "the program, its child, multiprocessing's resource tracker"
    assert len(made) == 2, "a segment and a semaphore"

    if asked_first:
        tree.terminate_all()
        assert tree.process.wait(PATIENCE_SECONDS) == -signal.SIGTERM
    tree.stop(grace_seconds=0)
    assert tree.members() == []
    assert not any(path.exists() for path in made)
    tree.stop(grace_seconds=0)  # again: nothing to do


RENAMED = """
import time
from setproctitle import setproctitle
setproctitle("VLLM::Worker")
time.sleep(2)
setproctitle("{name}")
time.sleep(600)
"""
FORKING = """
import os, time
from setproctitle import setproctitle
setproctitle("VLLM::EngineCore_DP0")
if os.fork() == 0:
    time.sleep(3)
    os.execvp("sleep", ["sleep", "3"])
time.sleep(600)
"""
SERVER = """
import subprocess, sys
children = [subprocess.Popen([sys.executable, "-c", program]) for program in sys.argv[1:]]
for child in children:
    child.wait()
"""


def test_a_worker_that_ends_is_named_although_its_server_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes with vLLM's names. A worker that changes its name, as vLLM's workers do, is no failure."""
    pytest.importorskip("setproctitle", reason="needs what vLLM names its processes with")
    monkeypatch.setattr(start_watch, "OWN_END_SECONDS", 1.0)
    workers = [RENAMED.format(name=f"VLLM::Worker_DP{rank}_EP{rank}") for rank in range(2)]
    tree = ProcessTree([sys.executable, "-c", SERVER, *workers], environment=os.environ)
    try:
        watch = start_watch.StartWatch(tree)
        give_up = time.monotonic() + PATIENCE_SECONDS
        victim = None
        while victim is None and time.monotonic() < give_up:
            assert watch.failure() is None
            victim = next((pid for pid, title in watch.workers().items() if title == "VLLM::Worker_DP1_EP1"), None)
        assert victim is not None
        time.sleep(start_watch.OWN_END_SECONDS + 1)
        assert watch.failure() is None
        os.kill(victim, signal.SIGKILL)
        while (failure := watch.failure()) is None and time.monotonic() < give_up:
            time.sleep(0.05)
        assert failure == "VLLM::Worker_DP1_EP1 ended while the server started, and the server did not end"
        assert tree.process.poll() is None
    finally:
        tree.stop(grace_seconds=0)


def test_a_copy_of_an_engine_core_that_becomes_another_program_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between fork and exec a child has its parent's name, for seconds on a busy machine. So start vLLM's workers."""
    pytest.importorskip("setproctitle", reason="needs what vLLM names its processes with")
    monkeypatch.setattr(start_watch, "OWN_END_SECONDS", 0.0)
    tree = ProcessTree([sys.executable, "-c", SERVER, FORKING], environment=os.environ)
    try:
        watch, give_up = start_watch.StartWatch(tree), time.monotonic() + PATIENCE_SECONDS
        copied = False
        while not (copied and len(tree.members()) == 2) and time.monotonic() < give_up:
            assert watch.failure() is None
            copied |= len(tree.members()) == 3
        assert copied
        assert watch.failure() is None
    finally:
        tree.stop(grace_seconds=0)


@pytest.mark.parametrize("line", start_watch.FAILURES)
def test_a_failure_that_only_the_log_tells_is_seen(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine core of vLLM 0.23 that cannot start may wait for its workers, and no process ends."""
    monkeypatch.setattr(start_watch, "OWN_END_SECONDS", 0.0)
    program = f"import time; print('ERROR [core.py:1195] {line}', flush=True); time.sleep(3600)"
    log = tmp_path / "server.log"
    with log.open("wb") as file:
        tree = ProcessTree([sys.executable, "-c", program], environment=os.environ, stdout=file)
    try:
        watch, give_up = start_watch.StartWatch(tree, log), time.monotonic() + PATIENCE_SECONDS
        while (failure := watch.failure()) is None and time.monotonic() < give_up:
            time.sleep(0.05)
        assert failure == f"its log says {line!r}, and the server did not end"
        assert tree.process.poll() is None
    finally:
        tree.stop(grace_seconds=0)
