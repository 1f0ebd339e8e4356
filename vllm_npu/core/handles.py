"""Handles: a stage returns one, and its inverse stage consumes it once. A split stage returns a Pending."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from vllm_npu.errors import HandleMismatchError


@dataclass(frozen=True, slots=True, kw_only=True)
class Handle:
    """Base of all handles. The inverse stage needs only the handle, so several may be in flight and end in any order."""

    _spent: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def is_spent(self) -> bool:
        """Whether the inverse stage has used the handle, or the dispatch was abandoned."""
        return bool(self._spent)

    def spend(self, stage: str) -> None:
        """Mark the handle as used by `stage`. Raises HandleMismatchError the second time."""
        if self._spent:
            raise HandleMismatchError(
                f"{stage} got a {type(self).__name__} that {self._spent[0]} has already used; each prepare or dispatch "
                "makes one handle for one call of its inverse"
            )
        self._spent.append(stage)


Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending(Handle, Generic[Result]):
    """Returned by the start of a stage. All ranks start stages in the same order, and may finish them in any order."""

    stage: str
    complete: Callable[[], Result]  # waits for the stage; only finish() calls it

    def finish(self) -> Result:
        """Wait for the stage and return its result. Call it once, on the stream of the start. Raises HandleMismatchError the
        second time."""
        self.spend(f"finish of {self.stage}")
        return self.complete()


HandleT = TypeVar("HandleT", bound=Handle)


def check_handle(handle: Handle, expected: type[HandleT], stage: str) -> HandleT:
    """Return `handle` with the type that `stage` consumes. Raises HandleMismatchError if it has another type."""
    if not isinstance(handle, expected):
        raise HandleMismatchError(
            f"{stage} got a {type(handle).__name__}, but needs the {expected.__name__} of its own inverse; use prepare and "
            "finalize (dispatch and combine) of one object in pairs"
        )
    return handle
