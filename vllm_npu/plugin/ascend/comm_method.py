"""vllm-ascend's contract of a MoE communication method, with our pipeline inside."""

from typing import Any

import torch
from vllm_ascend.ops.fused_moe.moe_comm_method import FusedExpertsResult, MoECommMethod
from vllm_ascend.ops.fused_moe.moe_runtime_args import (
    MoEFusedExpertsInput,
    MoEPrepareOutput,
    MoETokenDispatchOutput,
    build_mlp_compute_input,
)
from vllm_ascend.quantization.quant_type import QuantType

from vllm_npu.core.limits import QuantMode
from vllm_npu.plugin import compat
from vllm_npu.plugin.forward_context import current_step
from vllm_npu.plugin.groups import model_groups, trace_ring
from vllm_npu.strategies.pipeline import MoEPipeline
from vllm_npu.strategies.select import build

_PIPELINES: dict[tuple[str, bool, int, QuantMode], MoEPipeline] = {}


class PipelineCommMethod(MoECommMethod):
    """The layer calls prepare, then its router and experts' method, which calls fused_experts, then finalize.

    All moving happens in fused_experts, when the routing is known: 8 bytes a chosen expert travel with a token in place of
    its router logits. prepare and finalize pass through. No state of a call; one object serves all layers.
    """

    def __init__(self, theirs: MoECommMethod) -> None:
        # Not the base's constructor, which makes dispatchers of vllm-ascend's. Its own stay, for whoever lists them.
        self.moe_config = theirs.moe_config
        self.token_dispatcher = theirs.token_dispatcher
        self.prepare_finalize = theirs.prepare_finalize
        self.use_fusion_ops = theirs.use_fusion_ops

    def prepare(
        self,
        hidden_states: torch.Tensor,  # [num_tokens, hidden_size], this TP rank's slice under flashcomm1
        router_logits: torch.Tensor,  # [num_tokens, num_experts]
        enable_shared_expert_dp: bool = False,
        replace_allreduce: bool = False,
        quant_type: QuantType = QuantType.NONE,
    ) -> MoEPrepareOutput:
        """The inputs as they are. LOCAL."""
        return MoEPrepareOutput(hidden_states, router_logits, mc2_mask=None, padded_hidden_states_shape=None)

    def finalize(
        self,
        hidden_states: torch.Tensor,
        reduce_results: bool,
        padded_hidden_states_shape: torch.Size | None = None,
    ) -> torch.Tensor:
        """The input as it is. LOCAL."""
        return hidden_states

    def fused_experts(self, fused_experts_input: MoEFusedExpertsInput) -> FusedExpertsResult:
        """Prepare, dispatch, experts, combine and finalize by the strategy of the step. COLLECTIVE over its groups."""
        call = _ExpertsCall(self, fused_experts_input)
        hidden_states, topk_weights = fused_experts_input.hidden_states, fused_experts_input.topk_weights
        topk_ids = fused_experts_input.topk_ids
        if fused_experts_input.routing.log2phy is not None:
            topk_ids = fused_experts_input.routing.log2phy[topk_ids]
        if fused_experts_input.routing.apply_router_weight_on_input:
            hidden_states = hidden_states * topk_weights.to(hidden_states.dtype)  # top_k is 1 then
            topk_weights = torch.ones_like(topk_weights)
        step = current_step()
        if (ring := trace_ring()) is not None:
            ring.enter_layer()
        before_dispatch = torch.get_device_module(hidden_states.device).current_stream().record_event()
        quant_mode = compat.current().QUANT_MODES[fused_experts_input.quant.quant_type]
        finalized = self._pipeline(step.strategy, quant_mode).run(
            hidden_states, topk_weights.float(), topk_ids, call.compute, step.plan, reduce_results=False
        )
        return FusedExpertsResult(
            routed_out=finalized.hidden_states,
            before_dispatch_evt=before_dispatch,
            before_gmm2_evt=call.before_gmm2,
            before_combine_evt=call.before_combine,
            group_list_type=COUNTS,
            expert_tokens=call.tokens_per_expert,
            swiglu_limit=fused_experts_input.swiglu_limit,
        )

    def _pipeline(self, strategy: str, quant_mode: QuantMode) -> MoEPipeline:
        use_ep, num_experts = bool(self.moe_config.use_ep), int(self.moe_config.num_experts)
        key = strategy, use_ep, num_experts, quant_mode
        if key not in _PIPELINES:
            _PIPELINES[key] = build(strategy, model_groups(expert_parallel=use_ep), num_experts, quant_mode)
        return _PIPELINES[key]

    def _get_token_dispatcher(self) -> Any:
        return self.token_dispatcher

    def _get_prepare_finalize(self) -> Any:
        return self.prepare_finalize


COUNTS = 1  # group_list_type of grouped matmul: one count for each expert, not prefix sums


class _ExpertsCall:
    """vllm-ascend's experts on the rows of one call, and what its layer wants to know of them."""

    def __init__(self, method: PipelineCommMethod, given: MoEFusedExpertsInput) -> None:
        self._method = method
        self._given = given
        self.tokens_per_expert: torch.Tensor | None = None
        self.before_gmm2: Any = None
        self.before_combine: Any = None

    def compute(
        self, expert_input: torch.Tensor, tokens_per_expert: torch.Tensor, dynamic_scales: torch.Tensor | None
    ) -> torch.Tensor:
        """Grouped matmul, activation, grouped matmul: of int8 rows where there are scales."""
        self.tokens_per_expert = tokens_per_expert
        if expert_input.shape[0] == 0:  # the ops take no empty tensors
            return self._given.hidden_states.new_empty(expert_input.shape)
        dispatched = MoETokenDispatchOutput(
            hidden_states=expert_input,
            group_list=tokens_per_expert,
            group_list_type=COUNTS,
            combine_metadata=None,
            dynamic_scale=dynamic_scales,
        )
        output, self.before_gmm2 = self._method._apply_mlp(
            build_mlp_compute_input(
                fused_experts_input=self._given,
                token_dispatch_output=dispatched,
                use_fusion_ops=self._method.use_fusion_ops,
            )
        )
        self.before_combine = torch.get_device_module(expert_input.device).current_stream().record_event()
        return output
