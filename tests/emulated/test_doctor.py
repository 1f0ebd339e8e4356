"""`vllm-npu doctor` in an environment with the real torch_npu."""

import json
import os
import subprocess
import sys

import pytest

from vllm_npu.emulator import build

pytestmark = pytest.mark.emulated


def run_doctor(folder, **environment):
    kept = {name: text for name, text in os.environ.items() if not name.startswith("VLLM_NPU_")}
    written = folder / "findings.json"
    subprocess.run(
        [sys.executable, "-m", "vllm_npu.cli", "doctor", "--json", str(written)],
        env={**kept, **environment}, stdout=subprocess.DEVNULL, timeout=300, check=False,
    )  # fmt: skip
    findings = json.loads(written.read_text())["findings"]
    return {finding["check"]: finding for finding in findings}


def test_the_emulated_device_is_found(tmp_path):
    findings = run_doctor(tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert findings["import torch"]["status"] == "ok"
    assert findings["import torch_npu"]["what"] == "on the emulated device, 16 devices"
    assert findings["emulated device"]["what"].startswith("built, in ")
    assert findings["tokens on HCCL"]["what"].startswith("built, in ")


def test_the_real_torch_npu_without_cann_and_without_the_hook(tmp_path):
    findings = run_doctor(tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="1")  # as it is where the hook is not installed
    assert findings["import torch"]["status"] == "problem"
    assert "torch loads torch_npu by itself, which fails without CANN" in findings["import torch"]["what"]
    assert "-m vllm_npu.emulator hook > " in findings["import torch"]["remedy"]


def test_what_building_lacks_is_named(tmp_path):
    findings = run_doctor(
        tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0", VLLM_NPU_ENV_HOME=str(tmp_path), PATH=str(tmp_path), CXX=""
    )
    assert findings["emulated device"]["status"] == "warning"
    assert "needs a C++ compiler" in findings["emulated device"]["what"]
    assert "needs a C++ compiler" in findings["tokens on HCCL"]["what"]
    assert "install one" in findings["emulated device"]["remedy"]


def test_a_cann_whose_libraries_load_is_described(tmp_path):
    """The emulated libraries on LD_LIBRARY_PATH pass for CANN, as they do for whatever does not know them."""
    folder = build.library_folder()
    findings = run_doctor(tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0", LD_LIBRARY_PATH=str(folder))
    assert findings["CANN"]["what"] == str(folder / "libascendcl.so")
    assert findings["libhccl"] == {"check": "libhccl", "status": "ok", "what": str(folder / "libhccl.so"), "remedy": ""}
    assert findings["NPU devices"]["status"] == "warning"
    assert findings["import torch_npu"]["what"].startswith("on CANN, ")
    assert findings["CANN version"]["what"] == "8.5.0"
