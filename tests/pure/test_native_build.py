"""Building the C++ parts on a system that lacks what the build needs."""

import pytest

from vllm_npu import native_build
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
