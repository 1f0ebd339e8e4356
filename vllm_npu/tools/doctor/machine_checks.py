"""doctor's checks of the machine: CANN and HCCL, drivers, devices, shared memory, cores and NUMA nodes.

Standard library only. A system without /dev/shm, /proc or a list of allowed cores (macOS, Windows) gets findings too.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from vllm_npu import envs
from vllm_npu.emulator import cann, shared_memory
from vllm_npu.tools.doctor.findings import OK, PROBLEM, WARNING, Finding
from vllm_npu.tools.doctor.probes import probe, probe_python

TOOL_SECONDS = 20.0
SMALL_SHARED_MEMORY = 1 << 30  # bytes; vLLM's message queues and the emulated HCCL need shared memory
HCCL_LIBRARY = "libhccl.so"
DEVICE_FOLDER = Path("/dev")
NUMA_NODES = Path("/sys/devices/system/node")
CONTROL_GROUPS = Path("/sys/fs/cgroup")


# --- NPUs and GPUs ---


def check_cann() -> Iterator[Finding]:
    found = cann.find()
    if found is None:
        yield Finding("CANN", OK, "not found, so no NPU can be used and the emulated device may run")
        return
    if os.environ.get(envs.EMULATOR.name) == "1":
        yield Finding(
            "CANN", PROBLEM, f"{found}, and {envs.EMULATOR.name}=1 asks for the emulated device, which refuses beside CANN",
            f"unset {envs.EMULATOR.name}, or hide CANN (unset its variables and LD_LIBRARY_PATH)",
        )  # fmt: skip
    else:
        yield Finding("CANN", OK, found)
    yield from check_hccl_library()
    yield from check_npu_devices()


def check_hccl_library() -> Iterator[Finding]:
    """Whether HCCL's library loads by its name, which is how torch_npu loads it."""
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


def check_npu_devices(folder: Path = DEVICE_FOLDER) -> Iterator[Finding]:
    names = (path.name.removeprefix("davinci") for path in folder.glob("davinci[0-9]*"))
    numbers = sorted(int(name) for name in names if name.isascii() and name.isdecimal())
    if not numbers:
        yield Finding(
            "NPU devices", WARNING, f"CANN is installed, and there is no {folder}/davinci*: no NPU, or no access to one",
            "in a container, pass --device /dev/davinci0 (one for each NPU), /dev/davinci_manager, /dev/devmm_svm and "
            "/dev/hisi_hdc",
        )  # fmt: skip
    else:
        yield Finding("NPU devices", OK, f"{len(numbers)}: {', '.join(map(str, numbers))}")


def check_drivers() -> Iterator[Finding]:
    for tool, arguments, hardware in (("npu-smi", ["info"], "NPU"), ("nvidia-smi", ["-L"], "NVIDIA GPU")):
        path = shutil.which(tool)
        if path is None:
            yield Finding(tool, OK, f"not installed, so no {hardware} can be seen")
            continue
        tried = probe([path, *arguments], TOOL_SECONDS)
        if tried.fault:
            yield Finding(tool, WARNING, f"{path} fails: {tried.fault}", f"check the driver of the {hardware}")
        else:
            yield Finding(tool, OK, (tried.output.splitlines() or [path])[0])


# --- shared memory ---


def check_shared_memory(folder: Path = shared_memory.FOLDER) -> Iterator[Finding]:
    if not hasattr(os, "statvfs") or (sys.platform != "linux" and not folder.is_dir()):
        yield Finding(str(folder), OK, f"{sys.platform} has no such folder: ranks of one host use sockets")
        return
    try:
        room = os.statvfs(folder)
    except OSError as error:
        yield Finding(str(folder), PROBLEM, f"cannot be used: {error}", f"mount a tmpfs on {folder}")
        return
    total, free = room.f_frsize * room.f_blocks, room.f_frsize * room.f_bavail
    size = f"{free / (1 << 20):,.0f} of {total / (1 << 20):,.0f} MiB free"
    if free < SMALL_SHARED_MEMORY:
        yield Finding(
            str(folder), WARNING, f"{size}: too little for vLLM's processes and the emulated HCCL",
            "remove old files there, or start the container with --shm-size=2g",
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
    """A list of cores as the kernel and vLLM write it: '0-2,8' -> {0, 1, 2, 8}. Raises ValueError."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    return cores


def granted_cores(folder: Path = CONTROL_GROUPS) -> float | None:
    """Processor time that the control group (a container) grants, in cores; None: no limit."""
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
    """Numbers of the cores that this process may use. macOS and Windows have no such list: there, all cores."""
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
            f"{shown}; OMP_NUM_THREADS is unset, so each process uses all: for several ranks, set it to cores / ranks",
        )
    elif not re.fullmatch(r"[1-9][0-9]*(,[1-9][0-9]*)*", threads):
        yield Finding(
            "cores", PROBLEM, f"OMP_NUM_THREADS={threads!r} is not a number", "set it to a whole number, or unset it"
        )
    elif int(threads.partition(",")[0]) > usable:
        yield Finding(
            "cores", WARNING, f"OMP_NUM_THREADS={threads} is more than the {shown} cores of this process",
            f"set it to {usable} divided by the number of ranks",
        )  # fmt: skip
    else:
        yield Finding("cores", OK, f"{shown}, OMP_NUM_THREADS={threads}")


def check_numa(nodes: Path = NUMA_NODES) -> Iterator[Finding]:
    """The NUMA nodes that this process may run on, and the cores that vLLM binds ranks to."""
    allowed = allowed_cores()
    cores_of_nodes = {}
    for path in nodes.glob("node[0-9]*/cpulist"):
        try:
            text = path.read_text().strip()
        except OSError:
            continue  # the kernel has removed the node since glob listed it
        cores = parse_cores(text) if text else set()
        if cores & allowed:
            cores_of_nodes[int(path.parent.name.removeprefix("node"))] = len(cores & allowed)
    if cores_of_nodes:
        listed = ", ".join(f"node {node}: {count} cores" for node, count in sorted(cores_of_nodes.items()))
        yield Finding("NUMA", OK, f"{len(cores_of_nodes)} nodes, {listed}" if len(cores_of_nodes) > 1 else listed)
    binding = os.environ.get(envs.CPU_OMP_THREADS_BIND, "auto")
    if binding in ("auto", "nobind"):
        return
    try:
        ranks = [parse_cores(part) for part in binding.split("|")]
    except ValueError:
        yield Finding(
            envs.CPU_OMP_THREADS_BIND, PROBLEM, f"is {binding!r}, which is no list of cores for each rank",
            "set it to one list for each rank, such as 0-31|32-63, or to auto, or to nobind",
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
