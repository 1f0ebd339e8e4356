"""`vllm-npu bench eplb` prints and writes a row for each communicator of the device, and draws a chart."""

import json
from importlib.util import find_spec

import pytest

from tests.command_line import refusal, vllm_npu


def test_every_communicator_of_cpus_is_timed(tmp_path):
    report, chart = tmp_path / "report.json", tmp_path / "chart.png"
    sizes = ["--scale", "64", "--experts", "3", "--rounds", "2"]
    done = vllm_npu("bench", "eplb", *sizes, "--json", str(report), "--plot", str(chart))
    assert done.returncode == 0, done.stderr
    assert chart.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(report.read_text())
    timed = [row for row in rows if "name" in row]
    balanced = [row for row in rows if "before" in row]
    with_vllm = find_spec("vllm") is not None
    assert [row["name"] for row in timed] == ["torch_dist", "gloo_staged"] + ["vLLM torch_nccl"] * with_vllm
    assert bool(balanced) is with_vllm
    assert all(1 <= row["after"] < row["before"] for row in balanced)
    for row in timed:
        assert row["name"] in done.stdout
        assert row["mib_per_rank"] == round(3 * 2 * 3 * 112 * 32 / 2**20, 2)
        assert 0 < row["ms_min"] <= row["ms_median"] <= row["ms_max"]
        assert row["gb_per_second"] == pytest.approx(3 * 2 * 3 * 112 * 32 / row["ms_median"] / 1e6)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--scale", "3"], "--scale 3 does not divide 7168 and 2048"),
        (["--dtype", "int3"], "unknown dtype 'int3'"),
        (["--transport", "threaded"], "unknown transport 'threaded'; there are: gloo"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, text):
    assert text in refusal("bench", "eplb", *arguments)
