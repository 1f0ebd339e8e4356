"""What the two lines of vllm-ascend, v0_23.py and v0_30.py, have in common.

COMPAT(vllm-ascend): names in vllm_ascend are not a public interface. This file uses these: `MoECommType`,
`ascend_forward_context.select_moe_comm_method` (called once a step), `QuantType`, `get_mc2_group`,
`should_skip_allreduce_across_dp_group`, which the runner's `_sync_metadata_across_dp` calls in each step,
`get_mc2_tokens_capacity`, and `npu_stream_switch`, by which their modules change to another stream.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.v1.worker.ubatching import dbo_current_ubatch_id
from vllm_ascend import ascend_forward_context, utils
from vllm_ascend.ascend_forward_context import MoECommType
from vllm_ascend.distributed.parallel_state import get_mc2_group
from vllm_ascend.quantization.quant_type import QuantType
from vllm_ascend.utils import should_skip_allreduce_across_dp_group
from vllm_ascend.worker import model_runner_v1

from vllm_npu.core.limits import DeviceLimits, QuantMode
from vllm_npu.core.step_plan import TokenSharding
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.device.npu_capture import join_capture
from vllm_npu.device.npu_ops import device_limits as limits_of_this_npu
from vllm_npu.envs import HCCL_BUFFSIZE
from vllm_npu.plugin.ascend.config_check import asked_fused_mc2, asked_mc2, refuse
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
    "fused_mc2": MoECommType.FUSED_MC2,
}
COMPLETE = frozenset({MoECommType.MC2, MoECommType.ALLTOALL, MoECommType.FUSED_MC2})
# The form in which the tokens of a layer travel, by the layer's quantisation. The other types, MXFP and fp8, are A5's alone:
# their rows are float8 or float4 numbers, which no operator of A2 and A3 takes.
QUANT_MODES = {
    QuantType.NONE: QuantMode.NONE,
    QuantType.W8A8: QuantMode.INT8_PER_TOKEN,
    QuantType.W4A8: QuantMode.INT8_PER_TOKEN,
    QuantType.W4A16: QuantMode.NONE,
}
INT4_WEIGHTS = frozenset({QuantType.W4A8, QuantType.W4A16})


def micro_batch() -> int:
    """Index of the micro-batch that the calling thread works on."""
    index: int = dbo_current_ubatch_id()
    return index


def join_captures() -> None:
    """Make each stream of vllm-ascend's join a capture before vllm-ascend allocates on it. See npu_capture.join_capture."""
    theirs = utils.npu_stream_switch

    def npu_stream_switch(target_stream: Any, *, enabled: bool = True) -> Any:
        if enabled:
            join_capture(target_stream)
        return theirs(target_stream, enabled=enabled)

    for name, module in list(sys.modules.items()):
        if name.startswith("vllm_ascend.") and vars(module).get("npu_stream_switch") is theirs:
            vars(module)["npu_stream_switch"] = npu_stream_switch


def eplb_report(model_runner: Any) -> dict[str, int] | None:
    """None: vllm-ascend balances the experts itself, and vllm_npu does not count it."""
    return None


class ExpertParallelTransport(HcclTransport):
    """The expert-parallel group. MC2's ops use vllm-ascend's own group of the same ranks, whose buffers serve only MC2."""

    @cached_property
    def _mc2(self) -> HcclTransport:
        return HcclTransport(get_mc2_group().device_group, "mc2")

    @property
    def name_for_ops(self) -> str:
        """The name that HCCL gave to vllm-ascend's MC2 group."""
        return self._mc2.name_for_ops


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
    if topology.ep_size > 1:
        limits = limits.with_mc2(asked_mc2())
    limits = replace(limits, fused_mc2_asked=asked_fused_mc2())
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


def replace_choice(strategy_of_step: Callable[[], str | None]) -> None:
    """Make vllm-ascend use the method of our strategy in each step. If `strategy_of_step` returns None, vllm-ascend chooses.

    A second call in a process does nothing.
    """
    theirs = ascend_forward_context.select_moe_comm_method
    if theirs.__module__ == __name__:
        return

    def select_moe_comm_method(*args: Any, **kwargs: Any) -> Any:
        strategy = strategy_of_step()
        return theirs(*args, **kwargs) if strategy is None else COMM_TYPES[strategy]

    ascend_forward_context.select_moe_comm_method = select_moe_comm_method


def unagreed_tokens(vllm_config: VllmConfig) -> int | None:
    """The most tokens of a data-parallel rank in a step whose counts the ranks do not agree on. None: they agree.

    vllm-ascend leaves the agreement out on KV consumers whose steps fit MC2, and MC2's op then takes room for its capacity.
    """
    if vllm_config.parallel_config.data_parallel_size == 1 or not should_skip_allreduce_across_dp_group(vllm_config):
        return None
    return int(ascend_forward_context.get_mc2_tokens_capacity())


def agree_on_counts() -> None:
    """Make data-parallel ranks agree on the token counts of each step.

    vllm-ascend leaves that out on KV consumers, and in the steps of a drafter without experts. The plan of such a step would
    have other counts on each rank. A step then costs one more all-reduce on CPUs.
    """
    model_runner_v1.should_skip_allreduce_across_dp_group = _never_skips


def _never_skips(vllm_config: VllmConfig, is_draft_model: bool = False) -> bool:
    return False


def static_layers(vllm_config: VllmConfig) -> list[Any]:
    """The modules that this process has built and that vLLM finds by name: attention and MoE layers."""
    return list(vllm_config.compilation_config.static_forward_context.values())


def exchanging_layers(vllm_config: VllmConfig, ours: type[Any]) -> dict[str, Any]:
    """The built MoE layers of the class `ours` whose tokens travel to other ranks, by name, in order of construction."""
    static = vllm_config.compilation_config.static_forward_context
    return {
        name: layer for name, layer in static.items() if isinstance(layer, ours) and exchanges_tokens(layer.moe_config)
    }


def layer_facts(
    layer: Any,
    *,
    sliced: bool,
    experts: Any,
    shared_experts: int = 0,
    ids_of_expert: int = 1,
    swiglu_limit: float | None = None,
) -> LayerFacts:
    """The facts of an MoE layer of vllm-ascend. `sliced`: each TP rank has its slice of the tokens. `experts` computes them.

    `shared_experts` are among its experts, and every token goes to each of them.
    """
    return LayerFacts.of(
        layer.moe_config,
        sharding=TokenSharding.SLICED_OVER_TP if sliced else TokenSharding.REPLICATED,
        experts=experts,
        shared_experts=shared_experts,
        ids_of_expert=ids_of_expert,
        quant_mode=QUANT_MODES.get(layer.quant_type, QuantMode.NONE),
        int4_weights=layer.quant_type in INT4_WEIGHTS,
        swiglu_limit=float(swiglu_limit or 0),
    )


def refuse_layers(vllm_config: VllmConfig, layers: list[Any], refused_on_this_line: dict[str, bool]) -> None:
    """Raise UnsupportedConfigError for built MoE layers that were never run with our strategies.

    `refused_on_this_line` has further reasons, and whether each applies.
    """
    refused = {
        f"quantisation {layer.quant_type.name} of experts, whose numbers only A5 has": True
        for layer in layers
        if layer.quant_type not in QUANT_MODES
    }
    refused |= refused_on_this_line
    refuse([reason for reason, applies in refused.items() if applies])
