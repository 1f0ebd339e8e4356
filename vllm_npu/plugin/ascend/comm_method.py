"""A communication method for vllm-ascend's MoE layer that runs a pipeline of this package."""

from dataclasses import replace
from typing import Any

import torch

from vllm_npu.core.limits import QuantMode
from vllm_npu.core.step_plan import TokenSharding
from vllm_npu.plugin import compat
from vllm_npu.plugin.ascend.adapters import ExpertAdapters
from vllm_npu.plugin.ascend.config_check import asked_fused_mc2, asked_mc2
from vllm_npu.plugin.forward_context import PlannedStep, current_step
from vllm_npu.plugin.groups import model_pipelines, trace_ring
from vllm_npu.strategies.dispatch.fused_mc2 import FusedExperts
from vllm_npu.strategies.pipelines import Pipelines
from vllm_npu.strategies.table import FUSED_STRATEGIES

RELEASE = compat.current()
COUNTS = 1  # group_list_type of grouped matmul: the list holds one count for each expert, not prefix sums


class PipelineCommMethod(RELEASE.MoECommMethod):  # type: ignore[name-defined]
    """Replaces a communication method of vllm-ascend. One object serves all layers, and keeps no state of a call.

    vllm-ascend's layer calls prepare, then its router, then fused_experts, then finalize. All tokens move in fused_experts,
    because the routing is known there: weights and ids (up to 8 bytes for each chosen expert) travel instead of router logits.
    prepare and finalize return their input.
    """

    moe_config: Any
    token_dispatcher: Any
    prepare_finalize: Any

    def __init__(self, theirs: Any) -> None:
        # The base's constructor is not called: it builds new dispatchers. Code of vllm-ascend that reads the attributes gets
        # the objects of the method that this one replaces.
        RELEASE.take_attributes(self, theirs)
        self.prepare_finalize = _OwnTokenIds(theirs.prepare_finalize)
        self._asked = asked_mc2()

    def prepare(
        self,
        hidden_states: torch.Tensor,  # [num_tokens, hidden_size], this TP rank's slice under flashcomm1
        router_logits: torch.Tensor,  # [num_tokens, num_experts]
        *layout: Any,
        **more_layout: Any,
    ) -> Any:
        """Return the inputs as they are. LOCAL. The two lines of vllm-ascend pass other flags of the layout."""
        return RELEASE.MoEPrepareOutput(hidden_states, router_logits, mc2_mask=None, padded_hidden_states_shape=None)

    def finalize(
        self,
        hidden_states: torch.Tensor,
        reduce_results: bool,
        padded_hidden_states_shape: torch.Size | None = None,
    ) -> torch.Tensor:
        """Return the input as it is. LOCAL."""
        return hidden_states

    def pad_and_split_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the token ids as they are, for routing by a hash of them. LOCAL. vllm-ascend's router takes its slice."""
        return input_ids

    def fused_experts(self, fused_experts_input: Any, quant_method: Any = None) -> Any:
        """Run the pipeline of the step's strategy around vllm-ascend's experts. COLLECTIVE over the strategy's groups.

        With tables of replicas (log2phy) and a strategy that gathers replicated tokens, one broadcast over tp comes before.

        `quant_method` computes the experts on vllm-ascend 0.30, and 0.23 passes none.
        """
        step, rows = current_step(), fused_experts_input.hidden_states.shape[0]
        topology = step.groups.topology
        adapters = RELEASE.adapters_of(fused_experts_input)
        if adapters is not None:
            fused_experts_input = replace(fused_experts_input, topk_ids=adapters.ids(fused_experts_input.topk_ids))
        planned = step.plan.input_rows(topology)
        all_real = step.plan.sharding is TokenSharding.REPLICATED or step.plan.divides_over_tp(topology.tp_size)
        if not (0 < rows < planned and all_real and RELEASE.in_draft_step()):
            return self._fused_experts(fused_experts_input, quant_method, step, adapters)
        # A drafter predicts its second token and those after it in the step of its first one, with one row for each request.
        # Other data-parallel ranks know the planned number only, so rows are repeated up to it.
        repeated = torch.arange(planned, device=fused_experts_input.hidden_states.device) % rows
        names = ("hidden_states", "topk_weights", "topk_ids")
        filled = replace(fused_experts_input, **{name: getattr(fused_experts_input, name)[repeated] for name in names})
        result = self._fused_experts(filled, quant_method, step, adapters)
        return replace(result, routed_out=result.routed_out[:rows].clone())

    def _fused_experts(
        self, fused_experts_input: Any, quant_method: Any, step: PlannedStep, adapters: ExpertAdapters | None
    ) -> Any:
        """fused_experts for as many rows as the step planned. With adapters, the ids are those of experts and adapters."""
        hidden_states, topk_weights = fused_experts_input.hidden_states, fused_experts_input.topk_weights
        if fused_experts_input.routing.apply_router_weight_on_input:
            hidden_states = hidden_states * topk_weights.to(hidden_states.dtype)  # top_k is 1 then
            topk_weights = torch.ones_like(topk_weights)
        pipelines = model_pipelines(expert_parallel=bool(self.moe_config.use_ep))
        num_experts = RELEASE.local_experts(self, fused_experts_input) * max(int(self.moe_config.ep_size), 1)
        quant_mode = RELEASE.QUANT_MODES[fused_experts_input.quant.quant_type]
        if adapters is not None:
            num_experts *= adapters.places
        if step.strategy in FUSED_STRATEGIES:
            tokens = hidden_states, topk_weights
            return _fused(fused_experts_input, quant_method, tokens, step, pipelines, num_experts, quant_mode)
        pipeline = pipelines.get(step.strategy, num_experts, quant_mode, self._asked)
        topk_ids, by_own_table = RELEASE.replicas_of(fused_experts_input)
        replicated = step.plan.sharding is TokenSharding.REPLICATED
        if by_own_table and pipeline.prepare_finalize.gathers_tokens and replicated:
            # Each TP rank computes its share of the same tokens. So all must choose the same replicas.
            topk_ids = pipelines.groups.tp.broadcast(topk_ids, 0)
        if (ring := trace_ring()) is not None:
            ring.enter_layer()
        call = _ExpertsCall(self, fused_experts_input, quant_method, adapters)
        before_dispatch = call.stream.record_event()
        finalized = pipeline.run(hidden_states, topk_weights, topk_ids, call.compute, step.plan, reduce_results=False)
        return RELEASE.experts_result(
            fused_experts_input,
            after_dispatch=call.after_dispatch,
            routed_out=finalized.hidden_states,
            before_dispatch_evt=before_dispatch,
            before_gmm2_evt=call.before_gmm2,
            before_combine_evt=call.before_combine,
            group_list_type=COUNTS,
            expert_tokens=call.tokens_per_expert,
        )

    def _get_token_dispatcher(self) -> Any:
        return self.token_dispatcher

    def _get_prepare_finalize(self) -> Any:
        return self.prepare_finalize


class _OwnTokenIds:
    """Stands for vllm-ascend's prepare and finalize, of which the router asks the token ids of the rows that it routes.

    These are this rank's own rows, since all tokens move after the router.
    """

    def __init__(self, theirs: Any) -> None:
        self._theirs = theirs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._theirs, name)

    def all_gather_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The ids of the rows that prepare returns: all, or this TP rank's slice, the last one filled up with -1. LOCAL."""
        step = current_step()
        topology = step.groups.topology
        rows = step.plan.input_rows(topology)
        if step.plan.sharding is TokenSharding.REPLICATED or input_ids.shape[0] == rows:
            return input_ids
        filled = torch.nn.functional.pad(input_ids, (0, rows * topology.tp_size - input_ids.shape[0]), value=-1)
        return filled[topology.tp_rank * rows : (topology.tp_rank + 1) * rows]

    all_gather_input_id_with_dp_group = all_gather_input_ids  # its name in vllm-ascend 0.23


def _fused(
    given: Any,  # MoEFusedExpertsInput
    quant_method: Any,
    tokens: tuple[torch.Tensor, torch.Tensor],  # hidden states, and weights of their experts
    step: PlannedStep,
    pipelines: Pipelines,
    num_experts: int,
    quant_mode: QuantMode,
) -> Any:
    """Run the fused operator on the weights that vllm-ascend prepared for it. COLLECTIVE over ep, and over tp where tokens are
    replicated. vllm-ascend runs no shared experts beside the operator, so there is no event to record."""
    hidden_states, topk_weights = tokens
    topk_ids, _ = RELEASE.replicas_of(given)
    asked = asked_fused_mc2()
    assert asked is not None  # the planner takes the strategy only then
    weights = RELEASE.fused_weights(given, quant_method)
    experts = FusedExperts(
        w1=weights.w1,
        w2=weights.w2,
        scale1=weights.w1_scale,
        scale2=weights.w2_scale,
        bias1=weights.w1_scale_bias,
        bias2=weights.w2_scale_bias,
        swiglu_limit=RELEASE.swiglu_limit(given),
        max_rows=asked.max_rows,
    )
    if (ring := trace_ring()) is not None:
        ring.enter_layer()
    finalized, tokens_per_expert = pipelines.get_fused(asked.operator, num_experts, quant_mode).run(
        hidden_states, topk_weights, topk_ids, experts, step.plan, reduce_results=False
    )
    return RELEASE.experts_result(
        given,
        after_dispatch=None,
        routed_out=finalized.hidden_states,
        group_list_type=COUNTS,
        expert_tokens=tokens_per_expert,
    )


class _ExpertsCall:
    """vllm-ascend's experts in one call of fused_experts. Keeps the events and counts that FusedExpertsResult returns."""

    def __init__(
        self, method: PipelineCommMethod, given: Any, quant_method: Any, adapters: ExpertAdapters | None
    ) -> None:
        self._method = method
        self._adapters = adapters
        self._given = given
        self._quant_method = quant_method
        self.stream = torch.get_device_module(given.hidden_states.device).current_stream()
        self.after_dispatch: Any = None
        self.tokens_per_expert: torch.Tensor | None = None
        self.before_gmm2: Any = None
        self.before_combine: Any = None

    def compute(
        self, expert_input: torch.Tensor, tokens_per_expert: torch.Tensor, dynamic_scales: torch.Tensor | None
    ) -> torch.Tensor:
        """Run grouped matmul, activation, grouped matmul. The rows are int8 if dynamic_scales is given. LOCAL."""
        if self._adapters is None:
            return self._compute(expert_input, tokens_per_expert, dynamic_scales)
        tokens_per_expert, real = self._adapters.take(tokens_per_expert)
        output = self._compute(expert_input[:real], tokens_per_expert, dynamic_scales)
        return torch.nn.functional.pad(output, (0, 0, 0, expert_input.shape[0] - real))

    def _compute(
        self, expert_input: torch.Tensor, tokens_per_expert: torch.Tensor, dynamic_scales: torch.Tensor | None
    ) -> torch.Tensor:
        self.tokens_per_expert = tokens_per_expert
        if RELEASE.READS_AFTER_DISPATCH or expert_input.shape[0] == 0:
            self.after_dispatch = self.stream.record_event()
        if expert_input.shape[0] == 0:  # the ops refuse empty tensors
            self.before_gmm2 = self.before_combine = self.after_dispatch  # the stream of shared experts waits for them
            return self._given.hidden_states.new_empty(expert_input.shape)
        dispatched = {
            "hidden_states": expert_input,
            "group_list": tokens_per_expert,
            "group_list_type": COUNTS,
            "combine_metadata": None,
            "dynamic_scale": dynamic_scales,
        }
        output: torch.Tensor
        output, self.before_gmm2 = RELEASE.compute_experts(self._method, self._given, dispatched, self._quant_method)
        self.before_combine = self.stream.record_event()
        return output
