"""Unquantised experts on a CPU. They compute the rows that dispatch brings, in a loop over the local experts."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from vllm_npu.core.routing import expert_ranges
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin.layer_facts import exchanges_tokens

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

GATED_ACTIVATIONS: dict[MoEActivation, Callable[[torch.Tensor], torch.Tensor]] = {
    MoEActivation.SILU: F.silu,
    MoEActivation.GELU: F.gelu,
    MoEActivation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
}


class CpuUnquantizedFusedMoEMethod(UnquantizedFusedMoEMethod):
    """vLLM's method for unquantised experts. Layers that exchange tokens keep their weights as loaded, and call compute()."""

    def __init__(self, moe: FusedMoEConfig) -> None:
        super().__init__(moe)
        if exchanges_tokens(moe) and (moe.activation not in GATED_ACTIVATIONS or moe.swiglu_limit is not None):
            raise UnsupportedConfigError(
                f"experts' activation {moe.activation.value!r} (swiglu_limit={moe.swiglu_limit}) is not supported with expert "
                f"or data parallelism on a CPU; supported: {', '.join(each.value for each in GATED_ACTIVATIONS)}, no limit"
            )

    def process_weights_after_loading(self, layer: "RoutedExperts") -> None:
        """Leave w13 [experts, 2 * intermediate, hidden] and w2 [experts, hidden, intermediate] as loaded if the layer
        exchanges tokens. Otherwise vLLM repacks them."""
        if not exchanges_tokens(self.moe):
            super().process_weights_after_loading(layer)

    def compute(
        self,
        layer: "RoutedExperts",
        expert_input: torch.Tensor,  # [rows, hidden_size], expert-major
        tokens_per_expert: torch.Tensor,  # [num_local_experts] int64
    ) -> torch.Tensor:  # [rows, hidden_size]; rows past sum(tokens_per_expert) are undefined
        """Run each local expert's gated MLP on its rows. LOCAL. Host sync: reads tokens_per_expert."""
        activation = GATED_ACTIVATIONS[self.moe.activation]
        output = torch.empty_like(expert_input, memory_format=torch.contiguous_format)
        for expert, start, stop in expert_ranges(tokens_per_expert.tolist()):
            w13_bias = layer.w13_bias[expert] if self.moe.has_bias else None
            w2_bias = layer.w2_bias[expert] if self.moe.has_bias else None
            gate, up = F.linear(expert_input[start:stop], layer.w13_weight[expert], w13_bias).chunk(2, dim=-1)
            output[start:stop] = F.linear(activation(gate) * up, layer.w2_weight[expert], w2_bias)
        return output
