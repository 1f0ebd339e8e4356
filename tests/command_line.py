"""`vllm-npu` as it is typed."""

import os
import subprocess
import sys


def vllm_npu(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs the command in a process of its own; `environment` goes on top of this process's."""
    return subprocess.run(
        [sys.executable, "-m", "vllm_npu.cli", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def refusal(*arguments: str) -> str:
    """Run the command, which must end with exit status 1. Returns what it wrote to stderr."""
    done = vllm_npu(*arguments)
    assert done.returncode == 1, done.stdout
    return done.stderr
