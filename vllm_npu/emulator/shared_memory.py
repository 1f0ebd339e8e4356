"""Shared memory of emulated devices that killed processes left behind. A process that ends by itself removes its own."""

import os
from pathlib import Path

FOLDER = Path("/dev/shm")
PREFIX = "vllm_npu_emulator."  # then RUN.PID.COUNT.TIME; see HcclGetRootInfo in csrc_npu/emulator/hccl


def process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # OverflowError: no process has such a large number
        return False
    except PermissionError:
        return True
    return True


def remove(path: Path) -> bool:
    """Remove the file if it belongs to this user. Return whether this call removed it: other processes may be faster."""
    try:
        if path.stat().st_uid != os.geteuid():
            return False
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def clean_run(run: str) -> None:
    """Remove the shared memory of one launch. Its processes must have ended."""
    for path in FOLDER.glob(f"{PREFIX}{run}.*"):
        remove(path)


def leftovers() -> list[Path]:
    """Files of all launches whose processes have ended. Other processes may remove them at any time."""
    found = []
    for path in sorted(FOLDER.glob(f"{PREFIX}*")):
        parts = path.name.removeprefix(PREFIX).split(".")
        # RUN begins with the launcher's process id, or is 0; PID is the process that made the file.
        pids = [part.partition("-")[0] for part in parts[:2]]
        numbers = [int(pid) for pid in pids if pid.isascii() and pid.isdecimal()]
        if not any(number > 0 and process_exists(number) for number in numbers):
            found.append(path)
    return found


def clean_leftovers() -> list[str]:
    """Remove the files of leftovers() that belong to this user. Return their names."""
    return [path.name for path in leftovers() if remove(path)]
