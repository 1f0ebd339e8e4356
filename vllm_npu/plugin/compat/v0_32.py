"""vLLM 0.32."""

from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.runner.moe_runner_interface import MoERunnerInterface
from vllm.utils.cpu_resource_utils import get_visible_memory_node
from vllm.v1.worker.ubatching import dbo_current_ubatch_id


def moe_layers(vllm_config: VllmConfig) -> list[MoERunnerInterface]:
    """The MoE layers built so far in this process, in order of construction."""
    static = vllm_config.compilation_config.static_forward_context
    return [layer for layer in static.values() if isinstance(layer, MoERunnerInterface)]


def numa_nodes() -> int:
    """NUMA nodes that vLLM's automatic thread binding can give out."""
    return len(get_visible_memory_node())


def micro_batch() -> int:
    """The micro-batch that the calling thread works on."""
    index: int = dbo_current_ubatch_id()
    return index


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
