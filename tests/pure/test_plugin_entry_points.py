"""Two platform plugins of which vLLM takes one: what is said, and that it is what to set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ASCEND_GENERAL = ("ascend_kv_connector", "ascend_model", "ascend_model_loader", "ascend_service_profiling")


@pytest.fixture
def installed(tmp_path: Path):
    """installed(torch_npu=...): a folder in which vllm-ascend is, as far as importlib.metadata and find_spec can tell."""

    def make(*, torch_npu: bool) -> Path:
        dist_info = tmp_path / "vllm_ascend-0.23.0.dist-info"
        dist_info.mkdir()
        (dist_info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-ascend\nVersion: 0.23.0\n")
        general = "".join(f"{name} = vllm_ascend:{name}\n" for name in ASCEND_GENERAL)
        (dist_info / "entry_points.txt").write_text(
            f"[vllm.platform_plugins]\nascend = vllm_ascend:register\n\n[vllm.general_plugins]\n{general}"
        )
        if torch_npu:
            (tmp_path / "torch_npu").mkdir()
            (tmp_path / "torch_npu" / "__init__.py").write_text("raise ImportError('looked at, not imported')\n")
        return tmp_path

    return make


def ask(folder: Path, plugins: str | None) -> tuple[str, bool]:
    """(what is wrong, whether the platform of Ascend is meant), in a process that finds the folder's plugins."""
    script = (
        "from vllm_npu.plugin import entry_points, register_platform\n"
        "print(entry_points.conflict() or '')\n"
        "print(entry_points.vllm_ascend_is_installed() and register_platform())\n"
        "import sys; assert not {'torch', 'torch_npu', 'vllm'} & set(sys.modules), sorted(sys.modules)\n"
    )
    environment = {name: text for name, text in os.environ.items() if name != "VLLM_PLUGINS"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    if plugins is not None:
        environment["VLLM_PLUGINS"] = plugins
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    said, platform = done.stdout.split("\n")[:2]
    return said, platform == "vllm_npu.plugin.ascend.platform.AscendMoEPlatform"


def test_both_platforms_at_once_are_refused_with_the_line_to_export(installed):
    folder = installed(torch_npu=True)
    said, _ = ask(folder, None)
    ours, theirs = (part.partition("export VLLM_PLUGINS=")[2].split(",") for part in said.split("; "))
    assert {"vllm_npu", *ASCEND_GENERAL} <= set(ours)
    assert "ascend" not in ours
    assert {"ascend", *ASCEND_GENERAL} <= set(theirs)
    assert "vllm_npu" not in theirs
    assert ask(folder, "ascend,vllm_npu")[0] == said
    # What it says, done:
    assert ask(folder, ",".join(ours)) == ("", True)
    assert ask(folder, ",".join(theirs))[0] == ""


def test_without_torch_npu_vllm_ascend_cannot_run_and_is_no_base(installed):
    assert ask(installed(torch_npu=False), "vllm_npu") == ("", False)
