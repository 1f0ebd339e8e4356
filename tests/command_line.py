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
