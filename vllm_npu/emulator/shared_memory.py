"""Removes shared memory that killed processes left behind. Processes that end by themselves leave none."""

import os
from pathlib import Path

FOLDER = Path("/dev/shm")
PREFIX = "vllm_npu_emulator."  # then RUN.PID.COUNT.TIME; see HcclGetRootInfo in csrc_npu/emulator/hccl


def process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def remove(path: Path) -> bool:
    """Whether the file was this user's and has been removed."""
    try:
        if path.stat().st_uid != os.geteuid():
            return False
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def clean_run(run: str) -> None:
    """Removes what the processes of one launch left; they must have ended."""
    for path in FOLDER.glob(f"{PREFIX}{run}.*"):
        remove(path)


def leftovers() -> list[Path]:
    """What processes that do not exist any more left, of all launches."""
    found = []
    for path in sorted(FOLDER.glob(f"{PREFIX}*")):
        parts = path.name.removeprefix(PREFIX).split(".")
        pids = [part.partition("-")[0] for part in parts[:2]]  # the launcher's (0 without one), and the maker's
        if not any(pid.isdigit() and int(pid) > 0 and process_exists(int(pid)) for pid in pids):
            found.append(path)
    return found


def clean_leftovers() -> list[str]:
    """Removes what processes that do not exist any more left, of all launches. Returns the names."""
    return [path.name for path in leftovers() if remove(path)]
