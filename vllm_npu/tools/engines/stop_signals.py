"""SIGINT, SIGTERM and SIGHUP as one exception. The program can then remove its processes and files."""

import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, ClassVar, Self

STOP_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]  # Windows: no SIGHUP


class Interrupted(BaseException):
    """A stop signal came. This is no Exception, so that no handler of errors takes it for a failure."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum

    @property
    def exit_status(self) -> int:
        """The exit status that a shell reports for a program that this signal ended."""
        return 128 + self.signum


class SignalScope(ABC):
    """Context manager, for the main thread only. In it, _handle gets the signals in place of the handlers from before."""

    signals: ClassVar[Sequence[int]]

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {signum: signal.signal(signum, self._handle) for signum in self.signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    @abstractmethod
    def _handle(self, signum: int, frame: FrameType | None) -> None: ...


class StopSignals(SignalScope):
    """Context manager, for the main thread only. In it, the first stop signal raises Interrupted, and later ones do nothing.

    In a block of `held()`, the exception waits for the end of the block. Two things must not be cut in half: the start of a
    process together with the note of its id, and the end of processes. Outside of the context manager, `held()` does nothing.
    """

    signals = STOP_SIGNALS

    def __init__(self) -> None:
        super().__init__()
        self._received: int | None = None
        self._raised = False
        self._depth = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Delay Interrupted until the block has ended. Blocks may be nested."""
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
