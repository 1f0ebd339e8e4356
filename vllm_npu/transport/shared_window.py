"""Shared memory of a group's ranks on one host, for large messages over gloo: each rank writes its own, and all read it.

A rank writes a message once, and each rank that needs it reads it there. Sockets copy it twice for each pair of ranks. A
small gloo message says where in the memory the bytes lie; the reader waits for that message, so it never reads too early.
"""

import json
import mmap
import os
import secrets
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Self

import torch

from vllm_npu import envs
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.transport.host import host_identity

CAPACITY = 64 << 20  # bytes of a message; the system gives memory for written bytes only
HALVES = 2  # a rank writes one half while others may still read the other
LENGTH = HALVES * CAPACITY + mmap.PAGESIZE
MARK_BYTES = 16  # at the end of the memory: a rank that opens it compares them with the offer
MAX_TEXT_BYTES = 512
MALFORMED = "malformed: "  # before the error of a rank that cannot read its setting


class NoSharedWindowError(UnsupportedConfigError):
    """The ranks of a group cannot share memory, or one of them must not. They exchange messages through sockets."""


class SharedWindow:
    """One rank's view of the group's shared memory. All ranks call it in the same order, each from one thread at a time."""

    def __init__(self, rank: int, windows: Sequence[torch.Tensor]) -> None:
        self._rank = rank
        self._windows = windows  # uint8, one for each rank; this rank writes its own only
        self._shared = 0  # number of calls of share()

    @classmethod
    def open(cls, rank: int, exchange: Callable[[str], list[str]]) -> Self:
        """Open the memory of all ranks. COLLECTIVE: `exchange` returns every rank's text, in rank order, cut after
        MAX_TEXT_BYTES.

        Raises NoSharedWindowError on every rank if one rank does not want shared memory (VLLM_NPU_SHARED_WINDOW=0), has none to
        share, or cannot read another rank's. Raises UnsupportedConfigError on every rank if the variable of one rank is
        malformed. The memory has no name in the file system, and ends with the ranks.
        """
        mark = secrets.token_hex(MARK_BYTES // 2)
        with ExitStack() as until_all_have_opened:
            own, offer = None, f"{envs.SHARED_WINDOW.name}=0"
            try:
                if envs.SHARED_WINDOW.read_flag():
                    own, offer = _offer(mark, until_all_have_opened)
            except UnsupportedConfigError as error:
                offer = f"{MALFORMED}{error}"
            except OSError as error:
                offer = f"no memory to share: {error}"
            offers = exchange(offer)
            malformed = [f"rank {other}: {text.removeprefix(MALFORMED)}" for other, text in enumerate(offers)
                         if text.startswith(MALFORMED)]  # fmt: skip
            if malformed:
                raise UnsupportedConfigError("; ".join(malformed))
            refusals = [f"rank {other}: {text}" for other, text in enumerate(offers) if not text.startswith("{")]
            if own is None or refusals:
                raise NoSharedWindowError("; ".join(refusals))
            windows, failure = [], ""
            try:
                for other, text in enumerate(offers):
                    windows.append(own if other == rank else _open_memory(**json.loads(text)))
            except (OSError, ValueError, NoSharedWindowError) as error:  # ValueError: the file is too short
                failure = f"rank {rank} cannot read the memory of rank {len(windows)}: {error}"
            failures = list(filter(None, exchange(failure)))
        if failures:
            raise NoSharedWindowError(failures[0])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            return cls(rank, [torch.frombuffer(window, dtype=torch.uint8) for window in windows])

    def share(
        self,
        x: torch.Tensor,  # contiguous, up to CAPACITY bytes
        spans: Sequence[tuple[int, int]],  # for each rank, the bytes of x that it needs: start, stop
        exchange: Callable[[torch.Tensor], torch.Tensor],  # all-to-all of [W, 2] int64: one row to and from each rank
    ) -> list[torch.Tensor]:  # uint8, [bytes], one for each rank
        """Write `x`, and return views of what each rank has for this one. COLLECTIVE. The views are valid until the second
        call after this one."""
        half = self._shared % HALVES * CAPACITY
        self._shared += 1
        self._windows[self._rank][half : half + x.nbytes].view(x.dtype).copy_(x.flatten())
        offered = exchange(torch.tensor(spans, device="cpu")).tolist()
        return [window[half + start : half + end] for window, (start, end) in zip(self._windows, offered, strict=True)]


def _offer(mark: str, until_all_have_opened: ExitStack) -> tuple[mmap.mmap, str]:
    """Make this rank's memory. Another process can open it by the returned text while the descriptor is open.

    Raises OSError where the system gives no such memory: memfd_create is Linux's.
    """
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no memfd_create")
    descriptor = os.memfd_create("vllm_npu_window")
    until_all_have_opened.callback(os.close, descriptor)
    os.ftruncate(descriptor, LENGTH)
    memory = mmap.mmap(descriptor, LENGTH)
    memory[-MARK_BYTES:] = mark.encode()
    path = f"/proc/{os.getpid()}/fd/{descriptor}"
    return memory, json.dumps({"host": host_identity(), "path": path, "mark": mark})


def _open_memory(*, host: str, path: str, mark: str) -> mmap.mmap:
    if host != host_identity():
        raise NoSharedWindowError("it runs on another host")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        memory = mmap.mmap(descriptor, LENGTH, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
    if memory[-MARK_BYTES:] != mark.encode():
        raise NoSharedWindowError(f"{path} is something else; it runs in another container")
    return memory
