"""The whole path of a token through one MoE layer. Read this file first.

stage      takes                                     returns                                   code
router     tokens of this rank                       topk_weights and topk_ids of each token   the caller's
prepare    tokens of this rank                       tokens that this rank works on            prepare_finalize/
dispatch   tokens that this rank works on            rows of this rank's experts               dispatch/
experts    rows of this rank's experts               rows of this rank's experts               the caller's
combine    rows of this rank's experts               tokens that this rank works on            dispatch/
finalize   tokens that this rank works on            tokens of this rank                       prepare_finalize/

dispatch returns a handle, and combine undoes the dispatch of that handle. prepare and finalize are the same kind of pair.
The router runs before prepare, since the choice of an expert takes up to 8 bytes. Router logits take 4 bytes for every expert.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_npu.core.limits import QuantMode
from vllm_npu.core.step_plan import StepPlan
from vllm_npu.device import ops_of
from vllm_npu.strategies.dispatch.base import Dispatcher, RoutedTokens
from vllm_npu.strategies.dispatch.fused_mc2 import FusedExperts, FusedMC2
from vllm_npu.strategies.prepare_finalize.base import Finalized, PrepareAndFinalize

ExpertsFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""experts(expert_input, tokens_per_expert, dynamic_scales) -> [rows, width].

expert_input: [rows, hidden_size], the rows of the first expert first. tokens_per_expert: [num_local_experts].
dynamic_scales: [rows] float32 where the rows are int8, else None.
"""


@dataclass(frozen=True, slots=True)
class MoEPipeline:
    """One strategy: a prepare/finalize and a dispatcher. It keeps no state of a call, so micro-batches may interleave."""

    prepare_finalize: PrepareAndFinalize
    dispatcher: Dispatcher

    def run(
        self,
        hidden_states: torch.Tensor,  # [step.input_rows, hidden_size]
        topk_weights: torch.Tensor,  # [step.input_rows, top_k] float32, or narrower: the same dtype on all ranks
        topk_ids: torch.Tensor,  # [step.input_rows, top_k] int32 or int64, global expert ids
        experts: ExpertsFunction,
        step: StepPlan,
        *,
        reduce_results: bool = True,
        meanwhile: Callable[[], None] | None = None,  # runs while the tokens travel to their experts
    ) -> Finalized:
        """Return the routed experts' output for this rank's tokens. COLLECTIVE: the cost is the sum of the stages' costs.

        After an error of `experts` or `meanwhile` the dispatch is abandoned: see Dispatcher.abandon.
        """
        per_token: tuple[torch.Tensor, ...] = (topk_weights, topk_ids)
        if self.prepare_finalize.gathers_tokens and self.dispatcher.quant_mode is not QuantMode.NONE:
            hidden_states, dynamic_scales = ops_of(hidden_states).npu_dynamic_quant(hidden_states)
            per_token += (dynamic_scales,)
        prepared = self.prepare_finalize.prepare(hidden_states, per_token, step)
        tokens = RoutedTokens.of(prepared)
        if meanwhile is None:
            dispatched = self.dispatcher.dispatch(tokens)
        else:
            pending = self.dispatcher.dispatch_start(tokens)
            try:
                meanwhile()
            except BaseException:
                self.dispatcher.abandon(
                    pending.finish().handle
                )  # finished first: other ranks may be receiving the rows
                raise
            dispatched = pending.finish()
        with self.dispatcher.scope(dispatched.handle):
            expert_output = experts(dispatched.expert_input, dispatched.tokens_per_expert, dispatched.dynamic_scales)
            routed_output = self.dispatcher.combine(expert_output, dispatched.handle)
        return self.prepare_finalize.finalize(routed_output, prepared.handle, reduce_results=reduce_results)


@dataclass(frozen=True, slots=True)
class FusedPipeline:
    """A strategy whose operator dispatches, computes the experts and combines. It keeps no state of a call."""

    prepare_finalize: PrepareAndFinalize
    fused: FusedMC2

    def run(
        self,
        hidden_states: torch.Tensor,  # [step.input_rows, hidden_size]
        topk_weights: torch.Tensor,  # [step.input_rows, top_k]
        topk_ids: torch.Tensor,  # [step.input_rows, top_k] int32 or int64, global expert ids
        experts: FusedExperts,
        step: StepPlan,
        *,
        reduce_results: bool = True,
    ) -> tuple[Finalized, torch.Tensor]:
        """Return the routed experts' output for this rank's tokens, and the rows of each expert of this rank. COLLECTIVE."""
        prepared = self.prepare_finalize.prepare(hidden_states, (topk_weights, topk_ids), step)
        routed_output, tokens_per_expert = self.fused.run(RoutedTokens.of(prepared), experts)
        finalized = self.prepare_finalize.finalize(routed_output, prepared.handle, reduce_results=reduce_results)
        return finalized, tokens_per_expert
