"""What a model's config.json says about its experts. Model families spell the same fact differently; the tables hold all
spellings.

An engine reads experts, top-k and hidden size as vLLM does. tests/vllm/test_model_facts.py compares both readings on the
shapes of many public models.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

from vllm_npu.core.configured_routing import why_not_routed
from vllm_npu.errors import UnsupportedConfigError

# Objects of config.json that hold the language model, also one inside the other (Qwen3-Omni: thinker_config.text_config).
LANGUAGE_MODELS = ("thinker_config", "text_config", "llm_config", "language_config", "text")
# Objects of the language model that hold the facts of its experts: DBRX, and the params.json of Mistral.
EXPERT_SECTIONS = ("ffn_config", "moe")

# The first key that is there counts. vLLM reads experts and top-k in this order.
EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "experts_per_token",
    "moe_experts_per_token",
)
# The experts of a latent MoE take narrower rows than the rest of the model.
HIDDEN = ("moe_latent_size", "routed_expert_hidden_size", "hidden_size", "d_model", "dim")
DTYPE = ("dtype", "torch_dtype")
ACTIVATION = ("mlp_hidden_act", "hidden_act", "hidden_activation", "ffn_act_fn")
SWIGLU_LIMIT = ("swiglu_limit", "swiglu_limits", "expert_swiglu_limit_list")
QUANTISATION = ("quantization_config", "compression_config")
# The type of experts' weights in ModelSlim's checkpoints: the first key that is there.
MODELSLIM = ("moe_quantize", "quantize")

ACTIVATION_NAMES = {"gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}  # config.json's name: vLLM's name
# Families whose code in vLLM has another activation than the one that config.json names.
OWN_ACTIVATION = {"gpt_oss": "swigluoai"}

# Methods of vLLM 0.32 that quantise linear layers, and give experts no method.
LINEAR_LAYERS_ONLY = frozenset({"torchao", "fp_quant", "fbgemm_fp8"})
# Keys of a quantization_config that list modules, or patterns of modules, to leave unquantised.
UNCONVERTED = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules", "exclude")
# Modules that hold routed experts in vLLM's models. A pattern that matches one of them may leave experts unquantised.
EXPERT_MODULES = tuple(
    f"{model}.layers.0.{block}.experts"
    for model in ("model", "language_model.model", "model.language_model", "backbone")
    for block in ("mlp", "block_sparse_moe", "feed_forward", "mixer", "moe", "ffn")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """The facts that checks before a start need. None: config.json does not say it."""

    num_experts: int | None = None  # routed experts of a layer, without redundant ones
    top_k: int | None = None  # the most, if layers differ
    hidden_size: int | None = None  # width of an expert's input
    dtype: str | None = None
    activation: str | None = None  # vLLM's name of it
    swiglu_limit: float | None = None  # the largest, if layers differ; None: no layer clamps
    w8a8_experts: bool = False  # whether ModelSlim's key says so: int8 experts whose rows get a scale each
    unroutable: str | None = None  # the reason why the model's routing cannot run on a CPU
    quantised_experts: str | None = (
        None  # the method; None also if config.json leaves open whether it holds for experts
    )

    @classmethod
    def of_config(cls, config: Mapping[str, Any], quantisation: Mapping[str, Any] | None = None) -> Self:
        """Read the content of config.json. `quantisation` is used if `config` has no section for it.

        Raises UnsupportedConfigError for a value of another type than the key has in any public model. The error names the key.
        """
        language_model, surrounding = _language_model(config)
        found = quantisation_of(surrounding)
        return cls(
            num_experts=_same_in_all_layers(language_model, EXPERTS),
            top_k=_largest(language_model, TOP_K),
            hidden_size=_number(language_model, HIDDEN),
            dtype=_text(surrounding, DTYPE),
            activation=_activation(language_model),
            swiglu_limit=_limit(language_model),
            w8a8_experts=next((language_model[key] for key in MODELSLIM if key in language_model), None)
            == "w8a8_dynamic",
            unroutable=why_not_routed(language_model),
            quantised_experts=method_of_experts(quantisation or {} if found is None else found),
        )


def read_config(path: Path) -> ModelFacts:
    """The facts of a config.json, or of the folder that holds it. Raises UnsupportedConfigError, which names the file."""
    path = path / "config.json" if path.is_dir() else path
    config = _read_object(path)
    beside = path.with_name("hf_quant_config.json")  # ModelOpt's
    try:
        return ModelFacts.of_config(config, _read_object(beside) if beside.is_file() else None)
    except UnsupportedConfigError as error:
        raise UnsupportedConfigError(f"--model {path}: {error}") from error


def _read_object(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedConfigError(f"--model {path} cannot be read as a config.json: {error}") from error
    if not isinstance(content, dict):
        raise UnsupportedConfigError(f"--model {path} is not a config.json: it holds no object")
    return content


def quantisation_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section of config.json about quantisation. None if there is none."""
    key, section = _first(config, QUANTISATION)
    if section is not None and not isinstance(section, Mapping):
        raise _wrong(key, section, "an object")
    return section


def method_of_experts(quantisation: Mapping[str, Any]) -> str | None:
    """The method that quantises the routed experts. None if it is sure, or possible, that they stay unquantised."""
    method = quantisation.get("quant_method")
    if method is None and isinstance(quantisation.get("producer"), Mapping):
        method = quantisation["producer"].get("name")
    if method is None:
        return None
    if not isinstance(method, str):
        raise _wrong("quant_method", method, "a string")
    inner = quantisation.get("quantization")  # ModelOpt's own file nests its lists
    sections = (quantisation, inner) if isinstance(inner, Mapping) else (quantisation,)
    patterns = [pattern for section in sections for key in UNCONVERTED for pattern in _texts(key, section.get(key))]
    if method.lower() in LINEAR_LAYERS_ONLY or any(map(may_name_experts, patterns)):
        return None
    return method.lower().replace("_", "-") if method.lower() == "compressed_tensors" else method.lower()


def may_name_experts(pattern: str) -> bool:
    """Whether an entry of a list of unquantised modules may name routed experts: a name, a part of it, a glob, or re:REGEX."""
    if re.search(r"(?<!shared_)(?<!shared\.)experts(?!\.\d+\.gate$)", pattern):
        return True
    if pattern.startswith("re:"):
        try:
            return any(re.match(pattern[3:], module) for module in EXPERT_MODULES)
        except re.error:
            return True  # nobody knows what it names
    plain = re.sub(r"\d+", "0", pattern)
    return any(fnmatchcase(module, plain) or f".{plain}." in f".{module}." for module in EXPERT_MODULES)


def _language_model(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The object of the language model with the sections of its experts, and all objects around it in one. Outer keys win."""
    language_model = surrounding = config
    while True:
        key, inner = _first(language_model, LANGUAGE_MODELS)
        if inner is None:
            break
        if not isinstance(inner, Mapping):
            raise _wrong(key, inner, "an object")
        language_model = inner
        surrounding = {**inner, **{key: value for key, value in surrounding.items() if value is not None}}
    for key in EXPERT_SECTIONS:
        section = language_model.get(key)
        if isinstance(section, Mapping):
            language_model = {**section, **language_model}
    return language_model, surrounding


def _first(config: Mapping[str, Any], keys: Iterable[str]) -> tuple[str, Any]:
    return next(((key, config[key]) for key in keys if config.get(key) is not None), ("", None))


def _wrong(key: str, value: object, wanted: str) -> UnsupportedConfigError:
    return UnsupportedConfigError(f"{key} is {value!r:.200}; it must be {wanted}")


def _whole(key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _wrong(key, value, "a whole number, or a list with one for each layer")
    return value


def _numbers(config: Mapping[str, Any], keys: Iterable[str]) -> tuple[str, set[int]]:
    """The key that is there, and the numbers above 0 that it gives to layers. 0 and null stand for layers without experts."""
    key, value = _first(config, keys)
    values = value if isinstance(value, list | tuple) else [value]
    return key, {_whole(key, each) for each in values if each is not None} - {0}


def _same_in_all_layers(config: Mapping[str, Any], keys: Iterable[str]) -> int | None:
    key, numbers = _numbers(config, keys)
    if len(numbers) > 1:
        raise UnsupportedConfigError(f"{key} differs between layers ({sorted(numbers)}); give --experts")
    return next(iter(numbers), None)


def _largest(config: Mapping[str, Any], keys: Iterable[str]) -> int | None:
    return max(_numbers(config, keys)[1], default=None)


def _number(config: Mapping[str, Any], keys: Iterable[str]) -> int | None:
    key, value = _first(config, keys)
    return None if value is None else _whole(key, value) or None


def _text(config: Mapping[str, Any], keys: Iterable[str]) -> str | None:
    key, value = _first(config, keys)
    if value is not None and not isinstance(value, str):
        raise _wrong(key, value, "a string")
    return value


def _texts(key: str, value: object) -> list[str]:
    """A list of names, or an object whose keys are the names."""
    if value is None:
        return []
    if not isinstance(value, list | tuple | Mapping) or not all(isinstance(each, str) for each in value):
        raise _wrong(key, value, "a list of strings")
    return list(value)


def _activation(config: Mapping[str, Any]) -> str | None:
    if (own := OWN_ACTIVATION.get(str(config.get("model_type")))) is not None:
        return own
    key, value = _first(config, ACTIVATION)
    if isinstance(value, Mapping):  # DBRX: {"name": "silu"}
        value = value.get("name")
    name = _text({key: value}, [key])
    return None if name is None else ACTIVATION_NAMES.get(name, name)


def _limit(config: Mapping[str, Any]) -> float | None:
    """The limit of the experts' activation. 0 and null stand for layers without a limit."""
    key, value = _first(config, SWIGLU_LIMIT)
    values = value if isinstance(value, list | tuple) else [value]
    limits = [each for each in values if each is not None]
    for each in limits:
        if not isinstance(each, int | float) or isinstance(each, bool):
            raise _wrong(key, value, "a number, or a list with one for each layer")
    return max((float(each) for each in limits if each > 0), default=None)
