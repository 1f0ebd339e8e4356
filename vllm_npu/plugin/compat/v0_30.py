"""vLLM 0.30 with vllm-ascend 0.30: everything in vllm_ascend that vllm_npu replaces or reads.

COMPAT(vllm-ascend 0.30): names in vllm_ascend are not a public interface. This file, ascend_lines.py and ascend_options.py use
these: `_MoECommMethods` (table of MoE communication methods), `_moe_config_key` (its key: a MoECommType and the layer's numbers
of experts), `MoECommMethod` (prepare, fused_experts, finalize), `select_moe_comm_method` (called once a step),
`build_mlp_compute_input`, `apply_moe_mlp`, `FusedExpertsResult`, `MoEPrepareOutput`, `MoETokenDispatchOutput`, `_EXTRA_CTX`
(the step's `moe_comm_type`, `is_draft_model` and `in_profile_run`), `AscendMoERunner`, `get_mc2_group`, `AscendConfig`, and
`AscendRoutedExperts.forward_impl`, which takes the method from the table; for adapters the layer's
`_ascend_moe_lora_context` with its `exchanged_lora_indices`. CAN REMOVE when MIN_SUPPORTED > 0.30.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe.runner.moe_runner_interface import MoERunnerInterface
from vllm_ascend.ascend_forward_context import _EXTRA_CTX
from vllm_ascend.ops.fused_moe import moe_comm_method
from vllm_ascend.ops.fused_moe.dataclass.moe_mlp import build_mlp_compute_input
from vllm_ascend.ops.fused_moe.dataclass.prepare_finalize import MoEPrepareOutput
from vllm_ascend.ops.fused_moe.dataclass.token_dispatcher import MoETokenDispatchOutput
from vllm_ascend.ops.fused_moe.fused_moe import AscendMoERunner
from vllm_ascend.ops.fused_moe.moe_comm_method import FusedExpertsResult, MoECommMethod
from vllm_ascend.ops.fused_moe.moe_mlp import apply_moe_mlp
from vllm_ascend.quantization.quant_type import QuantType

from vllm_npu.plugin.ascend.adapters import ExpertAdapters, places_of
from vllm_npu.plugin.compat.ascend_lines import (
    COMM_TYPES,
    COMPLETE,
    QUANT_MODES,
    agree_on_counts,
    device_limits,
    eplb_report,
    exchanging_layers,
    join_captures,
    layer_facts,
    micro_batch,
    refuse_layers,
    replace_choice,
    static_layers,
    transports,
    unagreed_tokens,
)
from vllm_npu.plugin.layer_facts import LayerFacts

__all__ = [
    "COMM_TYPES",
    "QUANT_MODES",
    "READS_AFTER_DISPATCH",
    "FusedExpertsResult",
    "MoECommMethod",
    "MoEPrepareOutput",
    "adapters_of",
    "agree_on_counts",
    "agree_on_padding",
    "check_layers",
    "comm_methods",
    "compute_experts",
    "current_comm_type",
    "device_limits",
    "eplb_report",
    "experts_result",
    "fused_weights",
    "in_draft_step",
    "in_profile_run",
    "is_complete",
    "join_captures",
    "layers_to_compare",
    "local_experts",
    "micro_batch",
    "moe_layers",
    "replace_choice",
    "replace_comm_methods",
    "replicas_of",
    "swiglu_limit",
    "take_attributes",
    "transports",
    "unagreed_tokens",
    "using",
]

READS_AFTER_DISPATCH = True  # whether the layer waits for an event after the dispatch

# --- functions that all release lines have ---


def moe_layers(vllm_config: VllmConfig) -> tuple[list[LayerFacts], list[str]]:
    """The MoE layers that this process has built, in order of construction.

    Returns the facts of the layers whose tokens vllm_npu moves, and the class names of the layers that are not vllm-ascend's.
    """
    facts = [
        layer_facts(
            layer,
            sliced=bool(layer.moe_config.is_sequence_parallel),
            experts=layer.routed_experts.quant_method,
            ids_of_expert=places_of(_adapters_on(layer)),
            swiglu_limit=layer.moe_config.swiglu_limit,
        )
        for layer in exchanging_layers(vllm_config, AscendMoERunner).values()
    ]
    layers = [layer for layer in static_layers(vllm_config) if isinstance(layer, MoERunnerInterface)]
    return facts, [type(layer).__name__ for layer in layers if not isinstance(layer, AscendMoERunner)]


# --- functions that replace vllm-ascend's communication, or compare with it: both lines of vllm-ascend have them ---


def check_layers(vllm_config: VllmConfig) -> None:
    """Raise UnsupportedConfigError for built MoE layers that were never run with our strategies.

    These facts are known from the layers only. ascend/config_check refuses settings before a process starts.
    """
    layers = [layer for layer in static_layers(vllm_config) if isinstance(layer, AscendMoERunner)]
    refuse_layers(
        vllm_config,
        layers,
        {
            "LoRA adapters on quantised experts": any(
                _adapters_on(layer) is not None and layer.quant_type is not QuantType.NONE for layer in layers
            )
        },
    )


def _adapters_on(layer: Any) -> Any:
    """vllm-ascend's MoELoRAContext of an AscendMoERunner. None if its experts have no adapters."""
    return getattr(layer.routed_experts, "_ascend_moe_lora_context", None)


def take_attributes(ours: Any, theirs: MoECommMethod) -> None:
    """Give our method what code of vllm-ascend reads from the method that it replaces."""
    ours.moe_config = theirs.moe_config
    ours.token_dispatcher = theirs.token_dispatcher
    ours.prepare_finalize = theirs.prepare_finalize
    ours.lora_context = theirs.lora_context


def local_experts(method: Any, given: Any) -> int:
    """The number of experts on this rank, in the layer of this call. vllm-ascend has a method for each number."""
    return int(method.moe_config.num_local_experts)


def replicas_of(given: Any) -> tuple[torch.Tensor, bool]:
    """The ids of the experts' replicas [num_tokens, top_k] int32, and whether each rank chose them by a table of its own.

    vllm-ascend's layer has chosen them.
    """
    return given.topk_ids, given.layer.log2phy is not None


def compute_experts(
    method: Any,  # our communication method
    given: Any,  # MoEFusedExpertsInput
    dispatched: dict[str, Any],  # fields of MoETokenDispatchOutput
    quant_method: Any,  # the layer's, which computes the experts
) -> tuple[torch.Tensor, Any]:
    """Run vllm-ascend's experts on dispatched rows. Returns their output, and the event before the second product. LOCAL."""
    output: tuple[torch.Tensor, Any] = apply_moe_mlp(
        build_mlp_compute_input(
            fused_experts_input=given,
            token_dispatch_output=MoETokenDispatchOutput(**dispatched),
            moe_config=method.moe_config,
        ),
        quant_method,
    )
    return output


def adapters_of(given: Any) -> ExpertAdapters | None:
    """The LoRA adapters of the layer's experts. None if it has none."""
    return None if given.lora_context is None else ExpertAdapters(given.lora_context)


def experts_result(given: Any, *, after_dispatch: Any, **fields: Any) -> FusedExpertsResult:
    """What fused_experts returns. `fields` are those that both lines have. After the event `after_dispatch`, the layer may
    compute the activation of its shared experts."""
    return FusedExpertsResult(**fields, shared_activation_overlap_start_evt=after_dispatch)


def fused_weights(given: Any, quant_method: Any) -> Any:
    """The weights and scales of the layer's experts for the fused operator: w1, w2, w1_scale, w2_scale, w1_scale_bias,
    w2_scale_bias, each a list; the last two may be None. The step's method must be FUSED_MC2."""
    return quant_method.get_fused_mc2_weights(given.layer)


def swiglu_limit(given: Any) -> float:
    """What clamps the activation of the layer's experts. 0: nothing does."""
    return float(given.layer.moe_config.swiglu_limit or 0)


def agree_on_padding(model_runner: Any) -> None:
    """Leave the runner as it is: vllm-ascend 0.30 has no padding that one rank decides."""


def replace_comm_methods(make: Callable[[Any], Any]) -> None:
    """Replace each communication method of vllm-ascend by `make(method)`."""
    table = moe_comm_method._MoECommMethods
    for key, method in list(table.items()):
        if key[0] in COMM_TYPES.values():
            table[key] = make(method)


def comm_methods() -> dict[Any, Any]:
    """vllm-ascend's communication methods by their keys in its table: MoECommType and the layer's numbers of experts."""
    return dict(moe_comm_method._MoECommMethods)


def layers_to_compare(vllm_config: VllmConfig) -> list[tuple[str, Any]]:
    """Name and module of every MoE layer whose tokens travel to other ranks. The module's forward_impl runs the layer."""
    layers = exchanging_layers(vllm_config, AscendMoERunner)
    return [(name, layer.routed_experts) for name, layer in layers.items()]


@contextmanager
def using(comm_type: Any, methods: dict[Any, Any], layer: Any) -> Iterator[None]:
    """Inside the `with` block, the layer communicates by the method of this type in `methods`, which has the keys of
    comm_methods."""
    table, key = moe_comm_method._MoECommMethods, moe_comm_method._moe_config_key(comm_type, layer.moe_config)
    before = _EXTRA_CTX.moe_comm_type, _EXTRA_CTX.moe_comm_method, table[key]
    _EXTRA_CTX.moe_comm_type, table[key] = comm_type, methods[key]
    try:
        yield
    finally:
        _EXTRA_CTX.moe_comm_type, _EXTRA_CTX.moe_comm_method, table[key] = before


def current_comm_type() -> Any:
    """The MoECommType of the method that the layers of the running step use."""
    return _EXTRA_CTX.moe_comm_type


def in_draft_step() -> bool:
    """Whether the running step is a drafter's."""
    return bool(_EXTRA_CTX.is_draft_model)


def in_profile_run() -> bool:
    """Whether the running step only measures memory: its routing is random."""
    return bool(_EXTRA_CTX.in_profile_run)


def is_complete(comm_type: Any, layer: Any) -> bool:
    """Whether the routed output of a layer is complete. If not, a sum over tp is still missing."""
    return bool(layer.moe_config.is_sequence_parallel) or comm_type in COMPLETE
