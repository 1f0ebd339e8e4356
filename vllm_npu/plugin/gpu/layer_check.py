"""Checks the built MoE layers of a model on GPUs, after vLLM has loaded it and before its first step.

What depends on the model's classes no configuration tells: whether a layer slices its tokens over TP, and what its experts
want beside their rows.
"""

from collections.abc import Iterable

import torch
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from vllm_npu.core.limits import NVLINK, MoELayer
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin.options import Options
from vllm_npu.strategies.select import check_strategy
from vllm_npu.strategies.start_checks import check_inside_vllm
from vllm_npu.strategies.table import AUTO


def check_layers(modules: Iterable[torch.nn.Module], options: Options, topology: ParallelTopology) -> None:
    """Raise UnsupportedConfigError for a layer that the asked exchange cannot carry. LOCAL, and equal on all ranks."""
    if topology.dp_size == 1:
        return  # vLLM exchanges no tokens
    for module in modules:
        method = getattr(module, "quant_method", None)
        if not isinstance(method, FusedMoEMethodBase) or method.moe.ep_size == 1:
            continue
        quantised = quantised_rows(method)
        extra_tensors = 0 if quantised is None else 1
        if options.all2all == "pplx" and extra_tensors:
            raise UnsupportedConfigError(
                "PPLX's kernels would send rows without the scales of this model's quantised experts; choose another all2all"
            )
        if options.exchange not in (None, AUTO):
            layer = MoELayer(
                num_experts=int(method.moe.num_experts),
                top_k=int(method.moe.experts_per_token),
                hidden_size=int(method.moe.hidden_dim),
                dtype=quantised or method.moe.in_dtype,
            )
            check_strategy(options.exchange, topology, layer, NVLINK)
            check_inside_vllm(
                options.exchange,
                replicated_over_tp=topology.tp_size > 1 and not method.moe.moe_parallel_config.is_sequence_parallel,
                extra_tensors=extra_tensors,
            )


def quantised_rows(method: FusedMoEMethodBase) -> torch.dtype | None:
    """The dtype of the layer's rows where tokens are quantised before they travel, and their scales travel beside them.

    None where that cannot be told, and for one scale of all tokens, which does not travel.
    """
    kernel, config = method.moe_kernel, method.moe_quant_config
    if (
        kernel is None
        or config is None
        or config.a1_scale is not None
        or kernel.fused_experts.expects_unquantized_inputs
    ):
        return None
    dtype = config.quant_dtype
    return torch.uint8 if isinstance(dtype, str) else dtype  # a name, such as nvfp4, is of packed bytes
