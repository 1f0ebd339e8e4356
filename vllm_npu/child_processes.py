"""Start of further processes on this machine: their variables, a free port for them, and their end when this process dies.

Standard library only. The emulator and tools/engines use this file, and the emulator may import nothing that imports torch.
"""

import ctypes
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _find_prctl() -> Any:
    """prctl of the C library; None on macOS and Windows, which do not have it."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes, prctl.restype = [ctypes.c_int, ctypes.c_ulong], ctypes.c_int
    return prctl


_prctl = _find_prctl()  # at import: a new process must not look functions up between fork and exec


@contextmanager
def changed_environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Give these variables to this process, and so to those that it starts in the block. Its end undoes every change."""
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that no process uses now. Another process may take it before the caller does."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def signal_when_parent_dies(signal_number: int) -> None:
    """Ask the kernel to send this process the signal when its parent dies. For `preexec_fn` of subprocess.Popen.

    The parent is the thread that started this process. macOS and Windows have no such request: there, nothing happens.
    """
    if _prctl is not None:
        _prctl(PR_SET_PDEATHSIG, signal_number)
