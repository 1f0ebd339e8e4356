"""vLLM 0.23 with vllm-ascend 0.23: everything in vllm_ascend that vllm_npu replaces or reads.

COMPAT(vllm-ascend 0.23): names in vllm_ascend are not a public interface. This file and ascend_lines.py use these:
`_MoECommMethods` (table of MoE communication methods by MoECommType), `MoECommMethod` (prepare, fused_experts, finalize),
`select_moe_comm_method` (called once a step), `build_mlp_compute_input`, `FusedExpertsResult`, `MoEPrepareOutput`,
`MoETokenDispatchOutput`, the forward context's `moe_comm_type`, `moe_comm_method` and `is_draft_model`, `get_mc2_group`,
`AscendFusedMoE.forward_impl`, the runner's `_sync_metadata_across_dp`. CAN REMOVE when MIN_SUPPORTED >= 0.30.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.layer import FusedMoE
from vllm_ascend.ops.fused_moe import moe_comm_method
from vllm_ascend.ops.fused_moe.fused_moe import AscendFusedMoE
from vllm_ascend.ops.fused_moe.moe_comm_method import FusedExpertsResult, MoECommMethod
from vllm_ascend.ops.fused_moe.moe_runtime_args import (
    MoEPrepareOutput,
    MoETokenDispatchOutput,
    build_mlp_compute_input,
)
from vllm_ascend.quantization.quant_type import QuantType
from vllm_ascend.utils import (
    embedding_tp_enable,
    enable_sp,
    oproj_tp_enable,
)

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

READS_AFTER_DISPATCH = False  # whether the layer waits for an event after the dispatch

# --- functions that all release lines have ---


def moe_layers(vllm_config: VllmConfig) -> tuple[list[LayerFacts], list[str]]:
    """The MoE layers that this process has built, in order of construction.

    Returns the facts of the layers whose tokens vllm_npu moves, and the class names of the layers that are not vllm-ascend's.
    """
    sliced = enable_sp(vllm_config)
    facts = [
        layer_facts(
            layer,
            sliced=sliced,
            experts=layer.quant_method,
            shared_experts=_mixed_experts(layer),
            swiglu_limit=layer.swiglu_limit,
        )
        for layer in exchanging_layers(vllm_config, AscendFusedMoE).values()
    ]
    layers = [layer for layer in static_layers(vllm_config) if isinstance(layer, FusedMoE)]
    return facts, [type(layer).__name__ for layer in layers if not isinstance(layer, AscendFusedMoE)]


# --- functions that replace vllm-ascend's communication, or compare with it: both lines of vllm-ascend have them ---


def check_layers(vllm_config: VllmConfig) -> None:
    """Raise UnsupportedConfigError for built MoE layers that were never run with our strategies.

    These facts are known from the layers only. ascend/config_check refuses settings before a process starts.
    """
    layers = [layer for layer in static_layers(vllm_config) if isinstance(layer, AscendFusedMoE)]
    refuse_layers(
        vllm_config,
        layers,
        {
            "mix_placement with experts that are not W8A8, whose layer chooses no shared expert": any(
                _mixed_experts(layer) and layer.quant_type is not QuantType.W8A8 for layer in layers
            ),
        },
    )


def _mixed_experts(layer: Any) -> int:
    """The shared experts that are placed as routed ones. Every token chooses each of them."""
    return int(layer.n_shared_experts or 0) if layer.mix_placement else 0


def take_attributes(ours: Any, theirs: MoECommMethod) -> None:
    """Give our method what code of vllm-ascend reads from the method that it replaces."""
    ours.moe_config = theirs.moe_config
    ours.token_dispatcher = theirs.token_dispatcher
    ours.prepare_finalize = theirs.prepare_finalize
    ours.use_fusion_ops = theirs.use_fusion_ops


def local_experts(method: Any, given: Any) -> int:
    """The number of experts on this rank, in the layer of this call. `method` has the sizes of the last layer of the model."""
    weights: torch.Tensor | list[torch.Tensor] = (
        given.weights.w1
    )  # one tensor of all, a list of such tensors, or one for each
    tensors = [weights] if isinstance(weights, torch.Tensor) else weights
    return sum(each.shape[0] if each.dim() == 3 else 1 for each in tensors)


def replicas_of(given: Any) -> tuple[torch.Tensor, bool]:
    """The ids of the experts' replicas [num_tokens, top_k] int32, and whether each rank chose them by a table of its own."""
    log2phy = given.routing.log2phy
    return (given.topk_ids, False) if log2phy is None else (log2phy[given.topk_ids], True)


def compute_experts(
    method: Any,  # our communication method
    given: Any,  # MoEFusedExpertsInput
    dispatched: dict[str, Any],  # fields of MoETokenDispatchOutput
    quant_method: Any,  # None on this line
) -> tuple[torch.Tensor, Any]:
    """Run vllm-ascend's experts on dispatched rows. Returns their output, and the event before the second product. LOCAL."""
    output: tuple[torch.Tensor, Any] = method._apply_mlp(
        build_mlp_compute_input(
            fused_experts_input=given,
            token_dispatch_output=MoETokenDispatchOutput(**dispatched),
            use_fusion_ops=method.use_fusion_ops,
        )
    )
    return output


def adapters_of(given: Any) -> None:
    """None: vllm-ascend 0.23 refuses LoRA adapters on experts beside expert parallelism."""


def experts_result(given: Any, *, after_dispatch: Any, **fields: Any) -> FusedExpertsResult:
    """What fused_experts returns. `fields` are those that both lines have. Nothing waits for `after_dispatch`
    on this line."""
    return FusedExpertsResult(**fields, swiglu_limit=given.swiglu_limit)


def fused_weights(given: Any, quant_method: Any) -> Any:
    """The weights and scales of the layer's experts for the fused operator: w1, w2, w1_scale, w2_scale, w1_scale_bias,
    w2_scale_bias, each a list; the last two may be None. The step's method must be FUSED_MC2."""
    return given.weights


def swiglu_limit(given: Any) -> float:
    """What clamps the activation of the layer's experts. 0: nothing does."""
    return float(given.swiglu_limit or 0)


def agree_on_padding(model_runner: Any) -> None:
    """Make all DP ranks pad a step to equal token counts, or none. LOCAL; the runner's step stays as COLLECTIVE as it was.

    vllm-ascend lets a rank pad if this rank alone could replay a graph. Where another rank has a prefill, all run eagerly, and
    the ranks then have different counts for the same step. The mode that all ranks agreed on decides here.
    """
    theirs = model_runner._sync_metadata_across_dp
    pads_always = enable_sp(model_runner.vllm_config) or oproj_tp_enable() or embedding_tp_enable()

    def sync_metadata_across_dp(
        num_tokens: int,
        is_draft_model: bool = False,
        cudagraph_mode: CUDAGraphMode = CUDAGraphMode.NONE,
        allow_dp_padding: bool = False,  # decided by this rank's own mode
    ) -> tuple[int, torch.Tensor | None, CUDAGraphMode]:
        most, counts, agreed = theirs(num_tokens, is_draft_model, cudagraph_mode, allow_dp_padding=pads_always)
        if counts is not None and agreed is not CUDAGraphMode.NONE:
            counts = torch.full_like(counts, most)
        return most, counts, agreed

    model_runner._sync_metadata_across_dp = sync_metadata_across_dp


def replace_comm_methods(make: Callable[[Any], Any]) -> None:
    """Replace each communication method of vllm-ascend by `make(method)`."""
    table = moe_comm_method._MoECommMethods
    for comm_type in set(COMM_TYPES.values()) & set(table):
        table[comm_type] = make(table[comm_type])


def comm_methods() -> dict[Any, Any]:
    """vllm-ascend's communication methods by their keys in its table: MoECommType."""
    return dict(moe_comm_method._MoECommMethods)


def layers_to_compare(vllm_config: VllmConfig) -> list[tuple[str, Any]]:
    """Name and module of every MoE layer whose tokens travel to other ranks. The module's forward_impl runs the layer."""
    return list(exchanging_layers(vllm_config, AscendFusedMoE).items())


@contextmanager
def using(comm_type: Any, methods: dict[Any, Any], layer: Any) -> Iterator[None]:
    """Inside the `with` block, the layer communicates by the method of this type in `methods`, which has the keys of
    comm_methods."""
    context = get_forward_context()
    before = context.moe_comm_type, context.moe_comm_method
    context.moe_comm_type, context.moe_comm_method = comm_type, methods[comm_type]
    try:
        yield
    finally:
        context.moe_comm_type, context.moe_comm_method = before


def current_comm_type() -> Any:
    """The MoECommType of the method that the layers of the running step use."""
    return get_forward_context().moe_comm_type


def in_draft_step() -> bool:
    """Whether the running step is a drafter's."""
    return bool(getattr(get_forward_context(), "is_draft_model", False))


def in_profile_run() -> bool:
    """Whether the running step only measures memory: its routing is random."""
    return bool(getattr(get_forward_context(), "in_profile_run", False))


def is_complete(comm_type: Any, layer: Any) -> bool:
    """Whether the routed output of a layer is complete. If not, a sum over tp is still missing."""
    flash = bool(getattr(get_forward_context(), "flash_comm_v1_enabled", False))
    return flash or comm_type in COMPLETE
