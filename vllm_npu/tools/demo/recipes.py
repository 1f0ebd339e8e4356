"""A recipe of vllm-ascend, made small: the same options on a tiny model of the same family and a few emulated NPUs.

Sizes, addresses and what belongs to the real model's tokenizer are replaced or left out. All other options and variables stay.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_npu.core.ascend_recipes import FUSED_MC2
from vllm_npu.errors import InvalidInputError
from vllm_npu.tools.demo.ascend_demo import FEWER_TOKENS, MAX_TOKENS, MODELS, QWEN3_MOE_INT8, for_ascend
from vllm_npu.tools.engines.engine_processes import Parallelism
from vllm_npu.tools.engines.http_engine import CAPTURE_SIZES
from vllm_npu.tools.engines.tiny_models import DEEPSEEK_V3, GLM4_MOE, QWEN3_MOE, TinyModel
from vllm_npu.tools.json_option import read_object
from vllm_npu.tools.serve_script import ServeScript

RANKS = 2  # of each kind of parallelism that the recipe has more of
GRAPHS_OF_VLLM_ASCEND = "vllm-ascend's default"  # cudagraph_mode of a recipe that names none
KV_CONNECTORS = ("MooncakeConnector", "MooncakeConnectorV1")  # two names of vllm-ascend's class
PRODUCER, CONSUMER = "kv_producer", "kv_consumer"
FINER_TP = "finegrained_tp_config"  # of vllm-ascend's options: a size for each kind of layer

DEEPSEEK_V3_INT8 = for_ascend(
    DEEPSEEK_V3, 230, "deepseek-v3-w8a8", routed_scaling_factor=1.0, num_hidden_layers=2, first_k_dense_replace=1
)
GLM4_INT8 = for_ascend(GLM4_MOE, 368, "glm4-moe-w8a8", num_hidden_layers=2)
# In W8A8, for recipes with enable_fused_mc2: 2, whose operator takes experts of sizes from 512 on. By the model of its family.
WIDE_EXPERTS = {
    QWEN3_MOE_INT8.family: for_ascend(
        QWEN3_MOE, 94, "qwen3-moe-w8a8-wide", num_hidden_layers=2, moe_intermediate_size=512
    )
}
# The models of a family: with 16-bit weights (None: no seed was searched), and in W8A8. The pattern finds the name in the
# recipe's or the model's name.
FAMILIES: tuple[tuple[re.Pattern[str], TinyModel | None, TinyModel], ...] = (
    (re.compile(r"\bQwen3-(Coder-)?(30B|235B|480B)", re.IGNORECASE), MODELS[0], QWEN3_MOE_INT8),
    (re.compile(r"\bDeepSeek-(R1|V3)(?!\.2)", re.IGNORECASE), MODELS[1], DEEPSEEK_V3_INT8),
    (re.compile(r"\bGLM-?4\.[5-9x]", re.IGNORECASE), None, GLM4_INT8),
)
MTP_METHODS = ("mtp", "deepseek_mtp")  # the drafter is a layer of the model
DRAFTS_WITHOUT_A_MODEL = ("ngram", "suffix")

# Options that the small server has values of its own for.
REPLACED = (
    *(
        "--model",
        "--served-model-name",
        "--host",
        "--port",
        "--dtype",
        "--quantization",
        "--max-model-len",
        "--max-num-seqs",
    ),
    *("--max-num-batched-tokens", "--gpu-memory-utilization", "--tensor-parallel-size", "--data-parallel-size"),
    *(
        "--enable-expert-parallel",
        "--enforce-eager",
        "--compilation-config",
        "--additional-config",
        "--speculative-config",
        "--kv-transfer-config",
    ),
)
OF_THE_MACHINES = (
    *(
        "--data-parallel-address",
        "--data-parallel-rpc-port",
        "--data-parallel-size-local",
        "--data-parallel-start-rank",
    ),
    *("--data-parallel-rank", "--data-parallel-external-lb", "--data-parallel-hybrid-lb", "--headless", "--nnodes"),
    *("--node-rank", "--master-addr", "--master-port", "--api-server-count"),
)
OF_THE_REAL_MODEL = (
    *("--tokenizer", "--tokenizer-mode", "--chat-template", "--reasoning-parser", "--tool-call-parser"),
    *("--enable-auto-tool-choice", "--hf-overrides", "--load-format", "--safetensors-load-strategy"),
    *("--model-loader-extra-config", "--limit-mm-per-prompt", "--allowed-local-media-path", "--mm-processor-cache-gb"),
)
SHORT_NAMES = {"-tp": "--tensor-parallel-size", "-dp": "--data-parallel-size", "-q": "--quantization"}
VARIABLES_OF_THE_MACHINES = re.compile(
    r".*_(IFNAME|IF_IP|PATH|PRELOAD|DEVICES|MODELSCOPE)|LD_.*|OMP_.*|PATH|HCCL_INTRA_.*|ASCEND_.*(PATH|HOME).*|MASTER_.*"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallRecipe:
    """What the small server gets."""

    name: str
    model: TinyModel
    int8: bool
    parallelism: Parallelism
    graph_mode: str | None  # None: eager
    max_tokens: Sequence[int]  # one for each prompt
    options: tuple[str, ...]  # further ones of vllm serve
    additional_config: Mapping[str, Any]
    variables: Mapping[str, str]
    left_out: tuple[str, ...]
    kv_transfer: Mapping[str, Any]  # vLLM's kv_transfer_config; empty: one node does all
    prefill: "SmallRecipe | None" = None  # the node that computes the prompts of this decode node

    def __str__(self) -> str:
        small = f"{self.model.family} {self.parallelism} {self.graph_mode or 'eager'}"
        return f"prefill {self.prefill}, decode {small}" if self.prefill else small

    @property
    def kv_role(self) -> str | None:
        """PRODUCER of a prefill node, CONSUMER of a decode node, or None."""
        return self.kv_transfer.get("kv_role")

    def same_as(self, other: "SmallRecipe") -> bool:
        """Whether the two are alike but for their names and what was left out."""
        return self._unnamed() == other._unnamed()

    def _unnamed(self) -> "SmallRecipe":
        return replace(self, name="", left_out=(), prefill=self.prefill and self.prefill._unnamed())


def joined(prefill: SmallRecipe, decode: SmallRecipe) -> SmallRecipe:
    """The decode node with its prefill node. Their connectors get the sizes that the small nodes have."""
    sizes = {
        name: {"tp_size": node.parallelism.tensor_parallel_size, "dp_size": node.parallelism.data_parallel_size}
        for name, node in (("prefill", prefill), ("decode", decode))
    }
    both = [
        replace(
            node,
            kv_transfer={
                **node.kv_transfer,
                "kv_connector_extra_config": {**node.kv_transfer.get("kv_connector_extra_config", {}), **sizes},
            },
        )
        for node in (prefill, decode)
    ]
    if decode.model in WIDE_EXPERTS.values():
        both[0] = replace(both[0], model=decode.model)  # both nodes serve one model
    return replace(both[1], prefill=both[0])


def make_small(name: str, script: ServeScript) -> SmallRecipe:
    """Make the recipe small.

    Raises InvalidInputError for a recipe of a family without a tiny model, one of a node that passes its blocks on by
    another connector than KV_CONNECTORS, and values that are no JSON.
    """
    given = dict(_options(script.arguments))
    kv_transfer = _json(given, "--kv-transfer-config")
    if kv_transfer and (
        kv_transfer.get("kv_connector") not in KV_CONNECTORS or kv_transfer.get("kv_role") not in (PRODUCER, CONSUMER)
    ):
        raise InvalidInputError(
            f"its node passes blocks of the KV cache by {kv_transfer.get('kv_connector')} as {kv_transfer.get('kv_role')}, "
            f"and the small nodes do so by {KV_CONNECTORS[-1]} alone"
        )
    int8 = "--quantization" in given
    additional_config = _json(given, "--additional-config")
    model = _model_of(f"{name} {_value(given, '--model')}", int8=int8)
    if additional_config.get(FUSED_MC2) == 2:
        model = WIDE_EXPERTS.get(model.family, model)
    left_out = [option for option in given if option in (*OF_THE_MACHINES, *OF_THE_REAL_MODEL)]
    options: list[str] = []
    speculative = _json(given, "--speculative-config")
    if speculative and speculative.get("method") in MTP_METHODS and "first_k_dense_replace" in model.config:
        model = with_drafter(model)
        options += ["--speculative-config", json.dumps(speculative | {"method": "mtp"})]
    elif speculative and speculative.get("method") in DRAFTS_WITHOUT_A_MODEL:
        options += ["--speculative-config", json.dumps(speculative)]
    elif speculative:
        left_out.append(f"--speculative-config {speculative.get('method')}")
        speculative = {}
    kept = {option: values for option, values in given.items() if option not in (*REPLACED, *left_out)}
    options += [word for option, values in kept.items() for word in (option, *values)]

    compilation = _json(given, "--compilation-config")
    node = "prefill" if kv_transfer.get("kv_role") == PRODUCER else "decode"
    extra = kv_transfer.get("kv_connector_extra_config", {})
    told = extra.get(node, {}) if isinstance(extra, dict) else None
    if not isinstance(told, dict):
        raise InvalidInputError(
            f"kv_connector_extra_config {str(extra)[:80]} is no JSON object with the sizes of {node!r}"
        )
    eager = "--enforce-eager" in given
    if not eager:
        drafts = _sizes("--speculative-config", speculative, "num_speculative_tokens").get("num_speculative_tokens", 0)
        sizes = [size * (1 + drafts) for size in CAPTURE_SIZES]
        options += ["--compilation-config", json.dumps(compilation | {"cudagraph_capture_sizes": sizes})]
    machines = [variable for variable in script.variables if VARIABLES_OF_THE_MACHINES.fullmatch(variable)]
    parallelism = Parallelism(
        tensor_parallel_size=_few(given, "--tensor-parallel-size", told.get("tp_size")),
        data_parallel_size=_few(given, "--data-parallel-size", told.get("dp_size")),
        expert_parallel="--enable-expert-parallel" in given,
    )
    if finer := additional_config.get(FINER_TP):  # these groups are made of data-parallel ranks
        few = {size: min(value, parallelism.data_parallel_size) for size, value in _sizes(FINER_TP, finer).items()}
        additional_config = {**additional_config, FINER_TP: few}
    return SmallRecipe(
        name=name,
        model=model,
        int8=int8,
        parallelism=parallelism,
        graph_mode=None if eager else str(compilation.get("cudagraph_mode", GRAPHS_OF_VLLM_ASCEND)),
        max_tokens=FEWER_TOKENS if int8 else MAX_TOKENS,
        options=tuple(options),
        additional_config=additional_config,
        variables={
            variable: value
            for variable, value in script.variables.items()
            if variable.isupper() and variable not in machines
        },
        left_out=tuple(left_out),
        kv_transfer=kv_transfer,
    )


def with_drafter(model: TinyModel) -> TinyModel:
    """The model with one layer for MTP, a copy of its last one."""
    return replace(model, family=f"{model.family}-mtp", config={**model.config, "num_nextn_predict_layers": 1})


def _model_of(name: str, *, int8: bool) -> TinyModel:
    for pattern, unquantised, quantised in FAMILIES:
        model = quantised if int8 else unquantised
        if pattern.search(name) and model is not None:
            return model
    raise InvalidInputError(
        f"no tiny model is of its family{'' if int8 else ' without --quantization'} ({name.strip()})"
    )


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each option with its values. The first word may be the model, without the option's name."""
    name, values = "--model", list[str]()
    for word in arguments:
        if re.match(r"--?[a-z]", word):
            if values or name != "--model":
                yield name, tuple(values)
            written, equals, value = word.partition("=")
            name, values = SHORT_NAMES.get(written, written), [value] if equals else []
        else:
            values.append(word)
    yield name, tuple(values)


def _value(given: Mapping[str, tuple[str, ...]], option: str) -> str:
    return " ".join(given.get(option, ()))


def _few(given: Mapping[str, tuple[str, ...]], option: str, for_connector: object) -> int:
    """1 for an option that is 1 or absent. RANKS for any other number, and for a variable of the shell.

    `for_connector`: the size that the node's connector is told, which counts for a variable; None: it is told none.
    """
    value = _value(given, option)
    if for_connector is not None and not value.isdecimal():
        value = str(for_connector)
    return 1 if value in ("", "1") else RANKS


def _sizes(option: str, value: object, *names: str) -> dict[str, int]:
    """The object of numbers that an option has; of the given names only, if there are any. Raises InvalidInputError."""
    found = (
        {name: size for name, size in value.items() if name in names or not names} if isinstance(value, dict) else None
    )
    if found is None or not all(isinstance(size, int) for size in found.values()):
        raise InvalidInputError(f"{option} {str(value)[:80]} is no JSON object of numbers")
    return found


def _json(given: Mapping[str, tuple[str, ...]], option: str) -> dict[str, Any]:
    return read_object(option, _value(given, option) or "{}")
