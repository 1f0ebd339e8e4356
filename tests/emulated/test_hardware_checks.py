"""The checks for the first hour on hardware run on the emulated device."""

import subprocess
from pathlib import Path

import pytest
import torch

from vllm_npu.core.limits import MoELayer
from vllm_npu.tools import hardware_checks

SCRIPT = Path(__file__).parents[2] / "scripts" / "on_hardware.sh"


def test_the_smallest_buffer_is_the_formulas_where_the_device_has_that_formula(monkeypatch):
    layer = MoELayer(num_experts=8, top_k=4, hidden_size=1024, dtype=torch.bfloat16)
    monkeypatch.setattr(hardware_checks, "BUFFER_LAYERS", ((layer, 64),))
    [row] = hardware_checks.buffers(2)
    assert row["formula_mb"] == row["smallest_mb"] > 1
    [(size, error)] = row["errors"].items()
    assert size == row["smallest_mb"] - 1
    assert "HCCL_BUFFSIZE" in error


def test_the_error_of_sums_is_that_of_their_dtype():
    rows = list(hardware_checks.sums())
    assert len(rows) == 6
    for row in rows:
        unit = torch.finfo(getattr(torch, row["dtype"].removeprefix("torch."))).eps
        assert 0 < row["rms_error"] < 2 * unit
        assert row["us_eager"] > 0
    kept = {row["op"]: row["rms_error"] for row in rows if row["dtype"] == "torch.float16"}
    assert kept["npu_moe_token_unpermute, float32 weights"] < kept["npu_moe_finalize_routing"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--ranks", "1"], "--ranks 1: give 2 or more"),
        (["--ranks", "two"], "--ranks two: give 2 or more"),
        (["--fast"], "takes --ranks N, --out FOLDER and --emulated; got: --fast"),
        (["--out", str(SCRIPT.parent)], "is not empty; name another folder"),
    ],
)
def test_the_script_refuses_what_it_does_not_know(options, says):
    process = subprocess.run([str(SCRIPT), *options], capture_output=True, text=True, timeout=60, check=False)
    assert process.returncode == 2
    assert says in process.stderr
