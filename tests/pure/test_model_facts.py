"""Reading config.json: the shapes of public models, and files that nobody meant."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from tests.model_shapes import SHAPES
from vllm_npu.core import model_facts
from vllm_npu.core.expert_limits import EXPERT_CHECKS, ExpertsWanted
from vllm_npu.core.limits import DEVICES, PORTABLE
from vllm_npu.core.model_facts import ModelFacts, method_of_experts, read_config
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.strategies.start_checks import check_experts
from vllm_npu.tools.layers import layer_of_model


@pytest.mark.parametrize("name", SHAPES)
def test_public_models_are_read(name):
    shape = SHAPES[name]
    facts = ModelFacts.of_config(shape.config)
    assert (facts.num_experts, facts.top_k, facts.hidden_size) == (shape.experts, shape.top_k, shape.hidden)
    assert (facts.activation, facts.swiglu_limit) == (shape.activation, shape.limit)
    assert facts.quantised_experts == shape.quantised


def test_what_is_missing_is_asked_for_by_its_option():
    with pytest.raises(
        UnsupportedConfigError, match=r"^--topk, --hidden not given, nor in --model's config.json; give them$"
    ):
        layer_of_model(ModelFacts(num_experts=8))
    layer = layer_of_model(ModelFacts(num_experts=8), topk=2, hidden=64)
    assert (layer.num_experts, layer.top_k, layer.hidden_size) == (8, 2, 64)


def test_layers_without_experts_do_not_count_and_layers_that_differ_are_named():
    assert ModelFacts.of_config({"num_experts": [0, 64, None, 64], "moe_topk": [0, 4, 8]}) == ModelFacts(
        num_experts=64, top_k=8
    )
    assert ModelFacts.of_config({"num_experts": 0}).num_experts is None
    with pytest.raises(
        UnsupportedConfigError, match=r"num_experts differs between layers \(\[32, 64\]\); give --experts"
    ):
        ModelFacts.of_config({"num_experts": [32, 64]})


@pytest.mark.parametrize(
    ("quantisation", "method"),
    [
        ({"quant_method": "AWQ", "modules_to_not_convert": ["gate", "visual"]}, "awq"),
        ({"quant_method": "compressed_tensors"}, "compressed-tensors"),
        ({"quant_method": "fp8", "ignored_layers": ["model.layers.3.mlp.shared_experts"]}, "fp8"),
        ({"quant_method": "fp8", "ignored_layers": ["model.layers.3.mlp.experts"]}, None),
        ({"quant_method": "fp8", "modules_to_not_convert": ["model.layers.7.mlp"]}, None),
        ({"quant_method": "fp8", "modules_to_not_convert": None}, "fp8"),
        ({"quant_method": "compressed-tensors", "ignore": ["re:.*mlp.*"]}, None),
        ({"quant_method": "compressed-tensors", "ignore": ["re:.*self_attn.*", "re:.*\\.mlp\\.gate$"]}, "compressed-tensors"),
        ({"quant_method": "quark", "exclude": ["*.block_sparse_moe*"]}, None),
        ({"quant_method": "compressed-tensors", "ignore": ["re:("]}, None),
        ({"quant_method": "torchao"}, None),
        ({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}, "modelopt"),
        ({"producer": {"name": "modelopt"}, "quantization": {"exclude_modules": ["*.experts*"]}}, None),
        ({}, None),
    ],
    ids=str,
)  # fmt: skip
def test_experts_count_as_quantised_only_where_that_is_sure(quantisation, method):
    assert method_of_experts(quantisation) == method


def test_a_file_of_modelopt_beside_config_json_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["Mixtral 8x7B"].config))
    assert read_config(tmp_path).quantised_experts is None
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": {}}))
    assert read_config(tmp_path).quantised_experts == "modelopt"


# ------------------------------------------------------------------------------------------ files that nobody meant

KEYS = (
    *model_facts.EXPERTS,
    *model_facts.TOP_K,
    *model_facts.HIDDEN,
    *model_facts.DTYPE,
    *model_facts.ACTIVATION,
    *model_facts.SWIGLU_LIMIT,
    *model_facts.QUANTISATION,
    *model_facts.LANGUAGE_MODELS,
    *model_facts.EXPERT_SECTIONS,
    *model_facts.UNCONVERTED,
    "quant_method",
    "producer",
    "quantization",
    "name",
)
VALUES = (
    None, True, 0, -1, 1, 8, 1.5, 1e400, "", "8", "silu", [], [8], [8, 4], [None], ["x"], [[8]], {}, {"name": 3}, [True],
    {"name": ["silu"]}, {"quant_method": 8}, {"quant_method": "fp8", "ignore": "lm_head"}, {"producer": "modelopt"},
)  # fmt: skip


def of_any_content(draw: random.Random, depth: int = 0) -> dict:
    return {
        draw.choice(KEYS): of_any_content(draw, depth + 1) if depth < 3 and draw.random() < 0.3 else draw.choice(VALUES)
        for _ in range(draw.randrange(3))
    }


@pytest.mark.parametrize("key", KEYS)
def test_any_value_of_a_known_key_is_read_or_named(key, tmp_path):
    for value in VALUES:
        for config in (
            {key: value},
            {**SHAPES["Qwen3-30B-A3B"].config, key: value},
            {"quantization_config": {key: value}},
        ):
            (tmp_path / "config.json").write_text(json.dumps(config))
            message = refusal_of(tmp_path)
            assert message == "" or any(f"config.json: {named} " in message for named in KEYS)


def refusal_of(folder: Path) -> str:
    """The message of the error for the folder's config.json. Empty if it is read."""
    try:
        read_config(folder)
    except UnsupportedConfigError as error:
        return str(error)
    return ""


def test_no_content_ends_in_an_error_of_python():
    draw, shapes = random.Random(16), list(SHAPES.values())
    refused = 0
    for _ in range(2000):
        try:
            layer_of_model(ModelFacts.of_config({**draw.choice(shapes).config, **of_any_content(draw)}))
        except UnsupportedConfigError:
            refused += 1
    assert 200 < refused < 1800


@pytest.mark.parametrize("text", ["", "[]", "8", "{", '"x"', "\x00", "[" * 100_000, '{"num_experts": NaN}'])
def test_a_file_that_is_no_config_is_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnsupportedConfigError, match=r"--model .*config\.json"):
        read_config(tmp_path)


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UnsupportedConfigError, match="cannot be read as a config"):
        read_config(tmp_path)


# --------------------------------------------------------------------------------------------------- what is refused

SILU = ModelFacts(num_experts=8, top_k=2, hidden_size=64, activation="silu")
REFUSED = {
    "zero experts return a token as it is": ExpertsWanted(
        model=ModelFacts.of_config({"zero_expert_num": 2, "zero_expert_type": "identity"})
    ),
    "experts quantised by fp8": ExpertsWanted(model=replace(SILU, quantised_experts="fp8")),
    "activation 'relu2' is not supported": ExpertsWanted(model=replace(SILU, activation="relu2")),
    "activation 'silu' with limit 7 is not": ExpertsWanted(model=replace(SILU, swiglu_limit=7.0)),
    "LoRA adapters on experts": ExpertsWanted(model=SILU, lora=True),
}


@pytest.mark.parametrize("message", REFUSED)
def test_experts_that_a_cpu_cannot_compute_are_refused_where_tokens_travel(message):
    wanted = REFUSED[message]
    for tp_size, dp_size, expert_parallel in ((2, 1, True), (1, 2, False), (2, 2, True)):
        topology = ParallelTopology.of_rank(0, tp_size=tp_size, dp_size=dp_size, expert_parallel=expert_parallel)
        with pytest.raises(UnsupportedConfigError, match=message):
            check_experts(wanted, topology, PORTABLE)
        check_experts(ExpertsWanted(model=SILU), topology, PORTABLE)
        check_experts(ExpertsWanted(model=ModelFacts()), topology, PORTABLE)
    for tp_size in (1, 2):
        own = ParallelTopology.of_rank(0, tp_size=tp_size, dp_size=1, expert_parallel=False)
        check_experts(wanted, own, PORTABLE)


def test_every_check_refuses_something():
    assert PORTABLE.experts is not None
    for check in EXPERT_CHECKS:
        assert any(check(PORTABLE.experts, wanted) for wanted in REFUSED.values())
    assert all(device.experts is None for device in DEVICES.values())
