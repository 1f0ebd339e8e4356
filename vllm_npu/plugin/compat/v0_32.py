"""vLLM 0.32, on CPUs."""

from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.runner.moe_runner_interface import MoERunnerInterface
from vllm.utils.cpu_resource_utils import get_visible_memory_node
from vllm.v1.worker.ubatching import dbo_current_ubatch_id

from vllm_npu.limits import PORTABLE, DeviceLimits
from vllm_npu.plugin.layer_facts import LayerFacts
from vllm_npu.plugin.tensor_parallel import TensorParallelTransport
from vllm_npu.topology import ParallelTopology
from vllm_npu.transport.base import Transport
from vllm_npu.transport.gloo import GlooTransport


def moe_layers(vllm_config: VllmConfig) -> tuple[list[LayerFacts], list[str]]:
    """The MoE layers built so far in this process, in order of construction: facts of those whose tokens we move, and the
    classes of those that are not ours."""
    from vllm_npu.plugin.moe_runner import NPUMoERunner

    static = vllm_config.compilation_config.static_forward_context
    layers = [layer for layer in static.values() if isinstance(layer, MoERunnerInterface)]
    ours = [layer.facts for layer in layers if isinstance(layer, NPUMoERunner) and layer.exchanges_tokens]
    return ours, [type(layer).__name__ for layer in layers if not isinstance(layer, NPUMoERunner)]


def transports(
    tp: GroupCoordinator, dp: GroupCoordinator, ep: GroupCoordinator
) -> tuple[Transport, Transport, Transport]:
    """vLLM's three groups as this platform's transports."""
    return TensorParallelTransport(tp), GlooTransport(dp.device_group, "dp"), GlooTransport(ep.device_group, "ep")


def device_limits(vllm_config: VllmConfig, layers: list[LayerFacts], topology: ParallelTopology) -> DeviceLimits:
    """What this platform's device can run of these layers."""
    return PORTABLE


def numa_nodes() -> int:
    """NUMA nodes that vLLM's automatic thread binding can give out."""
    return len(get_visible_memory_node())


def micro_batch() -> int:
    """The micro-batch that the calling thread works on."""
    index: int = dbo_current_ubatch_id()
    return index


# COMPAT(vllm 0.32): DeepseekV2DecoderLayer tells a TP rank's slice from the whole step by its number of rows. In a step of
# one token both have one, and ranks past the first go on with their padding row. CAN REMOVE when the layer knows its layout.
_ARCHITECTURES_THAT_INFER_SLICES = frozenset({"DeepseekForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"})


def sequence_parallel_breaks(vllm_config: VllmConfig) -> bool:
    """Whether vLLM would run this model sequence parallel, and get steps of one token wrong."""
    if vllm_config.model_config is None or not vllm_config.parallel_config.use_sequence_parallel_moe:
        return False
    return not _ARCHITECTURES_THAT_INFER_SLICES.isdisjoint(vllm_config.model_config.architectures)


def disable_sequence_parallel(vllm_config: VllmConfig) -> None:
    """Have the model keep its tokens replicated over TP. vLLM derives it from the name of its own all2all backend, which
    runs nothing here: "naive" is one that its CPU communicator knows and that is not sequence parallel."""
    vllm_config.parallel_config.all2all_backend = "naive"


def register_out_of_tree(base: Any, replacement: type) -> None:
    """Have vLLM build `replacement` wherever it would build `base`. A second call with the same class does nothing.

    Raises ValueError where another class has taken the place.
    """
    registered = op_registry_oot.get(base.__name__)
    if registered is replacement:
        return
    if registered is not None:
        raise ValueError(
            f"{registered.__module__}.{registered.__qualname__} already replaces vLLM's {base.__name__}; load only one of "
            "the two plugins (VLLM_PLUGINS names those to load)"
        )
    base.register_oot(replacement)
