"""Our tables of config.json's spellings against vLLM's own reading, for public models and for every configuration class."""

import inspect
import json
import re
import sys

import pytest

pytest.importorskip("vllm")

import vllm.config  # noqa: F401 - before the convertors, which it imports in a circle
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from vllm.transformers_utils.config import _CONFIG_REGISTRY, get_config, get_hf_text_config
from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)

from tests.model_shapes import SHAPES
from vllm_npu.core.model_facts import LINEAR_LAYERS_ONLY, ModelFacts

# Where vLLM 0.32 reads less than there is, and what it reads.
VLLM_READS = {
    "DBRX": (0, 0, 6144),  # it does not look into ffn_config, and takes the model for a dense one
    "InternVL3.5 30B": (0, 0, 0),  # the publisher's own class renames llm_config
    "ERNIE-4.5-VL-28B-A3B": (64, 0, 2560),  # the publisher's own class renames moe_k
    "Nemotron 3 Super": (512, 22, 4096),  # the model's width; its experts are narrower
    "Mistral's params.json": (0, 0, 0),  # vLLM's other reader translates it
}


def read_by_vllm(config: PretrainedConfig) -> tuple[int, int, int]:
    """Experts, top-k and hidden size, as ModelConfig has them."""
    convertor = MODEL_ARCH_CONFIG_CONVERTORS.get(config.model_type, ModelArchConfigConvertorBase)
    read = convertor(config, get_hf_text_config(config))
    return read.get_num_experts(), read.get_num_experts_per_token(), read.get_hidden_size()


def numbers(facts: ModelFacts) -> tuple[int, int, int]:
    return facts.num_experts or 0, facts.top_k or 0, facts.hidden_size or 0


@pytest.mark.parametrize("name", SHAPES)
def test_vllm_reads_public_models_alike(name, tmp_path):
    shape = SHAPES[name]
    (tmp_path / "config.json").write_text(json.dumps(shape.config))
    try:
        config = get_config(str(tmp_path), trust_remote_code=False)
    except ValueError:  # the publisher's own class comes with the weights; it renames few keys
        config = PretrainedConfig.from_dict(shape.config)
    expected = (shape.experts, shape.top_k, shape.hidden)
    assert read_by_vllm(config) == VLLM_READS.get(name, expected)
    if VLLM_READS.get(name, expected)[0]:
        from_class = ModelFacts.of_config(get_hf_text_config(config).to_dict())
        assert numbers(from_class) == expected
        assert from_class.swiglu_limit == shape.limit
        assert from_class.activation in (shape.activation, "silu")  # a class may fill in what the file leaves out


def classes_with_experts() -> dict[str, type[PretrainedConfig]]:
    """The configuration classes of transformers and vLLM whose modules speak of experts."""
    classes = {name: CONFIG_MAPPING[name] for name in CONFIG_MAPPING} | {
        name: _CONFIG_REGISTRY[name] for name in _CONFIG_REGISTRY
    }
    return {name: cls for name, cls in classes.items() if "expert" in inspect.getsource(sys.modules[cls.__module__])}


def test_every_configuration_class_is_read_as_vllm_reads_it():
    read = 0
    for name, cls in classes_with_experts().items():
        try:
            config = cls()
        except (AssertionError, ValueError):
            continue  # a class without a default
        theirs = read_by_vllm(config)
        if theirs[0] == 0 and name != "dbrx":
            continue
        content = json.loads(config.to_json_string(use_diff=False))
        for facts in (ModelFacts.of_config(content), ModelFacts.of_config(get_hf_text_config(config).to_dict())):
            assert numbers(facts) == ((4, 1, 2048) if name == "dbrx" else theirs), name
        read += 1
    assert read > 75


def test_methods_that_leave_experts_unquantised_are_those_of_vllm():
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    unaware = {
        name
        for name in QUANTIZATION_METHODS
        if not re.search("RoutedExperts|FusedMoE", inspect.getsource(get_quantization_config(name).get_quant_method))
    }
    assert unaware == LINEAR_LAYERS_ONLY
