"""Fixtures of this folder: ranks that start fast, and commands in the process of the tests."""

import gc
import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import forkserver

import pytest

from vllm_npu.cli import main
from vllm_npu.tools.launch import RANK_POOLS, ProcessRankPool

# The slow imports of all test files. A rank imports only the test file itself.
PRELOADED = ["pytest", "tests.cases", "vllm_npu.tools.verification", "vllm_npu.transport.gloo", "vllm_npu.tools.launch"]


@pytest.fixture(scope="package", autouse=True)
def forked_ranks() -> Iterator[None]:
    """Fork the ranks of gloo pools from a process that has imported torch.

    That process starts here, so that no test's environment variables reach it.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(RANK_POOLS, "gloo", partial(ProcessRankPool, transport="gloo", start_method="forkserver"))
        yield


Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """command("bench", "--ranks", "2") runs `vllm-npu bench --ranks 2` in this process: torch is imported already."""

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        monkeypatch.setattr(sys, "argv", ["vllm-npu", *arguments])
        monkeypatch.setattr(gc, "freeze", lambda: None)  # main() freezes because its process ends
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        written = capsys.readouterr()
        code = ended.value.code
        return subprocess.CompletedProcess(sys.argv, code if isinstance(code, int) else 0, written.out, written.err)

    return run
