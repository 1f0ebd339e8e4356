"""`vllm-npu` as a user types it."""

import os
import subprocess
import sys

from tests.time_limits import PATIENCE_SECONDS


def vllm_npu(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the command in a process of its own. `environment` is added to this process's."""
    return subprocess.run(
        [sys.executable, "-m", "vllm_npu.cli", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
