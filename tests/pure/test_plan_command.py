"""`vllm-npu plan` as it is typed."""

import json
from pathlib import Path

import pytest

from tests.command_line import vllm_npu
from vllm_npu.cli import plan as command
from vllm_npu.errors import VllmNpuError

LAYER = {"soc": "A3", "ep": 2, "experts": 128, "topk": 8, "hidden": 2048}
A3_CASE = ["--soc", "A3", "--ep", "2", "--experts", "128", "--topk", "8", "--hidden", "2048", "--tokens", "512"]


def test_the_published_case_asks_for_its_buffer(tmp_path):
    report = tmp_path / "plan.json"
    done = vllm_npu("plan", *A3_CASE, "--json", str(report), HCCL_BUFFSIZE="")  # as if it were not set
    assert done.returncode == 0, done.stderr
    assert "set HCCL_BUFFSIZE=608 (MiB) on all ranks before the start" in done.stdout
    planned = json.loads(report.read_text())
    assert [each["strategy"] for each in planned["auto"]] == ["mc2"]
    assert planned["buffers"][0]["needed_mb"] == 608


def test_a_model_gives_what_is_not_typed_and_a_buffer_that_is_set_is_enough(tmp_path):
    config = {
        "text_config": {"n_routed_experts": 256, "num_experts_per_tok": 8, "hidden_size": 7168, "dtype": "float32"}
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ["plan", "--soc", "A2", "--ep", "16", "--tokens", "256", "--model", str(tmp_path)]
    done = vllm_npu(*options, HCCL_BUFFSIZE="900", COLUMNS="200")
    assert "no: mc2 on A2, full mesh takes bfloat16 and float16, hidden_states are float32; use all2all" in done.stdout
    done = vllm_npu(*options, "--dtype", "bfloat16", HCCL_BUFFSIZE="900")
    assert done.returncode == 0, done.stderr
    assert "HCCL_BUFFSIZE=" not in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"soc": "H100", "ep": 2}, "there is no --soc H100; name one of A2, A3, 310P, A5"),
        ({"soc": "A3", "ep": 2}, "--experts, --topk, --hidden not given, nor in --model's config.json"),
        (LAYER | {"tp": 4}, "--ep 2 is not a multiple of --tp 4"),
        (LAYER | {"ep": 3, "soc": "A3"}, "128 experts do not divide over ep_size=3"),
        (LAYER | {"ep": 256}, "128 experts do not divide over ep_size=256"),
        (LAYER | {"topk": 200}, "a token chooses 200 experts of 128"),
        (LAYER | {"dtype": "int8"}, "unknown --dtype 'int8'"),
        ({"soc": "A3", "ep": 2, "model": Path("nowhere")}, "--model nowhere cannot be read as a config.json"),
        (LAYER | {"additional_config": "{"}, "--additional-config { is no JSON"),
        (LAYER | {"additional_config": "[]"}, r"--additional-config \[\] is no JSON object"),
    ],
)
def test_numbers_that_cannot_be_are_refused(options, message):
    with pytest.raises(VllmNpuError, match=message):
        command.plan(**options)
