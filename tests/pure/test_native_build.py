"""Building the C++ parts on a system that lacks what the build needs."""

import os
import subprocess
import sys

import pytest

from vllm_npu import envs, native_build
from vllm_npu.errors import NativeBuildError
from vllm_npu.native_build import Component


def test_a_system_without_file_locks_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    """Windows has no fcntl."""
    monkeypatch.setattr(native_build, "fcntl", None)
    monkeypatch.setenv("VLLM_NPU_ENV_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Component, "cache_key", lambda self: "key")  # it needs torch_npu
    with pytest.raises(NativeBuildError, match="building the ops needs file locks, which Python has not on"):
        Component("ops", "the ops", "libops.so").build()
    assert not (tmp_path / "home").exists()


OTHER_PAIR = "needs torch and torch_npu 2.13 of both or 2.10 of both, and finds torch {} and torch_npu {}"


@pytest.mark.parametrize(
    ("torch", "torch_npu", "cuda", "reason"),
    [
        ("2.14.0", "2.14.0", None, OTHER_PAIR),
        ("2.13.0+cpu", "2.10.0.post4", None, OTHER_PAIR),
        ("2.13.0", "2.13.0", "13.0", "torch {} is the build for CUDA 13.0, beside which torch_npu does not load"),
    ],
)
def test_versions_that_are_no_supported_pair_are_refused_before_a_build(tmp_path, torch, torch_npu, cuda, reason):
    for name, version in (("torch", torch), ("torch_npu", torch_npu)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "version.py").write_text(f"cuda = {cuda!r}\n")
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "VLLM_NPU_ENV_HOME": str(tmp_path / "home")}
    environment.pop(envs.EMULATOR_LIBRARIES.name, None)
    refused = subprocess.run(
        [sys.executable, "-m", "vllm_npu.emulator", "build"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert refused.returncode == 2
    assert reason.format(torch, torch_npu) in refused.stderr
    assert not (tmp_path / "home").exists()
