"""Unquantised experts on a CPU: vLLM's fused kernel, on the rows that dispatch brings."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel
from vllm.model_executor.layers.fused_moe.oracle.unquantized import select_unquantized_moe_backend
from vllm.model_executor.layers.fused_moe.prepare_finalize import make_moe_prepare_and_finalize_no_dp_ep
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from vllm_npu.core.limits import PORTABLE
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin.layer_facts import exchanges_tokens

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts


class CpuUnquantizedFusedMoEMethod(UnquantizedFusedMoEMethod):
    """vLLM's method for unquantised experts. Layers that exchange tokens call compute() in place of apply()."""

    def __init__(self, moe: FusedMoEConfig) -> None:
        if exchanges_tokens(moe) and PORTABLE.experts is not None:
            why_not = PORTABLE.experts.why_not_activation(moe.activation.value, moe.swiglu_limit)
            if why_not is not None:
                raise UnsupportedConfigError(why_not)
        super().__init__(moe)
        if moe.is_lora_enabled:
            # vLLM takes Triton's kernel for the experts of each engine with adapters, and Triton runs on no CPU. Adapters on
            # experts are refused before a process starts, so these experts have none.
            without = replace(moe, is_lora_enabled=False)
            self.unquantized_backend, self.experts_cls = select_unquantized_moe_backend(without)

    def process_weights_after_loading(self, layer: "RoutedExperts") -> None:
        """Pack the weights for vLLM's kernel, also when new weights come into a running engine: vLLM 0.32 forgets it then."""
        is_reload = self.moe_kernel is not None
        super().process_weights_after_loading(layer)
        if is_reload:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    def _init_moe_kernel(self, layer: "RoutedExperts") -> None:
        """Build vLLM's kernel. In a layer that exchanges tokens it is one for rows of this rank: a strategy moves them."""
        if not exchanges_tokens(self.moe):
            super()._init_moe_kernel(layer)
            return
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        experts = self.experts_cls(moe_config=self.moe, quant_config=self.moe_quant_config)
        self.moe_kernel = FusedMoEKernel(make_moe_prepare_and_finalize_no_dp_ep(use_monolithic=False), experts)

    def compute(
        self,
        layer: "RoutedExperts",
        expert_input: torch.Tensor,  # [rows, hidden_size], expert-major
        tokens_per_expert: torch.Tensor,  # [num_local_experts] int64
    ) -> torch.Tensor:  # [rows, hidden_size]; rows past sum(tokens_per_expert) are undefined
        """Run each row through its expert. LOCAL, one operator. Host sync: no, the device is the host."""
        output = torch.empty_like(expert_input, memory_format=torch.contiguous_format)
        experts = torch.arange(tokens_per_expert.shape[0], dtype=torch.int32).repeat_interleave(tokens_per_expert)
        used = experts.shape[0]
        if not used:
            return output
        assert self.moe_kernel is not None
        nothing = output.new_empty(0)
        self.moe_kernel.fused_experts.apply(
            output[:used],
            expert_input[:used].contiguous(),
            layer.w13_weight,
            layer.w2_weight,
            topk_weights=torch.ones(used, 1),
            topk_ids=experts.unsqueeze(1),  # each row has one expert, by its place on this rank
            activation=layer.activation,
            global_num_experts=tokens_per_expert.shape[0],
            expert_map=None,
            a1q_scale=None,
            a2_scale=None,
            workspace13=nothing,
            workspace2=nothing,
            expert_tokens_meta=None,
            apply_router_weight_on_input=False,
        )
        return output
