"""SIGINT, SIGTERM and SIGHUP as one exception, raised where the program can clean up after itself."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """The program was asked to stop. Not an Exception, so that nothing on the way out mistakes it for a failure."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum

    @property
    def exit_status(self) -> int:
        """What a shell reports for a program that this signal ended."""
        return 128 + self.signum


class StopSignals:
    """While entered (main thread only), the first stop signal raises Interrupted; later ones change nothing.

    Inside `held()` the exception waits for the end of the block: starting a process and noting it, or taking processes
    down, must not be cut in half. Without being entered, `held()` does nothing.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._raised = False
        self._depth = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {signum: signal.signal(signum, self._handle) for signum in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Put Interrupted off until the block has ended. Blocks may be nested."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        self._raise_if_due()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self._received = self._received or signum
        self._raise_if_due()

    def _raise_if_due(self) -> None:
        if self._received is not None and not self._raised and self._depth == 0:
            self._raised = True
            raise Interrupted(self._received)
