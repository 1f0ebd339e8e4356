"""Settings of vllm-ascend that our strategies cannot serve are refused while vLLM builds its configuration."""

import json
import os
import subprocess
import sys

import pytest

from tests.ascend.layer_program import write_config
from tests.ascend.test_layer import LINE
from vllm_npu.plugin import entry_points

BUILD = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
load_general_plugins()
given = {"enforce_eager": True, "enable_expert_parallel": True, "dtype": "bfloat16", **json.loads(sys.argv[1])}
config = EngineArgs(tensor_parallel_size=2, skip_tokenizer_init=True, **given).create_engine_config()
print(config.parallel_config.worker_cls)
print("BUILT")
"""
BUILD_WITHOUT_A_MODEL = """
from vllm.config import VllmConfig
from vllm.plugins import load_general_plugins
load_general_plugins()
VllmConfig()
print("BUILT")
"""
BUILD_FOR_CPUS = """
import sys
from vllm.config import DeviceConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
load_general_plugins()
model = EngineArgs(model=sys.argv[1], skip_tokenizer_init=True, dtype="bfloat16").create_model_config()
VllmConfig(model_config=model, device_config=DeviceConfig("cpu"))
print("BUILT")
"""
OFF = {"vllm_npu": {"moe_comm": "off"}}
ON_A3 = {"VLLM_NPU_EMULATOR_SOC": "A3"}
ON_310P = {"VLLM_NPU_EMULATOR_SOC": "310P"}
OTHER_WORKER = {"worker_cls": "other.package.Worker"}
GRAPHS = {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}}


def asks_for(moe_comm: str) -> dict:
    return {"additional_config": {"vllm_npu": {"moe_comm": moe_comm}}}


def build(folder, environment: dict | None = None, **arguments) -> subprocess.CompletedProcess[str]:
    """Build a configuration in a process of its own, as an engine does before it starts workers."""
    write_config(folder, hidden=1024, experts=8, top_k=2)
    plugins = entry_points.without("ascend").partition("=")[2]
    variables = os.environ | {"VLLM_NPU_EMULATOR": "1", "VLLM_PLUGINS": plugins, "HCCL_BUFFSIZE": "1000"}
    variables |= environment or {}
    return run_python(variables, BUILD, json.dumps({"model": str(folder)} | arguments))


def run_python(variables: dict, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("program", [BUILD_WITHOUT_A_MODEL, BUILD_FOR_CPUS], ids=["no model", "other device"])
def test_a_configuration_that_is_no_engine_on_npus_is_vllm_ascends_alone(tmp_path, program: str) -> None:
    write_config(tmp_path, hidden=1024, experts=8, top_k=2)
    plugins = entry_points.without("ascend").partition("=")[2]
    done = run_python(os.environ | {"VLLM_NPU_EMULATOR": "1", "VLLM_PLUGINS": plugins}, program, str(tmp_path))
    assert done.stdout.endswith("BUILT\n"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"enable_lora": True, "data_parallel_size": 2}, "LoRA adapters on experts with data parallelism"),
        ({"enable_lora": True, **GRAPHS}, "LoRA adapters on experts in graphs"),
        (
            {
                "environment": {"DYNAMIC_EPLB": "true"},
                "additional_config": {"eplb_config": {"dynamic_eplb": True, "eplb_policy_type": 0}},
            },
            "eplb_policy_type 0, which exchanges experts of ranks 1 and 3, on fewer ranks",
        ),
        ({"hf_overrides": {"zero_expert_num": 4}}, "zero experts (zero_expert_num)"),
        ({"additional_config": {"mix_placement": True}}, "mix_placement with quantization=None"),
        ({**GRAPHS, **asks_for("compare")}, "moe_comm=compare in graphs"),
        ({"environment": {"VLLM_USE_V2_MODEL_RUNNER": "1"}}, "model runner V2 (VLLM_USE_V2_MODEL_RUNNER)"),
    ],
    ids=str,
)
def test_a_setting_that_was_never_run_is_refused_before_a_process_starts(tmp_path, arguments, reason):
    done = build(tmp_path, **arguments)
    assert "BUILT" not in done.stdout
    assert "vllm_npu cannot replace vllm-ascend's MoE communication with: " in done.stderr, done.stderr[-2000:]
    assert reason in done.stderr


@pytest.mark.parametrize("content", ["no JSON", "{}", '{"layer_list": []}'])
def test_an_expert_map_without_a_placement_is_refused_before_a_process_starts(tmp_path, content):
    expert_map = tmp_path / "map.json"
    expert_map.write_text(content)
    done = build(tmp_path, additional_config={"eplb_config": {"expert_map_path": str(expert_map)}})
    assert "BUILT" not in done.stdout
    assert f"expert_map_path: {expert_map} has no layer_list[0].device_list[...].device_expert" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"environment": ON_A3, "additional_config": {"enable_fused_mc2": 1, "vllm_npu": {"moe_comm": "fused_mc2"}}},
        {"environment": ON_A3, "additional_config": {"enable_fused_mc2": 2}},
        {"enable_dbo": True, "data_parallel_size": 2},  # vllm-ascend turns it off; vLLM refuses it if on
        {"enable_lora": True},
        {"enable_lora": True, "data_parallel_size": 2, "additional_config": OFF},
        {"enable_lora": True, "data_parallel_size": 2, "lora_target_modules": ["q_proj", "o_proj"]},
        {**GRAPHS, **asks_for("auto")},
        {**GRAPHS, **asks_for("all2all")},
        {"additional_config": {"enable_mc2_hierarchy_comm": True}},  # auto takes no mc2 on two ranks
        {"additional_config": {"combine_quant_mode": 2, **OFF}},
    ],
    ids=[
        "none",
        "fused_mc2",
        "fused_mc2 by 2",
        "dual batch overlap",
        "adapters",
        "off",
        "adapters beside experts",
        "graphs",
        "all2all in graphs",
        "hierarchy",
        "a form of rows with off",
    ],
)
def test_an_engine_without_such_settings_is_built_and_vllm_ascends_own_with_them(tmp_path, arguments):
    done = build(tmp_path, **arguments)
    assert "BUILT" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("environment", "arguments", "reason"),
    [
        (ON_310P, {"dtype": "float16"}, "vllm-ascend has no expert parallelism there"),
        ({}, OTHER_WORKER, "replaces only vllm_ascend.worker.worker.NPUWorker, and this engine has worker_cls=other"),
    ],
    ids=["310P", "other worker"],
)
def test_another_worker_is_refused_where_tokens_travel_and_stays_where_none_does(
    tmp_path, environment, arguments, reason
):
    refused = build(tmp_path, environment, **arguments)
    assert "BUILT" not in refused.stdout
    assert reason in refused.stderr, refused.stderr[-2000:]
    done = build(tmp_path, environment, **arguments, enable_expert_parallel=False)
    theirs = arguments.get("worker_cls", "vllm_ascend._310p.worker_310p.NPUWorker310")
    assert done.stdout.endswith(f"{theirs}\nBUILT\n"), done.stderr[-2000:]


def test_more_experts_for_a_token_than_there_are_are_refused_before_a_process_starts(tmp_path):
    done = build(tmp_path, hf_overrides={"num_experts_per_tok": 9})
    assert "BUILT" not in done.stdout
    assert "a token chooses 9 experts of 8; correct config.json" in done.stderr, done.stderr[-2000:]


def test_the_hierarchy_is_refused_for_mc2_on_fewer_ranks_than_it_takes(tmp_path):
    options = {"enable_mc2_hierarchy_comm": True, **asks_for("mc2")["additional_config"]}
    done = build(tmp_path, ON_A3, additional_config=options)
    assert "BUILT" not in done.stdout
    assert "mc2 on A3, hierarchy takes ep_size 16 to 256 in steps of 16, not 2; use all2all" in done.stderr


@pytest.mark.skipif(LINE == "0.23", reason="vllm-ascend 0.23 has no such options, and ignores them")
@pytest.mark.parametrize(
    ("environment", "options", "reason"),
    [
        ({}, {"combine_quant_mode": 2}, "combine_quant_mode: mc2 on A2, full mesh takes 0, not 2"),
        (ON_A3, {"combine_quant_mode": 4}, "combine_quant_mode: mc2 on A3, full mesh takes 0 or 2, not 4"),
        (
            ON_A3,
            {"combine_quant_mode": 2, "mc2_comm_alg": "hierarchy"},
            "combine_quant_mode: mc2 on A3, hierarchy takes 0, not 2",
        ),
    ],
    ids=["A2", "A5's numbers", "hierarchy"],
)
def test_a_form_of_rows_that_the_chips_combine_does_not_take_is_refused(tmp_path, environment, options, reason):
    done = build(tmp_path, environment, additional_config=options)
    assert "BUILT" not in done.stdout
    assert f"additional_config {reason}" in done.stderr, done.stderr[-2000:]


@pytest.mark.skipif(LINE == "0.23", reason="vllm-ascend 0.23 does not know MegaMoe")
def test_the_value_2_is_refused_where_it_means_mega_moe(tmp_path):
    (tmp_path / "cann_ops_transformer.py").touch()  # vllm-ascend looks for the package alone
    environment = {**ON_A3, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    done = build(tmp_path, environment, additional_config={"enable_fused_mc2": 2})
    assert "BUILT" not in done.stdout
    assert "enable_fused_mc2: 2 with CANN's MegaMoe" in done.stderr, done.stderr[-2000:]


@pytest.mark.skipif(LINE != "0.23", reason="vllm-ascend 0.30 refuses it itself")
def test_an_unknown_value_of_enable_fused_mc2_is_refused(tmp_path):
    done = build(tmp_path, additional_config={"enable_fused_mc2": 3})
    assert "BUILT" not in done.stdout
    assert "additional_config enable_fused_mc2, which is none of (0, 1, 2)" in done.stderr, done.stderr[-2000:]


@pytest.mark.skipif(LINE != "0.23", reason="vllm-ascend 0.30 runs the operators of 1 for 2")
def test_the_value_2_is_refused_for_fused_mc2_without_int8_weights(tmp_path):
    options = {"enable_fused_mc2": 2, **asks_for("fused_mc2")["additional_config"]}
    done = build(tmp_path, ON_A3, additional_config=options)
    assert "BUILT" not in done.stdout
    assert "dispatch_gmm_combine_decode takes no layers of quantisation none; use mc2" in done.stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "enable_fused_mc2"),
        (
            {"enable_fused_mc2": 1, "mega_moe_max_tokens": 10},
            "set vllm-ascend's --additional-config '{\"mega_moe_max_tokens\": ",
        ),
    ],
    ids=["no weights", "no room"],
)
def test_a_fused_mc2_that_never_fits_is_refused_with_what_to_set(tmp_path, options, reason):
    done = build(tmp_path, ON_A3, additional_config=options | asks_for("fused_mc2")["additional_config"])
    assert "BUILT" not in done.stdout
    assert reason in done.stderr, done.stderr[-2000:]
