"""A token's whole path. Read this first.

topk_weights, topk_ids     the router's choice, made before anything is gathered: 8 bytes a choice in place of 4 an expert
prepare                    tokens of this rank      -> tokens it works on        (prepare_finalize/)
dispatch                   tokens it works on       -> rows of its experts       (dispatch/)
experts                    rows of its experts      -> rows of its experts       (the caller's)
combine                    the inverse of dispatch, from its handle
finalize                   the inverse of prepare, from its handle
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_npu.core.limits import QuantMode
from vllm_npu.core.step_plan import StepPlan
from vllm_npu.device import ops_of
from vllm_npu.strategies.dispatch.base import Dispatcher, RoutedTokens
from vllm_npu.strategies.prepare_finalize.base import Finalized, PrepareAndFinalize

ExpertsFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(expert_input [rows, hidden_size] expert-major, tokens_per_expert [num_local_experts], dynamic_scales [rows] float32 where
rows are int8, else None) -> [rows, width]."""


@dataclass(frozen=True, slots=True)
class MoEPipeline:
    """A strategy: one prepare/finalize and one dispatcher. No state of any call, so micro-batches may interleave."""

    prepare_finalize: PrepareAndFinalize
    dispatcher: Dispatcher

    def run(
        self,
        hidden_states: torch.Tensor,  # [step.input_rows, hidden_size]
        topk_weights: torch.Tensor,  # [step.input_rows, top_k] float32
        topk_ids: torch.Tensor,  # [step.input_rows, top_k] int32 or int64, global expert ids
        experts: ExpertsFunction,
        step: StepPlan,
        *,
        reduce_results: bool = True,
        meanwhile: Callable[[], None] | None = None,  # what may run while the tokens travel to their experts
    ) -> Finalized:
        """The routed experts' output for this rank's tokens. COLLECTIVE: the sum of its stages' costs."""
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
            meanwhile()
            dispatched = pending.finish()
        expert_output = experts(dispatched.expert_input, dispatched.tokens_per_expert, dispatched.dynamic_scales)
        routed_output = self.dispatcher.combine(expert_output, dispatched.handle)
        return self.prepare_finalize.finalize(routed_output, prepared.handle, reduce_results=reduce_results)
