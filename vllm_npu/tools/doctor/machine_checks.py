"""doctor's checks of the machine: CANN and HCCL, drivers, devices, shared memory, cores and NUMA nodes. Standard library
only."""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from vllm_npu import envs
from vllm_npu.emulator import cann, shared_memory
from vllm_npu.tools.doctor.findings import OK, PROBLEM, WARNING, Finding, probe, probe_python

TOOL_SECONDS = 20.0
SMALL_SHARED_MEMORY = 1 << 30  # bytes; vLLM's message queues and the emulated HCCL both lie there
HCCL_LIBRARY = "libhccl.so"
DEVICES = Path("/dev")
NUMA_NODES = Path("/sys/devices/system/node")
CONTROL_GROUPS = Path("/sys/fs/cgroup")


# --- NPUs and GPUs ---


def check_cann() -> Iterator[Finding]:
    found = cann.find()
    if found is None:
        yield Finding("CANN", OK, "none, so NPUs are out of reach and the emulated device may run")
        return
    if os.environ.get(envs.EMULATOR.name) == "1":
        yield Finding(
            "CANN", PROBLEM, f"{found}, and {envs.EMULATOR.name}=1 asks for the emulated device, which refuses beside it",
            f"unset {envs.EMULATOR.name}, or hide CANN (unset its variables and LD_LIBRARY_PATH)",
        )  # fmt: skip
    else:
        yield Finding("CANN", OK, found)
    yield from check_hccl_library()
    yield from check_npu_devices()


def check_hccl_library() -> Iterator[Finding]:
    """Whether HCCL's library loads, as torch_npu will ask for it: by name."""
    code = f"import ctypes; ctypes.CDLL({HCCL_LIBRARY!r}); print(*open('/proc/self/maps'))"
    tried = probe_python(code)
    if not tried.fault:
        loaded = re.search(rf"\S+/{re.escape(HCCL_LIBRARY)}\S*", tried.output)
        yield Finding("libhccl", OK, loaded[0] if loaded else HCCL_LIBRARY)
        return
    homes = [os.environ[name] for name in cann.HOME_VARIABLES if os.environ.get(name)]
    scripts = [str(path) for home in homes for path in (Path(home, "set_env.sh"), Path(home, "../set_env.sh"))]
    script = next((path for path in scripts if Path(path).is_file()), "set_env.sh of CANN")
    yield Finding(
        "libhccl", PROBLEM, f"{HCCL_LIBRARY} does not load: {tried.fault}",
        f"source {script} in this shell; if that does not help, CANN is incomplete or of another architecture",
    )  # fmt: skip


def check_npu_devices(folder: Path = DEVICES) -> Iterator[Finding]:
    numbers = sorted(int(path.name.removeprefix("davinci")) for path in folder.glob("davinci[0-9]*"))
    if not numbers:
        yield Finding(
            "NPU devices", WARNING, f"CANN is here, and no {folder}/davinci* is: there is no NPU, or none is let in",
            "in a container, pass --device /dev/davinci0 (one for each NPU), /dev/davinci_manager, /dev/devmm_svm and "
            "/dev/hisi_hdc",
        )  # fmt: skip
    else:
        yield Finding("NPU devices", OK, f"{len(numbers)}: {', '.join(map(str, numbers))}")


def check_drivers() -> Iterator[Finding]:
    for tool, arguments, hardware in (("npu-smi", ["info"], "NPU"), ("nvidia-smi", ["-L"], "NVIDIA GPU")):
        path = shutil.which(tool)
        if path is None:
            yield Finding(tool, OK, f"not there, so no {hardware} is visible")
            continue
        tried = probe([path, *arguments], TOOL_SECONDS)
        if tried.fault:
            yield Finding(tool, WARNING, f"{path} fails: {tried.fault}", f"see to the driver of the {hardware}")
        else:
            yield Finding(tool, OK, (tried.output.splitlines() or [path])[0])


# --- memory that processes share ---


def check_shared_memory() -> Iterator[Finding]:
    folder = shared_memory.FOLDER
    try:
        room = os.statvfs(folder)
    except OSError as error:
        yield Finding(str(folder), PROBLEM, f"cannot be used: {error}", f"mount a tmpfs on {folder}")
        return
    total, free = room.f_frsize * room.f_blocks, room.f_frsize * room.f_bavail
    size = f"{free / (1 << 20):,.0f} of {total / (1 << 20):,.0f} MiB free"
    if free < SMALL_SHARED_MEMORY:
        yield Finding(
            str(folder), WARNING, f"{size}: vLLM's processes and the emulated HCCL may run out of it",
            "remove what is left there, or start the container with --shm-size=2g",
        )  # fmt: skip
    else:
        yield Finding(str(folder), OK, size)
    left = shared_memory.leftovers()
    if left:
        yield Finding(
            str(folder), WARNING, f"{len(left)} files that killed runs left behind: {', '.join(path.name for path in left)}",
            f"{sys.executable} -m vllm_npu.emulator clean",
        )  # fmt: skip


# --- cores ---


def parse_cores(text: str) -> set[int]:
    """'0-2,8' -> {0, 1, 2, 8}, as the kernel and vLLM write lists of cores. Raises ValueError."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    return cores


def granted_cores(folder: Path = CONTROL_GROUPS) -> float | None:
    """Cores whose time the control group grants, of which a container's threads may be more; None: no limit."""
    try:
        if (folder / "cpu.max").is_file():  # version 2: "max 100000", or microseconds of each period
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu/cpu.cfs_period_us").read_text()
    except OSError:
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


def allowed_cores() -> set[int]:
    """The cores that this process may run on. macOS and Windows do not tell: all cores there."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def check_cores(control_groups: Path = CONTROL_GROUPS) -> Iterator[Finding]:
    cores = len(allowed_cores())
    granted = granted_cores(control_groups)
    usable = cores if granted is None else min(cores, max(1, int(granted)))
    shown = f"{cores}" if usable == cores else f"{cores}, of which the control group grants the time of {granted:g}"
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is None and usable < cores:
        yield Finding(
            "cores", WARNING, f"{shown}; OMP_NUM_THREADS is unset, so each process starts {cores} threads and is throttled",
            f"set it to {usable} divided by the number of ranks",
        )  # fmt: skip
    elif threads is None:
        yield Finding(
            "cores",
            OK,
            f"{shown}; OMP_NUM_THREADS is unset, so each process takes all: set it to cores / ranks for several",
        )
    elif not re.fullmatch(r"[1-9][0-9]*(,[1-9][0-9]*)*", threads):
        yield Finding(
            "cores", PROBLEM, f"OMP_NUM_THREADS={threads!r} is no number", "set it to a whole number, or unset it"
        )
    elif int(threads.partition(",")[0]) > usable:
        yield Finding(
            "cores", WARNING, f"OMP_NUM_THREADS={threads} is more than the {shown} cores of this process",
            f"set it to {usable} divided by the number of ranks",
        )  # fmt: skip
    else:
        yield Finding("cores", OK, f"{shown}, OMP_NUM_THREADS={threads}")


def check_numa(nodes: Path = NUMA_NODES) -> Iterator[Finding]:
    """The nodes that this process may run on, and vLLM's binding of ranks to cores."""
    allowed = allowed_cores()
    spread = {}
    for path in nodes.glob("node[0-9]*/cpulist"):
        cores = parse_cores(path.read_text()) if path.read_text().strip() else set()
        if cores & allowed:
            spread[int(path.parent.name.removeprefix("node"))] = len(cores & allowed)
    if spread:
        listed = ", ".join(f"node {node}: {count} cores" for node, count in sorted(spread.items()))
        yield Finding("NUMA", OK, f"{len(spread)} nodes, {listed}" if len(spread) > 1 else listed)
    binding = os.environ.get(envs.CPU_OMP_THREADS_BIND, "auto")
    if binding in ("auto", "nobind"):
        return
    try:
        ranks = [parse_cores(part) for part in binding.split("|")]
    except ValueError:
        yield Finding(
            envs.CPU_OMP_THREADS_BIND, PROBLEM, f"is {binding!r}, which is no list of cores for each rank",
            "set it to lists such as 0-31|32-63, one a rank, to auto, or to nobind",
        )  # fmt: skip
        return
    foreign = sorted(set().union(*ranks) - allowed)
    if foreign:
        yield Finding(
            envs.CPU_OMP_THREADS_BIND, PROBLEM, f"names cores that this process may not use: {', '.join(map(str, foreign))}",
            f"name cores among {', '.join(map(str, sorted(allowed)))}, or set it to auto",
        )  # fmt: skip
    else:
        yield Finding(envs.CPU_OMP_THREADS_BIND, OK, f"{len(ranks)} ranks: {binding}")
