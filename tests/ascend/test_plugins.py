"""Both platform plugins are installed. vLLM and doctor report the conflict, and the remedy that they name works."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

LOAD = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.platforms import current_platform
print("PLATFORM", type(current_platform).__module__, current_platform.device_type)
"""


def run(arguments: list[str], plugins: str | None, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: text for name, text in os.environ.items() if name != "VLLM_PLUGINS"} | environment
    variables |= {"VLLM_NPU_EMULATOR": "1"} | ({} if plugins is None else {"VLLM_PLUGINS": plugins})
    return subprocess.run(
        [sys.executable, *arguments], env=variables, capture_output=True, text=True, timeout=180, check=False
    )


def doctor(folder: Path, plugins: str | None) -> dict[str, Any]:
    report = folder / "doctor.json"
    run(["-m", "vllm_npu.cli", "doctor", "--json", str(report)], plugins)
    [finding] = [each for each in json.loads(report.read_text())["findings"] if each["check"] == "plugins"]
    return finding


@pytest.fixture(scope="module")
def refusal() -> str:
    """Return the error with which vLLM ends if VLLM_PLUGINS is not set."""
    process = run(["-c", LOAD], None)
    assert process.returncode != 0
    assert "PLATFORM" not in process.stdout
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("vllm_npu.errors.PluginConflictError: ")
    return last


def test_what_vllm_says_is_what_to_set(refusal):
    ours, theirs = (part.partition("export VLLM_PLUGINS=")[2] for part in refusal.split("; "))
    for plugins, module in ((ours, "vllm_npu.plugin.ascend.platform"), (theirs, "vllm_ascend.platform")):
        process = run(["-c", LOAD], plugins)
        assert process.returncode == 0, process.stderr
        assert f"PLATFORM {module} npu" in process.stdout


def test_doctor_says_the_same(refusal, tmp_path):
    finding = doctor(tmp_path, None)
    assert finding["status"] == "problem"
    assert finding["remedy"] in refusal
    ours = refusal.partition("export VLLM_PLUGINS=")[2].partition(";")[0]
    assert doctor(tmp_path, ours)["status"] == "ok"
    assert (
        f"vllm_npu on vllm-ascend {version('vllm-ascend')}; supported: vLLM 0.23 with" in doctor(tmp_path, ours)["what"]
    )
    lacking = doctor(tmp_path, "vllm_npu,ascend_model")
    assert lacking["status"] == "warning"
    assert "ascend_kv_connector, ascend_model_loader, ascend_service_profiling" in lacking["what"]
    assert lacking["remedy"] == f"export VLLM_PLUGINS={ours}"


def test_our_ops_stay_out_of_the_way_of_vllm_ascends():
    script = LOAD + (
        "import vllm_ascend.ops.register_custom_ops as theirs, torch\n"
        "from vllm.model_executor.custom_op import op_registry_oot\n"
        "print('OPS', torch.ops.vllm.maybe_pad_and_reduce.default is not None, sorted(op_registry_oot))\n"
    )
    process = run(["-c", script], "vllm_npu,ascend_model")
    assert process.returncode == 0, process.stderr
    assert "OPS True []" in process.stdout
