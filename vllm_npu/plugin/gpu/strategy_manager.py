"""A strategy of this package as vLLM's all2all manager on GPUs: vLLM's own experts compute on what dispatch brings.

vLLM asks a manager where data parallelism is on; without it every tensor-parallel rank holds all tokens and computes its own
experts' share, and nothing is exchanged.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.v1.worker.ubatching import dbo_current_ubatch_id

from vllm_npu import __version__
from vllm_npu.all2all import All2AllManager
from vllm_npu.core.limits import NVLINK, PORTABLE, MoELayer
from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.errors import HandleMismatchError, InvalidInputError, UnsupportedConfigError
from vllm_npu.strategies.dispatch.base import DispatchHandle, RoutedTokens
from vllm_npu.strategies.dispatch.symmetric import SlotHandle, SymmetricDispatcher
from vllm_npu.strategies.dispatch.symmetric_layout import why_not_symmetric
from vllm_npu.strategies.pipeline import MoEPipeline
from vllm_npu.strategies.prepare_finalize.base import PrepareHandle
from vllm_npu.strategies.select import Selection, build, check_strategy, select
from vllm_npu.strategies.table import AUTO
from vllm_npu.transport.base import Groups
from vllm_npu.transport.gloo import GlooTransport
from vllm_npu.transport.symmetric_memory import gather_facts
from vllm_npu.trust.agreement import agree

if TYPE_CHECKING:
    import torch.distributed as dist

logger = init_logger("vllm.npu.strategy_manager")


@dataclass(frozen=True, slots=True)
class _InFlight:
    pipeline: MoEPipeline
    prepared: PrepareHandle
    dispatched: SlotHandle | DispatchHandle | None  # None: tokens were gathered


class StrategyAll2AllManager(All2AllManager):
    """`strategy`: a name of strategies.ALL_STRATEGIES, or auto. The constructor is COLLECTIVE over EP.

    Experts get rows with global ids. Rows that no expert of this rank takes have an id of another rank, so that vLLM's experts
    leave them out: slots that nobody filled (symmetric), and rows past the last expert's (mc2, all2all).
    """

    def __init__(
        self, groups: Groups, cpu_group: "dist.ProcessGroup", *, strategy: str, num_experts: int, graphs: bool
    ) -> None:
        super().__init__(groups, list, cpu_group)
        self.strategy, self.num_experts = strategy, num_experts
        agree(
            f"vllm_npu {__version__}, {groups.topology}, moe_comm {strategy}, {num_experts} experts, graphs {graphs}",
            GlooTransport(cpu_group, "ep-vote"),
        )
        reason = why_not_symmetric(gather_facts(groups.ep), tokens_per_rank=1)
        if reason is not None and strategy == "symmetric":
            raise UnsupportedConfigError(f"moe_comm symmetric cannot run here: {reason}; choose allgather")
        limits = NVLINK if reason is None else PORTABLE
        self.limits = replace(limits, all2all=False) if graphs and strategy == AUTO else limits
        check_strategy(strategy, groups.topology, device=self.limits)
        self.selection: Selection | None = None
        self._pipelines: dict[str, MoEPipeline] = {}
        self._in_flight: dict[int, _InFlight] = {}
        self._step: tuple[Any, StepPlan] | None = None
        topology = groups.topology
        self._first_expert = topology.ep_rank * (num_experts // topology.ep_size)
        self._foreign_expert = (topology.ep_rank + 1) % topology.ep_size * (num_experts // topology.ep_size)

    def dispatch(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: list[torch.Tensor] | None = None,
    ) -> tuple[Any, ...]:
        """The strategy's prepare and dispatch. Tensors of the symmetric strategy are views, good until combine."""
        step = self._plan(is_sequence_parallel)
        layer = MoELayer(
            num_experts=self.num_experts,
            top_k=topk_ids.shape[1],
            hidden_size=hidden_states.shape[1],
            dtype=hidden_states.dtype,
        )
        name = self._select(step, layer)
        pipeline = self._pipeline(name)
        extra = tuple(extra_tensors or ())
        gathers = pipeline.prepare_finalize.gathers_tokens
        if not gathers:
            self._check_exchanging(name, step, extra)
        prepared = pipeline.prepare_finalize.prepare(hidden_states, (topk_weights, topk_ids, *extra), step)
        weights, ids, *scales = prepared.per_token
        rows = prepared.hidden_states
        if gathers:  # fields of one message, and vLLM's experts take rows that lie close
            rows, weights, ids, *scales = (x.contiguous() for x in (rows, weights, ids, *scales))
        handle: SlotHandle | DispatchHandle | None = None
        if name == "symmetric":
            sent_scales = scales[0] if scales else None
            slots = _symmetric(pipeline).dispatch_slots(rows, weights, ids, prepared.mask, sent_scales)
            rows, weights, handle = slots.hidden_states, slots.topk_weights, slots.handle
            ids = torch.where(slots.topk_ids < 0, self._foreign_expert, slots.topk_ids + self._first_expert)
            scales = [] if slots.scales is None else [slots.scales]
        elif not gathers:
            dispatched = pipeline.dispatcher.dispatch(RoutedTokens.of(prepared))
            rows, handle = dispatched.expert_input, dispatched.handle
            ids = self._ids_of_rows(rows.shape[0], dispatched.tokens_per_expert)
            weights = torch.ones_like(ids, dtype=torch.float32)
        self._in_flight[dbo_current_ubatch_id()] = _InFlight(pipeline, prepared.handle, handle)
        return (rows, weights, ids) if extra_tensors is None else (rows, weights, ids, scales)

    def combine(self, hidden_states: torch.Tensor, is_sequence_parallel: bool = False) -> torch.Tensor:
        """The strategy's combine and finalize, for the dispatch of the same micro-batch. A sum over TP that is missing
        (allgather and naive without sequence parallelism) is vLLM's to make."""
        sent = self._in_flight.pop(dbo_current_ubatch_id(), None)
        if sent is None:
            raise HandleMismatchError("StrategyAll2AllManager.combine without a dispatch in this micro-batch")
        output = hidden_states
        if isinstance(sent.dispatched, SlotHandle):
            output = _symmetric(sent.pipeline).combine_slots(hidden_states, sent.dispatched)
        elif sent.dispatched is not None:
            output = sent.pipeline.dispatcher.combine(hidden_states, sent.dispatched)
        return sent.pipeline.prepare_finalize.finalize(output, sent.prepared, reduce_results=False).hidden_states

    def destroy(self) -> None:
        """Close what strategies opened: the symmetric windows."""
        while self._pipelines:
            _, pipeline = self._pipelines.popitem()
            if isinstance(pipeline.dispatcher, SymmetricDispatcher):
                pipeline.dispatcher.close()

    def _plan(self, is_sequence_parallel: bool) -> StepPlan:
        dp_metadata = get_forward_context().dp_metadata
        if dp_metadata is None:
            raise InvalidInputError("an all2all manager ran in a step that counts no tokens across data-parallel ranks")
        if self._step is None or self._step[0] is not dp_metadata:
            sharding = TokenSharding.SLICED_OVER_TP if is_sequence_parallel else TokenSharding.REPLICATED
            counts = tuple(dp_metadata.num_tokens_across_dp_cpu.tolist())
            self._step = (dp_metadata, StepPlan(num_tokens_across_dp=counts, sharding=sharding))
        return self._step[1]

    def _select(self, step: StepPlan, layer: MoELayer) -> str:
        selection = select(self.strategy, self.groups.topology, step, layer=layer, device=self.limits)
        if self.selection is None or self.selection.strategy != selection.strategy:
            if self.rank == 0:
                logger.info(
                    "MoE communication: %s on %s (%s)", selection.strategy, self.groups.topology, selection.reason
                )
            self.selection = selection
        return selection.strategy

    def _pipeline(self, name: str) -> MoEPipeline:
        if name not in self._pipelines:
            self._pipelines[name] = build(name, self.groups, self.num_experts)
        return self._pipelines[name]

    def _check_exchanging(self, name: str, step: StepPlan, extra: tuple[torch.Tensor, ...]) -> None:
        if step.sharding is TokenSharding.REPLICATED and self.groups.topology.tp_size > 1:
            raise UnsupportedConfigError(
                f"{name} completes the sum over TP, and vLLM would add it up again for this model, whose tokens are replicated "
                "over TP; choose allgather or naive, or set --tensor-parallel-size 1"
            )
        if extra and (name != "symmetric" or len(extra) > 1):
            raise UnsupportedConfigError(
                f"{name} does not send what quantised experts need beside their rows; choose symmetric (one tensor of scales), "
                "allgather or naive"
            )
        if name == "all2all" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise UnsupportedConfigError(
                "all2all reads sizes on the host, no CUDA graph can hold it; set --enforce-eager"
            )

    def _ids_of_rows(self, num_rows: int, tokens_per_expert: torch.Tensor) -> torch.Tensor:
        """[num_rows, 1] int32 for expert-major rows. No host sync."""
        ends = tokens_per_expert.cumsum(0)
        local = torch.searchsorted(ends, torch.arange(num_rows, device=ends.device), right=True)
        ids = torch.where(local < tokens_per_expert.shape[0], local + self._first_expert, self._foreign_expert)
        return ids.to(torch.int32)[:, None]


def _symmetric(pipeline: MoEPipeline) -> SymmetricDispatcher:
    if not isinstance(pipeline.dispatcher, SymmetricDispatcher):
        raise HandleMismatchError(f"slots of a {type(pipeline.dispatcher).__name__}")
    return pipeline.dispatcher
