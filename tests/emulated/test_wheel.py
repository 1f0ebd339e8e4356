"""A wheel that brings the libraries of the emulated device runs where nothing can be built."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.time_limits import PATIENCE_SECONDS
from vllm_npu import envs

pytestmark = pytest.mark.emulated

ROOT = Path(__file__).resolve().parents[2]
FIRST_TENSOR = """
import torch
import vllm_npu
from vllm_npu.emulator.build import library_folder
from vllm_npu.transport.hccl_direct.build import built_library
print(torch.ones(2, device="npu").sum().item(), vllm_npu.__file__, library_folder(), built_library(), sep="\\n")
"""


def pip(*arguments: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments, "-q", "--no-deps", "--disable-pip-version-check"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_wheel_with_libraries_needs_no_compiler_and_builds_nothing(tmp_path):
    source, wheels, installed, home = (tmp_path / name for name in ("source", "wheels", "installed", "home"))
    # setuptools writes beside what it builds
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", "tests", "docs", "__pycache__", "*.egg-info"))
    pip("wheel", "--no-build-isolation", "-w", str(wheels), str(source), VLLM_NPU_WHEEL_WITH_LIBRARIES="1")
    [wheel] = wheels.iterdir()
    assert wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl")
    pip("install", "--target", str(installed), str(wheel))
    assert (installed / "zz_vllm_npu_emulator.pth").read_text().startswith("import vllm_npu.emulator.startup")
    first = subprocess.run(
        [sys.executable, "-c", FIRST_TENSOR],
        env={
            **{name: value for name, value in os.environ.items() if name != envs.EMULATOR_LIBRARIES.name},
            "PYTHONPATH": str(installed),
            "VLLM_NPU_ENV_HOME": str(home),
            "PATH": "",
            envs.EMULATOR.name: "1",
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert first.returncode == 0, first.stderr
    total, *files = first.stdout.splitlines()[-4:]  # torch_npu prints a warning before
    assert total == "2.0"
    assert len(files) == 3
    assert all(Path(file).is_relative_to(installed) for file in files)
    assert not home.exists()
