"""How long a test waits for something before it fails."""

import os
import time
from collections.abc import Callable

PATIENCE_SECONDS = 300  # for what may take any time, such as a start. Only a hang takes longer


def on_this_machine(quiet_seconds: float) -> float:
    """The limit, in seconds, for work that must take less than `quiet_seconds` on a quiet machine. Ask after the work.

    The rule: a process gets its share of a core. So the limit is multiplied by the number of processes that want to run on each
    core, by the load average of the last minute. One is added to this number, because the load average lags.
    """
    return quiet_seconds * (1 + os.getloadavg()[0] / len(os.sched_getaffinity(0)))


def wait_until(reached: Callable[[], bool], what: str) -> None:
    """Wait for `what`, and fail with its name after PATIENCE_SECONDS."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not reached():
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_SECONDS} s"
        time.sleep(0.05)
