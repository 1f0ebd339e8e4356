"""vLLM's MoE layer on a CPU: routes tokens, then runs the strategy's pipeline and vLLM's shared experts."""

from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.router.fused_moe_router import FusedMoERouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExpertsOrder
from vllm.model_executor.models.transformers.moe import TransformersMoERunner

from vllm_npu.core.limits import PORTABLE
from vllm_npu.core.routing import check_router_logits
from vllm_npu.core.step_plan import TokenSharding
from vllm_npu.core.topology import ExpertPlacement, expert_places
from vllm_npu.eplb.replicas import to_physical
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin.cpu import eplb
from vllm_npu.plugin.cpu.experts import CpuUnquantizedFusedMoEMethod
from vllm_npu.plugin.cpu.routing import router_for_cpu, why_not_used
from vllm_npu.plugin.forward_context import current_step
from vllm_npu.plugin.groups import model_groups, model_pipelines, trace_ring
from vllm_npu.plugin.layer_facts import LayerFacts, exchanges_tokens
from vllm_npu.strategies.pipelines import Pipelines
from vllm_npu.transport.base import Groups


class CpuMoERunner(MoERunner):
    """Layers that exchange tokens run a pipeline of this package. All other layers run as in vLLM, with our router.

    The pipeline runs inside vLLM's opaque custom op, and its output is always complete. So torch.compile sees nothing that
    depends on the strategy, and a step may use another strategy than the traced step.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        vllms_router: FusedMoERouter = self.router  # type: ignore[has-type]
        self.router = router_for_cpu(vllms_router)
        if self.exchanges_tokens:
            self._check_supported()

    @cached_property
    def exchanges_tokens(self) -> bool:
        """Whether this layer's tokens travel to other ranks."""
        return exchanges_tokens(self.moe_config)

    @cached_property
    def facts(self) -> LayerFacts:
        """What the step planner has to know of this layer."""
        sharding = TokenSharding.SLICED_OVER_TP if self.moe_config.is_sequence_parallel else TokenSharding.REPLICATED
        facts = LayerFacts.of(self.moe_config, sharding=sharding, experts=self._quant_method)
        return replace(facts, moe_layer=PORTABLE.placed(facts.moe_layer, self._ep_size))

    @property
    def _ep_size(self) -> int:
        return max(int(self.moe_config.ep_size), 1)

    @cached_property
    def _places(self) -> torch.Tensor | None:  # [num_experts] int32
        """The place of each expert, which stands for the expert in strategies. None: the experts divide over the ranks."""
        experts = int(self.moe_config.num_experts)
        if experts % self._ep_size == 0:
            return None
        return torch.tensor(expert_places(experts, self._ep_size), dtype=torch.int32)

    @property
    def _router_columns(self) -> int:
        """Columns of the router's input to the layer."""
        return int(self.moe_config.num_logical_experts)

    @property
    def _groups(self) -> Groups:
        return model_groups(expert_parallel=self.facts.use_ep)

    @property
    def _pipelines(self) -> Pipelines:
        return model_pipelines(expert_parallel=self.facts.use_ep)

    def _check_supported(self) -> None:
        if not isinstance(self._quant_method, CpuUnquantizedFusedMoEMethod):
            raise UnsupportedConfigError(
                f"{self.layer_name}: {type(self._quant_method).__name__} exchanges tokens itself, and would do so a second "
                "time inside vllm_npu's strategy; serve an unquantised checkpoint, or run without expert and data parallelism"
            )
        why_not = why_not_used(
            self.router,
            weight_on_input=self.routed_experts.apply_router_weight_on_input,
            top_k=int(self.moe_config.experts_per_token),
        )
        if why_not is not None:
            raise UnsupportedConfigError(f"{self.layer_name}: {why_not}")
        if self._fse_fuse_gate:
            raise UnsupportedConfigError(
                f"{self.layer_name}: shared experts fused into the routed ones are not supported with expert or data "
                "parallelism on a CPU"
            )
        ExpertPlacement(self.facts.moe_layer.num_experts, self._ep_size)

    def _select_forward(self) -> Any:
        """vLLM's opaque custom op. On a CPU vLLM itself lets torch.compile look inside the layer."""
        if not self.exchanges_tokens:
            return super()._select_forward()
        return torch.ops.vllm.moe_forward if self._shared_experts is None else torch.ops.vllm.moe_forward_shared

    @property
    def _fused_output_is_reduced(self) -> bool:
        if not self.exchanges_tokens:
            return bool(super()._fused_output_is_reduced)
        return not self.moe_config.skip_final_all_reduce

    def _maybe_reduce_shared_expert_output(
        self, shared_output: torch.Tensor | None, fused_output_is_reduced: bool | None = None
    ) -> torch.Tensor | None:
        """Return the shared output as it is if the layer exchanges tokens: _sum_over_tp has added it up where a sum is due."""
        if not self.exchanges_tokens:
            return super()._maybe_reduce_shared_expert_output(shared_output, fused_output_is_reduced)
        return shared_output

    def _forward_impl(
        self,
        hidden_states: torch.Tensor,  # [num_tokens, hidden_size], a slice of them under sequence parallelism
        router_logits: torch.Tensor,  # [num_tokens, num_experts]; unused if the layer holds the gate
        shared_experts_input: torch.Tensor | None,
        input_ids: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The routed experts' output. With shared experts: (shared output, routed output).

        COLLECTIVE over the strategy's groups, and over tp for a sum that is still missing. Host sync: yes, in the experts.
        """
        if not self.exchanges_tokens:
            output: torch.Tensor | tuple[torch.Tensor, torch.Tensor] = super()._forward_impl(
                hidden_states, router_logits, shared_experts_input, input_ids
            )
            return output
        # COMPAT(vllm 0.32): on a CPU with AMX, vLLM's linear layer of 16-bit weights divides by zero if its input has no rows
        # (weight_packed_linear), and SIGFPE ends the process. CAN REMOVE when that op takes an input without rows.
        has_rows = hidden_states.shape[0] > 0
        if self.gate is not None:
            router_logits = (
                self.gate(hidden_states)[0] if has_rows else hidden_states.new_empty((0, self._router_columns))
            )
        check_router_logits(hidden_states, router_logits, self._router_columns)
        topk_weights, topk_ids = self.router.select_experts(
            hidden_states=hidden_states,
            router_logits=router_logits,
            topk_indices_dtype=torch.int32,
            input_ids=input_ids,
        )
        if self.routed_experts.apply_router_weight_on_input:
            hidden_states = hidden_states * topk_weights.to(hidden_states.dtype)
            topk_weights = torch.ones_like(topk_weights)

        step = current_step()
        topk_ids = self._physical_ids(topk_ids, step.plan.sharding)
        if (ring := trace_ring()) is not None:
            ring.enter_layer(self.layer_name)
        compute_shared = None
        if self._shared_experts is not None and has_rows:
            compute_shared = partial(self._shared_experts, shared_experts_input, SharedExpertsOrder.NO_OVERLAP)
        finalized = self._pipelines.get(step.strategy, self.facts.moe_layer.num_experts).run(
            hidden_states,
            topk_weights,
            topk_ids,
            self._compute_experts,
            step.plan,
            reduce_results=False,
            meanwhile=compute_shared,
        )
        shared = None
        if self._shared_experts is not None:
            shared = (
                self._shared_experts.output
                if has_rows
                else torch.empty_like(hidden_states if shared_experts_input is None else shared_experts_input)
            )
        return self._sum_over_tp(finalized.hidden_states, shared, routed_is_complete=finalized.reduced)

    def _physical_ids(self, topk_ids: torch.Tensor, sharding: TokenSharding) -> torch.Tensor:
        """With EPLB: turn logical expert ids into physical ones, and count the load. Without EPLB: the experts' places.

        On GPUs vLLM's router does this in a Triton kernel. On a CPU it does not.
        """
        layer_state = self.eplb_state
        if layer_state is None:  # EPLB's experts divide over the ranks, so they are their places
            return topk_ids if self._places is None else self._places[topk_ids]
        topology = self._groups.topology
        physical_ids = to_physical(topk_ids, eplb.replica_table(layer_state), topology, sharding)
        eplb.count_load(layer_state, physical_ids, topology, sharding)
        return physical_ids

    def _compute_experts(
        self, expert_input: torch.Tensor, tokens_per_expert: torch.Tensor, _: torch.Tensor | None
    ) -> torch.Tensor:
        output: torch.Tensor = self._quant_method.compute(
            self.routed_experts, expert_input, tokens_per_expert[: self.routed_experts.local_num_experts]
        )
        return output

    def _sum_over_tp(
        self, routed: torch.Tensor, shared: torch.Tensor | None, *, routed_is_complete: bool
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Complete both outputs. COLLECTIVE: at most one all-reduce over tp. Under sequence parallelism both are complete."""
        tp = self._groups.tp
        if not self.moe_config.is_sequence_parallel and tp.size > 1:
            if self.moe_config.skip_final_all_reduce:
                # The caller adds the outputs of all TP ranks up, so only one rank may return a complete output.
                routed = torch.zeros_like(routed) if routed_is_complete and tp.rank > 0 else routed
            elif shared is None:
                routed = routed if routed_is_complete else tp.all_reduce(routed)
            elif routed_is_complete:
                shared = tp.all_reduce(shared)
            else:
                # Flattened, because shared and routed outputs of a latent MoE differ in width. Cloned, because the outputs of
                # vLLM's op must not be views of one storage.
                sums = tp.all_reduce(torch.cat([shared.flatten(), routed.flatten()])).split(
                    [shared.numel(), routed.numel()]
                )
                shared, routed = (
                    part.view_as(whole).clone() for part, whole in zip(sums, (shared, routed), strict=True)
                )
        return routed if shared is None else (shared, routed)


class CpuTransformersMoERunner(TransformersMoERunner, CpuMoERunner):
    """The layer of models on vLLM's transformers backend that choose experts themselves, outside of the layer.

    vLLM hands over the chosen ids in the layer's state, and the weights in place of the logits.
    """

    @property
    def _router_columns(self) -> int:
        return int(self.moe_config.experts_per_token)
