"""Memory that each rank of a group writes and the others read, on one host: what large messages over gloo go through.

A message is written once and read by whoever needs it, in place of two copies for each pair of ranks through the kernel's
sockets. gloo still says where it lies, which is also what makes readers wait for writers.
"""

import json
import mmap
import os
import secrets
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import torch

from vllm_npu import envs
from vllm_npu.errors import UnsupportedConfigError

CAPACITY = 64 << 20  # bytes of a message; memory is used only once it is written to
HALVES = 2  # one to write while others may still read the other
LENGTH = HALVES * CAPACITY + mmap.PAGESIZE
MARK_BYTES = 16  # at the end, by which a rank knows that it opened the right memory
MAX_TEXT_BYTES = 512
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class SharedWindow:
    """One rank's end. Used from one thread at a time, by all ranks in the same order."""

    def __init__(self, rank: int, windows: Sequence[torch.Tensor]) -> None:
        self._rank = rank
        self._windows = windows  # of each rank, uint8; of other ranks, not to be written
        self._shared = 0  # messages so far

    @classmethod
    def open(cls, rank: int, exchange: Callable[[str], list[str]], *, wanted: bool = True) -> Self:
        """COLLECTIVE: `exchange` gives every rank's text, cut after MAX_TEXT_BYTES, in rank order. Raises
        UnsupportedConfigError on every rank where one does not want it, has no memory to share, or cannot read another's.
        Nothing is left in the file system, and nothing remains when the ranks end."""
        mark = secrets.token_hex(MARK_BYTES // 2)
        with ExitStack() as until_all_have_opened:
            try:
                own, offer = _offer(mark, until_all_have_opened) if wanted else (None, f"{envs.SHARED_WINDOW.name}=0")
            except OSError as error:
                own, offer = None, f"no memory to share: {error}"
            offers = exchange(offer)
            refusals = [f"rank {other}: {text}" for other, text in enumerate(offers) if not text.startswith("{")]
            if own is None or refusals:
                raise UnsupportedConfigError("; ".join(refusals))
            windows, failure = [], ""
            try:
                for other, text in enumerate(offers):
                    windows.append(own if other == rank else _open_memory(**json.loads(text)))
            except (OSError, ValueError, UnsupportedConfigError) as error:  # a ValueError: the file is shorter
                failure = f"rank {rank} cannot read the memory of rank {len(windows)}: {error}"
            failures = list(filter(None, exchange(failure)))
        if failures:
            raise UnsupportedConfigError(failures[0])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            return cls(rank, [torch.frombuffer(window, dtype=torch.uint8) for window in windows])

    def share(
        self,
        x: torch.Tensor,  # contiguous, up to CAPACITY bytes
        spans: Sequence[tuple[int, int]],  # for each rank, the bytes of x that it needs: from, to
        exchange: Callable[[torch.Tensor], torch.Tensor],  # [W, 2] int64, a row to each rank; gives a row of each
    ) -> list[torch.Tensor]:  # uint8, [bytes]
        """What each rank of the group has for this one; valid until the second share after this one. COLLECTIVE."""
        half = self._shared % HALVES * CAPACITY
        self._shared += 1
        self._windows[self._rank][half : half + x.nbytes].view(x.dtype).copy_(x.flatten())
        offered = exchange(torch.tensor(spans, device="cpu")).tolist()
        return [window[half + start : half + end] for window, (start, end) in zip(self._windows, offered, strict=True)]


def _boot_id() -> str:
    return BOOT_ID.read_text().strip()


def _offer(mark: str, until_all_have_opened: ExitStack) -> tuple[mmap.mmap, str]:
    """New memory, and the text by which another process opens it, while its descriptor is open."""
    descriptor = os.memfd_create("vllm_npu_window")
    until_all_have_opened.callback(os.close, descriptor)
    os.ftruncate(descriptor, LENGTH)
    memory = mmap.mmap(descriptor, LENGTH)
    memory[-MARK_BYTES:] = mark.encode()
    return memory, json.dumps({"boot": _boot_id(), "path": f"/proc/{os.getpid()}/fd/{descriptor}", "mark": mark})


def _open_memory(*, boot: str, path: str, mark: str) -> mmap.mmap:
    if boot != _boot_id():
        raise UnsupportedConfigError("it runs on another host")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        memory = mmap.mmap(descriptor, LENGTH, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
    if memory[-MARK_BYTES:] != mark.encode():
        raise UnsupportedConfigError(f"{path} is something else; it runs in another container")
    return memory
