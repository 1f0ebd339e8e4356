"""Recipes of `vllm serve`, made small for emulated NPUs: what is kept, replaced, left out and refused."""

import json
from dataclasses import replace

import pytest
import torch

from vllm_npu.core.ascend_recipes import fused_mc2_asked
from vllm_npu.core.limits import DEVICES, MoELayer, QuantMode
from vllm_npu.errors import InvalidInputError
from vllm_npu.tools.demo.recipe_demo import RecipeRow, planned_recipes
from vllm_npu.tools.demo.recipes import SmallRecipe, make_small
from vllm_npu.tools.serve_script import read_script, scripts_below

SCRIPT = """
nic_name="xxxx"  # it's the interface
export HCCL_IF_IP=$local_ip HCCL_BUFFSIZE=1024 LD_PRELOAD=/lib/x.so:$LD_PRELOAD
export HCCL_OP_EXPANSION_MODE="AIV"
vllm serve /weights/DeepSeek-V3.1-w8a8 \\
  --host 0.0.0.0 --port=8004 --headless \\
  --data_parallel_size $3 -tp 16 --data-parallel-size-local 2 \\
  --quantization ascend --enable-expert-parallel --async-scheduling --block-size 128 \\
  --max-model-len 16384 --hf-overrides '{"a": 1}' \\
  --speculative-config '{"num_speculative_tokens": 3,
      "method": "deepseek_mtp"}' \\
  --compilation-config '{"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [64, 128]}' \\
  --additional-config '{"multistream_overlap_shared_expert": true}'
"""

NODE = (
    '--kv-transfer-config \'{{"kv_connector": "{}", "kv_role": "{}", "kv_port": "30000", "kv_connector_extra_config":'
    ' {{"prefill": {{"dp_size": 2, "tp_size": 8}}, "decode": {{"dp_size": 32, "tp_size": 1}}, "c8": true}}}}\''
)


def node(role: str, **changes: str) -> str:
    """The script of a node that passes blocks on."""
    script = SCRIPT.replace("--headless", NODE.format("MooncakeConnectorV1", role))
    for name, value in changes.items():
        script = script.replace(f"-{name} 16", f"-{name} {value}")
    return script


def with_extra(value: str) -> tuple[str, str]:
    """The change that makes a prefill node with this kv_connector_extra_config of the script."""
    given = f'{{"kv_connector": "MooncakeConnectorV1", "kv_role": "kv_producer", "kv_connector_extra_config": {value}}}'
    return "--headless", f"--kv-transfer-config '{given}'"


def small(change: tuple[str, str] = ("", ""), name: str = "run.sh") -> SmallRecipe:
    return make_small(name, read_script(SCRIPT.replace(*change)))


def test_sizes_and_machines_are_replaced_and_the_other_options_stay():
    recipe = small()
    assert recipe.model.family == "deepseek-v3-w8a8-mtp"
    assert recipe.model.config["num_nextn_predict_layers"] == 1
    assert recipe.int8
    assert str(recipe.parallelism) == "TP2×DP2×EP+SP"
    assert recipe.graph_mode == "FULL_DECODE_ONLY"
    assert recipe.additional_config == {"multistream_overlap_shared_expert": True}
    assert recipe.variables == {"HCCL_BUFFSIZE": "1024", "HCCL_OP_EXPANSION_MODE": "AIV"}
    assert recipe.left_out == ("--headless", "--data-parallel-size-local", "--hf-overrides")
    kept, graphs = recipe.options[:-1], json.loads(recipe.options[-1])
    speculative = json.dumps({"num_speculative_tokens": 3, "method": "mtp"})
    assert kept == (
        *("--speculative-config", speculative, "--async-scheduling", "--block-size", "128", "--compilation-config"),
    )
    # A decode step has the token and three drafts of each sequence.
    assert graphs == {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [4, 8, 16, 32]}


@pytest.mark.parametrize(
    ("change", "family", "runs_as"),
    [
        (("--quantization ascend", ""), "deepseek-v3-mtp", "TP2×DP2×EP+SP FULL_DECODE_ONLY"),
        (("DeepSeek-V3.1-w8a8", "Qwen3-235B-A22B"), "qwen3-moe-w8a8", "TP2×DP2×EP+SP FULL_DECODE_ONLY"),
        (("--headless", "--enforce-eager"), "deepseek-v3-w8a8-mtp", "TP2×DP2×EP+SP eager"),
        (("-tp 16", "-tp 1"), "deepseek-v3-w8a8-mtp", "DP2×EP FULL_DECODE_ONLY"),
        (("--enable-expert-parallel", ""), "deepseek-v3-w8a8-mtp", "TP2×DP2 FULL_DECODE_ONLY"),
        (('"cudagraph_mode": "FULL_DECODE_ONLY", ', ""), "deepseek-v3-w8a8-mtp", "TP2×DP2×EP+SP vllm-ascend's default"),
    ],
)
def test_model_topology_and_graphs_follow_the_recipe(change, family, runs_as):
    assert str(small(change)) == f"{family} {runs_as}"


def test_a_family_may_have_a_model_in_w8a8_alone():
    script = SCRIPT.replace("DeepSeek-V3.1", "GLM-4.7")
    assert make_small("run.sh", read_script(script)).model.family == "glm4-moe-w8a8-mtp"
    with pytest.raises(InvalidInputError, match="no tiny model is of its family without --quantization"):
        make_small("run.sh", read_script(script.replace("--quantization ascend", "")))


def test_a_drafter_that_has_no_tiny_model_is_left_out():
    recipe = small(("deepseek_mtp", "eagle3"))
    assert recipe.left_out[-1] == "--speculative-config eagle3"
    assert "--speculative-config" not in recipe.options
    assert json.loads(recipe.options[-1])["cudagraph_capture_sizes"] == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("DeepSeek-V3.1", "DeepSeek-V3.2"), r"no tiny model is of its family \("),
        (("--headless", NODE.format("MultiConnector", "kv_producer")), "by MultiConnector as kv_producer"),
        (("--headless", NODE.format("MooncakeConnectorV1", "kv_both")), "by MooncakeConnectorV1 as kv_both"),
        (
            (
                "--headless",
                NODE.format("MooncakeConnector", "kv_producer").replace('{"dp_size": 2, "tp_size": 8}', "8"),
            ),
            "no JSON",
        ),
        (with_extra("8"), "kv_connector_extra_config 8 is no JSON object with the sizes of 'prefill'"),
        (with_extra('"a.json"'), "kv_connector_extra_config a.json is no JSON object"),
        (with_extra("null"), "kv_connector_extra_config None is no JSON object"),
        (
            ('"multistream_overlap_shared_expert": true', '"finegrained_tp_config": 8'),
            "finegrained_tp_config 8 is no JSON",
        ),
        (('"multistream_overlap_shared_expert": true', '"finegrained_tp_config": {"oproj": "8"}'), "of numbers"),
        (("'{\"multi", "'{multi"), "--additional-config {multi"),
        (("'{\"multistream_overlap_shared_expert\": true}'", "[]"), "is no JSON object"),
    ],
)
def test_a_recipe_that_cannot_be_made_small_says_why(change, reason):
    with pytest.raises(InvalidInputError, match=reason):
        small(change)


def test_markdown_gives_one_recipe_for_each_block_that_starts_vllm(tmp_path):
    block = f"   ```{{code-block}} bash\n{SCRIPT}   ```\n"
    (tmp_path / "Model.md").write_text(f"text\n{block}\n```python\nprint()\n```\n{block}")
    (tmp_path / "node.sh").write_text(SCRIPT)
    assert [name for name, _ in scripts_below(tmp_path)] == ["Model 1", "Model 2", "node.sh"]
    first, *others = planned_recipes(tmp_path, "")
    assert isinstance(first, SmallRecipe)
    assert [isinstance(row, RecipeRow) and row.not_run for row in others] == ["as Model 1", "as Model 1"]
    assert [each.name for each in planned_recipes(tmp_path, "NODE") if isinstance(each, SmallRecipe)] == ["node.sh"]


def test_a_recipe_with_the_fused_operator_for_decode_steps_gets_experts_that_it_takes(tmp_path):
    """Also its prefill node, which asks for the other operator."""

    def of_qwen(role: str, value: int) -> str:
        script = node(role).replace("DeepSeek-V3.1", "Qwen3-235B-A22B").replace("--speculative-config", "--load-format")
        return script.replace('"multistream_overlap_shared_expert": true', f'"enable_fused_mc2": {value}')

    scripts = [of_qwen("kv_producer", 1), of_qwen("kv_consumer", 2), of_qwen("kv_consumer", 1)]
    (tmp_path / "Model.md").write_text("\n".join(f"```\n{script}```\n" for script in scripts))
    _, wide, narrow = planned_recipes(tmp_path, "")
    for small, family in ((wide, "qwen3-moe-w8a8-wide"), (narrow, "qwen3-moe-w8a8")):
        assert isinstance(small, SmallRecipe)
        assert small.prefill is not None
        assert (small.model.family, small.prefill.model.family) == (family, family)
    config = wide.model.config
    layer = MoELayer(
        num_experts=config["num_experts"],
        top_k=config["num_experts_per_tok"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["moe_intermediate_size"],
        dtype=torch.bfloat16,
        quant_mode=QuantMode.INT8_PER_TOKEN,
    )
    for small in (wide, wide.prefill):
        device = replace(DEVICES["A3"], fused_mc2_asked=fused_mc2_asked(small.additional_config))
        assert device.fused_limits(layer).why_not(layer, 4) is None


def test_a_decode_node_gets_the_prefill_node_of_its_file(tmp_path):
    scripts = [
        node("kv_consumer", tp="1"),
        node("kv_producer"),
        node("kv_consumer", tp="1"),
        node("kv_consumer", tp="1"),
    ]
    scripts[3] = scripts[3].replace("--headless", "").replace("--async-scheduling", "")
    (tmp_path / "Model.md").write_text("\n".join(f"```\n{script}```\n" for script in scripts))
    (tmp_path / "Other.md").write_text(f"```\n{node('kv_consumer')}```\n")
    first, producer, second, third, alone = planned_recipes(tmp_path, "")
    assert isinstance(first, SmallRecipe)
    assert isinstance(third, SmallRecipe)
    assert third.prefill is not None
    assert (third.name, third.prefill.name) == ("Model 4", "Model 2")
    family, graphs = "deepseek-v3-w8a8-mtp", "FULL_DECODE_ONLY"
    assert str(third) == f"prefill {family} TP2×DP2×EP+SP {graphs}, decode {family} DP2×EP {graphs}"
    for small_node in (third, third.prefill):
        assert small_node.kv_transfer["kv_port"] == "30000"
        assert small_node.kv_transfer["kv_connector_extra_config"] == {
            "prefill": {"tp_size": 2, "dp_size": 2},
            "decode": {"tp_size": 1, "dp_size": 2},
            "c8": True,
        }
    assert [isinstance(row, RecipeRow) and row.not_run for row in (producer, second, alone)] == [
        "it is run beside the decode nodes of its file",
        "as Model 1",
        "no prefill node of its file can be made small",
    ]
    [only] = planned_recipes(tmp_path, "model 4")
    assert only == third


@pytest.mark.parametrize(("role", "topology"), [("kv_consumer", "DP2×EP"), ("kv_producer", "TP2×DP2×EP+SP")])
def test_a_node_whose_size_is_a_variable_has_that_of_its_connector(role, topology):
    recipe = make_small("run.sh", read_script(node(role).replace("-tp 16", "-tp $4")))
    assert str(recipe.parallelism) == topology


def test_groups_of_data_parallel_ranks_are_as_large_as_there_are_ranks():
    option = '"finegrained_tp_config": {"lmhead_tensor_parallel_size": 16, "mlp_tensor_parallel_size": 0}'
    recipe = small(('"multistream_overlap_shared_expert": true', option))
    few = {"lmhead_tensor_parallel_size": 2, "mlp_tensor_parallel_size": 0}
    assert recipe.additional_config == {"finegrained_tp_config": few}


@pytest.mark.parametrize("end", ["2>&1", "> serve.log 2>&1 &", "&& echo started", "| tee log"])
def test_what_the_shell_does_with_the_output_is_no_option(end):
    assert small(("true}'\n", f"true}}' {end}\n")) == small()


def test_nodes_in_files_of_their_own_belong_together(tmp_path):
    (tmp_path / "decode.sh").write_text(node("kv_consumer"))
    (tmp_path / "prefill.sh").write_text(node("kv_producer"))
    decode, _ = planned_recipes(tmp_path, "")
    assert isinstance(decode, SmallRecipe)
    assert decode.prefill is not None
    assert decode.prefill.name == "prefill.sh"


@pytest.mark.parametrize(("name", "text"), [("a.md", "no block"), ("a.sh", "")])
def test_no_recipe_at_all_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidInputError, match="there is no `vllm serve` in it"):
        planned_recipes(tmp_path / name, "other")
