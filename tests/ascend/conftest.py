"""Tests beside vllm-ascend. They start processes of their own, because vllm-ascend, torch_npu and the emulated device change
the process that imports them."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest

from vllm_npu.emulator.pytest_plugin import missing


def what_is_missing() -> str | None:
    """Return the names of what these tests need and this environment lacks, or None if it lacks nothing."""
    absent = [package for package in ("vllm_ascend", "torch_npu") if find_spec(package) is None]
    return f"{' and '.join(absent)} (scripts/test.sh --ascend has them)" if absent else missing()


MISSING = what_is_missing()


class ModuleThatCannotRun(pytest.Module):
    """A test module that is skipped as a whole, because something is missing."""

    def collect(self) -> Iterable[pytest.Item]:
        pytest.skip(f"needs vllm-ascend on the emulated Ascend device: {MISSING}", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return None if MISSING is None else ModuleThatCannotRun.from_parent(parent, path=module_path)
