"""While a step waits for a device: a thread that looks for the ranks that have ended.

The host does not wait for a collective of NCCL, but for the step's tokens. NCCL finds a failed collective in a thread of its
own, up to ten minutes later, ends the process from there, and names no rank. The lookout says before that which ranks are gone.
Then it aborts the communicators, so that the wait ends and the caller gets the error.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from vllm_npu.errors import RankFailureError
from vllm_npu.transport.base import Transport
from vllm_npu.trust.watchdog import Watchdog

logger = logging.getLogger("vllm.npu.trust.step_lookout")  # vLLM shows the messages of loggers below "vllm"

LOOK_SECONDS: Final = 5.0  # between two looks; a shorter wait costs no look
EARLY: Final = 0.9  # of the deadline, since NCCL's own time-out may be as long and ends the process


class StepLookout:
    """Looks at the mailboxes of all ranks while this rank waits, and keeps the error that names the ended or late ranks.

    An ended rank is named at the next look. A late rank is named shortly before the watchdog's deadline; the watchdog then
    takes up to GRACE_SECONDS for its reports. The thread logs the error and aborts `groups`, which ends waits for them. check()
    then raises the error. A wait for a communicator that is not among `groups` goes on.
    """

    def __init__(
        self, watchdog: Watchdog, look_seconds: float = LOOK_SECONDS, groups: Sequence[Transport] = ()
    ) -> None:
        self._watchdog = watchdog
        self._groups = [group.innermost for group in groups if group.size > 1]
        self._look_seconds = look_seconds
        self._waits: dict[object, float] = {}  # when each wait of this process began; vLLM overlaps steps
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._failure: RankFailureError | None = None
        threading.Thread(target=self._run, name="vllm_npu_step_lookout", daemon=True).start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark that the calling thread waits inside for the device, and so for other ranks. LOCAL. Host sync: no."""
        wait = object()
        with self._lock:
            self._waits[wait] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                del self._waits[wait]

    def check(self) -> None:
        """Raise the RankFailureError that the thread has found. LOCAL. Host sync: no."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """End the thread. Safe to call twice."""
        self._closed.set()

    def _longest_wait(self) -> float:
        with self._lock:
            return time.monotonic() - min(self._waits.values(), default=time.monotonic())

    def _run(self) -> None:
        while not self._closed.wait(self._look_seconds):
            seconds = self._longest_wait()
            if seconds < self._look_seconds:
                continue
            if seconds < EARLY * self._watchdog.deadline and not self._watchdog.ended():
                continue
            detail = f"this rank has waited {seconds:.0f} s for the device"
            begun = self._watchdog.last_begun
            operation, group = ("step", "ep") if begun is None else begun
            self._failure = self._watchdog.failure(operation, group, self._watchdog.rank, detail)
            logger.error("%s", self._failure)
            _abort(self._groups)
            return


def _abort(groups: Sequence[Transport]) -> None:
    """Abort all groups at once: kernels of one group may stand on the device behind waiting kernels of another one.

    Waits end at once, but NCCL's call returns after the graphs that hold its kernels are gone. No process waits for it.
    """
    for group in groups:
        threading.Thread(target=group.abort, name="vllm_npu_abort", daemon=True).start()
