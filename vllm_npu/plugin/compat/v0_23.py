"""vLLM 0.23 with vllm-ascend 0.23: everything in vllm_ascend that vllm_npu replaces or reads.

COMPAT(vllm-ascend 0.23): names in vllm_ascend are not a public interface. This file uses these: `_MoECommMethods` (table of MoE
communication methods by MoECommType), `MoECommMethod` (prepare, fused_experts, finalize), `select_moe_comm_method` (called
once a step), `build_mlp_compute_input`, `FusedExpertsResult`, `MoEPrepareOutput`, `MoETokenDispatchOutput`, the forward
context's `moe_comm_type` and `moe_comm_method`, `AscendFusedMoE.forward_impl`, `get_mc2_group`. CAN REMOVE when
MIN_SUPPORTED >= the first release line in which the layer itself can be replaced (AscendMoERunner).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.layer import FusedMoE
from vllm.v1.worker.ubatching import dbo_current_ubatch_id
from vllm_ascend import ascend_forward_context
from vllm_ascend.ascend_forward_context import MoECommType
from vllm_ascend.distributed.parallel_state import get_mc2_group
from vllm_ascend.ops.fused_moe import moe_comm_method
from vllm_ascend.ops.fused_moe.fused_moe import AscendFusedMoE
from vllm_ascend.quantization.quant_type import QuantType
from vllm_ascend.utils import enable_sp, should_skip_allreduce_across_dp_group

from vllm_npu.core.limits import DeviceLimits, QuantMode
from vllm_npu.core.step_plan import TokenSharding
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.device.npu_ops import device_limits as limits_of_this_npu
from vllm_npu.envs import HCCL_BUFFSIZE
from vllm_npu.plugin.ascend.config_check import refuse
from vllm_npu.plugin.engine_check import planned_shape
from vllm_npu.plugin.layer_facts import LayerFacts, exchanges_tokens
from vllm_npu.strategies.start_checks import check_start
from vllm_npu.transport.base import Transport
from vllm_npu.transport.hccl import HcclTransport

# vllm-ascend's layer completes the sums over tp by the type of the communication method. After MC2 and ALLTOALL the routed
# output is complete, and the layer sums the shared experts' output alone. After ALLGATHER it sums both outputs in one step.
COMM_TYPES = {
    "mc2": MoECommType.MC2,
    "all2all": MoECommType.ALLTOALL,
    "allgather": MoECommType.ALLGATHER,
    "naive": MoECommType.ALLGATHER,
}
QUANT_MODES = {
    QuantType.NONE: QuantMode.NONE,
    QuantType.W8A8: QuantMode.INT8_PER_TOKEN,
}  # layer: what its tokens travel in


# --- functions that both release lines have ---


def moe_layers(vllm_config: VllmConfig) -> tuple[list[LayerFacts], list[str]]:
    """The MoE layers that this process has built, in order of construction.

    Returns the facts of the layers whose tokens vllm_npu moves, and the class names of the layers that are not vllm-ascend's.
    """
    layers = [layer for layer in _static_layers(vllm_config) if isinstance(layer, FusedMoE)]
    sharding = TokenSharding.SLICED_OVER_TP if enable_sp(vllm_config) else TokenSharding.REPLICATED
    ours = [
        LayerFacts.of(
            layer.moe_config,
            sharding=sharding,
            experts=layer.quant_method,
            quant_mode=QUANT_MODES.get(layer.quant_type, QuantMode.NONE),
        )
        for layer in layers
        if isinstance(layer, AscendFusedMoE) and exchanges_tokens(layer.moe_config)
    ]
    return ours, [type(layer).__name__ for layer in layers if not isinstance(layer, AscendFusedMoE)]


def micro_batch() -> int:
    """Index of the micro-batch that the calling thread works on."""
    index: int = dbo_current_ubatch_id()
    return index


def eplb_report(model_runner: Any) -> dict[str, int] | None:
    """None: vllm-ascend balances the experts itself, and vllm_npu does not count it."""
    return None


class ExpertParallelTransport(HcclTransport):
    """The expert-parallel group. MC2's ops use vllm-ascend's own group of the same ranks, whose buffers serve only MC2."""

    @property
    def name_for_ops(self) -> str:
        """The name that HCCL gave to vllm-ascend's MC2 group."""
        return HcclTransport(get_mc2_group().device_group, "mc2").name_for_ops


def transports(
    tp: GroupCoordinator, dp: GroupCoordinator, ep: GroupCoordinator
) -> tuple[Transport, Transport, Transport]:
    """vLLM's three groups as transports over HCCL."""
    return (
        HcclTransport(tp.device_group, "tp"),
        HcclTransport(dp.device_group, "dp"),
        ExpertParallelTransport(ep.device_group, "ep"),
    )


def device_limits(
    vllm_config: VllmConfig, layers: list[LayerFacts], topology: ParallelTopology, moe_comm: str
) -> DeviceLimits:
    """The limits of this NPU for these layers. Raises the errors of start_checks.check_start."""
    limits = limits_of_this_npu()
    for layer in layers:
        limits = check_start(
            moe_comm,
            topology,
            layer.moe_layer,
            limits,
            shape=planned_shape(vllm_config),
            hccl_buffer_mb=HCCL_BUFFSIZE.read_whole_number(),
        )
    return limits


# --- functions that replace vllm-ascend's communication, or compare with it ---


def check_layers(vllm_config: VllmConfig) -> None:
    """Raise UnsupportedConfigError for built MoE layers that were never run with our strategies.

    These facts are known from the layers only. ascend/config_check refuses settings before a process starts.
    """
    layers = [layer for layer in _static_layers(vllm_config) if isinstance(layer, AscendFusedMoE)]
    refused = {
        "a KV consumer whose DP ranks do not agree on token counts": bool(
            vllm_config.parallel_config.data_parallel_size > 1 and should_skip_allreduce_across_dp_group(vllm_config)
        ),
        "routing by a hash of token ids": any(layer.tid2eid is not None for layer in layers),
        "MoE layers with different numbers of experts": len({int(layer.moe_config.num_experts) for layer in layers})
        > 1,
    }
    refused |= {f"quantisation {layer.quant_type}": True for layer in layers if layer.quant_type not in QUANT_MODES}
    refuse([reason for reason, applies in refused.items() if applies])


def replace_comm_methods(make: Callable[[Any], Any]) -> None:
    """Replace each communication method of vllm-ascend by `make(method)`. FUSED_MC2's method stays."""
    table = moe_comm_method._MoECommMethods
    for comm_type in set(COMM_TYPES.values()) & set(table):
        table[comm_type] = make(table[comm_type])


def replace_choice(strategy_of_step: Callable[[], str | None]) -> None:
    """Make vllm-ascend use the method of our strategy in each step. If `strategy_of_step` returns None, vllm-ascend chooses.

    A second call in a process does nothing.
    """
    theirs = ascend_forward_context.select_moe_comm_method
    if theirs.__module__ == __name__:
        return

    def select_moe_comm_method(num_tokens: int, vllm_config: VllmConfig, is_draft_model: bool = False) -> Any:
        strategy = strategy_of_step()
        return theirs(num_tokens, vllm_config, is_draft_model) if strategy is None else COMM_TYPES[strategy]

    ascend_forward_context.select_moe_comm_method = select_moe_comm_method


def comm_methods() -> dict[Any, Any]:
    """vllm-ascend's communication methods by MoECommType."""
    return dict(moe_comm_method._MoECommMethods)


def layers_to_compare(vllm_config: VllmConfig) -> list[tuple[str, Any]]:
    """Name and module of every MoE layer whose tokens travel to other ranks."""
    static = vllm_config.compilation_config.static_forward_context
    return [
        (name, layer)
        for name, layer in static.items()
        if isinstance(layer, AscendFusedMoE) and exchanges_tokens(layer.moe_config)
    ]


@contextmanager
def using(comm_type: Any, method: Any) -> Iterator[None]:
    """The layers that run inside the `with` block communicate by `method`."""
    context = get_forward_context()
    before = context.moe_comm_type, context.moe_comm_method
    context.moe_comm_type, context.moe_comm_method = comm_type, method
    try:
        yield
    finally:
        context.moe_comm_type, context.moe_comm_method = before


def current_comm_type() -> Any:
    """The MoECommType of the method that the layers of the running step use."""
    return get_forward_context().moe_comm_type


def in_profile_run() -> bool:
    """Whether the running step only measures memory: its routing is random."""
    return bool(getattr(get_forward_context(), "in_profile_run", False))


def is_complete(comm_type: Any) -> bool:
    """Whether the routed output of a layer is complete. If not, a sum over tp is still missing."""
    flash = bool(getattr(get_forward_context(), "flash_comm_v1_enabled", False))
    return flash or comm_type in (MoECommType.MC2, MoECommType.ALLTOALL, MoECommType.FUSED_MC2)


def _static_layers(vllm_config: VllmConfig) -> list[torch.nn.Module]:
    return list(vllm_config.compilation_config.static_forward_context.values())
