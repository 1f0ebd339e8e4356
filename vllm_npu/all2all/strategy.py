"""A strategy of this package as vLLM's all2all manager on GPUs. vLLM's own experts compute on the rows that dispatch returns.

vLLM calls a manager only with data parallelism. Without it every tensor-parallel rank holds all tokens and computes the share
of its own experts, and no token moves.
"""

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from vllm_npu.all2all.base import All2AllManager, RunningStep, Taken
from vllm_npu.core.handles import Handle
from vllm_npu.core.limits import NVLINK, PORTABLE, MoELayer
from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.errors import HandleMismatchError, UnsupportedConfigError
from vllm_npu.strategies.dispatch.base import RoutedTokens
from vllm_npu.strategies.dispatch.rows_with_ids import RowsWithIds
from vllm_npu.strategies.dispatch.symmetric_layout import why_not_symmetric
from vllm_npu.strategies.pipeline import MoEPipeline
from vllm_npu.strategies.pipelines import Pipelines
from vllm_npu.strategies.prepare_finalize.base import PrepareHandle
from vllm_npu.strategies.select import Selection, check_strategy, select
from vllm_npu.strategies.start_checks import check_inside_vllm
from vllm_npu.strategies.table import AUTO
from vllm_npu.transport.base import Groups
from vllm_npu.transport.symmetric_memory import gather_facts

if TYPE_CHECKING:
    import torch.distributed as dist

logger = logging.getLogger("vllm.npu.all2all.strategy")  # vLLM shows the messages of loggers below "vllm"

CAPTURES = ("mc2", "allgather", "naive", "symmetric")
"""Strategies whose dispatch_with_ids and combine_with_ids a CUDA graph can hold. all2all reads its sizes on the host."""

RowKind = tuple[int, int, torch.dtype]
"""top_k, hidden_size and dtype of a layer's tokens."""


@dataclass(frozen=True, slots=True)
class _InFlight:
    """What combine needs of the dispatch before it."""

    pipeline: MoEPipeline
    prepared: PrepareHandle
    dispatched: Handle


@dataclass(frozen=True, slots=True)
class _Step:
    """The running step, and the strategy of each kind of layer in it."""

    key: object  # of RunningStep
    plan: StepPlan
    strategies: dict[RowKind, str] = field(default_factory=dict)


class StrategyAll2AllManager(All2AllManager):
    """`strategy` is a name of strategies.ALL_STRATEGIES, or auto. The constructor is COLLECTIVE over EP.

    `running` tells what the caller knows of the step. Raises UnsupportedConfigError where no step can take the strategy.
    """

    def __init__(
        self,
        groups: Groups,
        cpu_group: "dist.ProcessGroup",
        *,
        strategy: str,
        num_experts: int,
        running: RunningStep,
    ) -> None:
        super().__init__(groups, list, cpu_group)
        self.strategy, self.num_experts = strategy, num_experts
        reason = why_not_symmetric(gather_facts(groups.ep), tokens_per_rank=1)
        if reason is not None and strategy == "symmetric":
            raise UnsupportedConfigError(f"moe_comm symmetric cannot run here: {reason}; choose allgather")
        self.limits = replace(NVLINK if reason is None else PORTABLE, captures=CAPTURES)
        check_strategy(strategy, groups.topology, device=self.limits)
        self.selection: Selection | None = None  # of the last step with another strategy than before
        self._running = running
        self._layers: dict[RowKind, MoELayer] = {}
        self._pipelines = Pipelines(groups)
        self._in_flight: dict[int, _InFlight] = {}  # by micro-batch
        self._step: _Step | None = None

    def _dispatch(self, tokens: RowsWithIds, is_sequence_parallel: bool) -> RowsWithIds:
        """Run the strategy's prepare and dispatch. Tensors of the symmetric strategy are views, valid until combine."""
        micro_batch = self._running.micro_batch()
        self._abandon(micro_batch)
        step = self._current_step(is_sequence_parallel)
        name = self._strategy_of(step, tokens)
        pipeline = self._pipelines.get(name, self.num_experts)
        check_inside_vllm(
            name,
            replicated_over_tp=step.plan.is_replicated(self.groups.topology.tp_size),
            extra_tensors=len(tokens.extra_tensors),
        )
        per_token = (tokens.topk_weights, tokens.topk_ids, *tokens.extra_tensors)
        prepared = pipeline.prepare_finalize.prepare(tokens.rows, per_token, step.plan)
        extra_tensors = prepared.per_token[2:]
        brought, handle = pipeline.dispatcher.dispatch_with_ids(RoutedTokens.of(prepared), extra_tensors)
        self._in_flight[micro_batch] = _InFlight(pipeline, prepared.handle, handle)
        self._note(Taken(self.strategy, name), captured=step.plan.captured)
        return brought

    def combine(self, hidden_states: torch.Tensor, is_sequence_parallel: bool = False) -> torch.Tensor:
        """Run the strategy's combine and finalize, for the dispatch of the same micro-batch.

        allgather and naive without sequence parallelism leave the sum over TP to vLLM. After an error the dispatch is over: the
        next call must be another dispatch.
        """
        return self._combine(hidden_states, None)

    def combine_into(
        self, hidden_states: torch.Tensor, output: torch.Tensor, is_sequence_parallel: bool = False
    ) -> torch.Tensor:
        """combine into `output`. symmetric writes it without a copy where this rank brought all of its rows without padding."""
        combined = self._combine(hidden_states, output)
        return output if combined is output else output.copy_(combined)

    def _combine(self, hidden_states: torch.Tensor, output: torch.Tensor | None) -> torch.Tensor:
        micro_batch = self._running.micro_batch()
        sent = self._in_flight.get(micro_batch)
        if sent is None:
            raise HandleMismatchError("StrategyAll2AllManager.combine without a dispatch in this micro-batch")
        if output is not None and not (
            output.shape == (sent.prepared.rows, hidden_states.shape[1])
            and output.dtype is hidden_states.dtype
            and output.is_contiguous()
        ):
            output = None
        combined = sent.pipeline.dispatcher.combine_with_ids(hidden_states, sent.dispatched, output)
        del self._in_flight[micro_batch]
        return sent.pipeline.prepare_finalize.finalize(combined, sent.prepared, reduce_results=False).hidden_states

    def allocate_combine_input(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """symmetric gives its window, from which combine takes the rows. Equal on all ranks. Other strategies give None."""
        sent = self._in_flight.get(self._running.micro_batch())
        return None if sent is None else sent.pipeline.dispatcher.combine_input_with_ids(sent.dispatched, shape, dtype)

    def set_num_sms(self, num_sms: int) -> None:
        """Limit the multiprocessors of symmetric from the next dispatch on. LOCAL. Other strategies obey NCCL's variables.

        vLLM's dual batch overlap calls it with VLLM_DBO_COMM_SMS, and after the step with all of the GPU.
        """
        total = torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 0
        self._pipelines.limit_sms(num_sms if num_sms < total else None)

    def max_sms_used(self) -> int | None:
        """The limit of set_num_sms, or None."""
        return self._pipelines.max_sms

    def check_failed(self) -> None:
        """Raise TransportError if the exchange of a step gave up waiting for another rank. LOCAL. Host sync: no."""
        self._pipelines.check_failed()

    def destroy(self) -> None:
        """Give up what is in flight, and close what the strategies opened: the windows of symmetric."""
        for micro_batch in list(self._in_flight):
            self._abandon(micro_batch)
        self._pipelines.close()

    def _abandon(self, micro_batch: int) -> None:
        """Give back what a dispatch holds that had no combine: an error ended the step between the two."""
        left = self._in_flight.pop(micro_batch, None)
        if left is not None:
            logger.warning("An exchange of micro-batch %d had no combine, its buffers are free again", micro_batch)
            left.pipeline.dispatcher.abandon(left.dispatched)

    def _current_step(self, is_sequence_parallel: bool) -> _Step:
        key = self._running.key()
        sharding = TokenSharding.SLICED_OVER_TP if is_sequence_parallel else TokenSharding.REPLICATED
        step = self._step
        if step is None or step.key is not key or step.plan.sharding is not sharding:
            plan = StepPlan(
                num_tokens_across_dp=self._running.num_tokens_across_dp(),
                sharding=sharding,
                captured=self._running.captured(),
            )
            step = self._step = _Step(key, plan)
        return step

    def _strategy_of(self, step: _Step, tokens: RowsWithIds) -> str:
        kind = tokens.topk_ids.shape[1], tokens.rows.shape[1], tokens.rows.dtype
        if kind not in step.strategies:
            step.strategies[kind] = self._select(step.plan, self._layer(kind))
        return step.strategies[kind]

    def _layer(self, kind: RowKind) -> MoELayer:
        if kind not in self._layers:
            top_k, hidden_size, dtype = kind
            self._layers[kind] = MoELayer(
                num_experts=self.num_experts, top_k=top_k, hidden_size=hidden_size, dtype=dtype
            )
        return self._layers[kind]

    def _select(self, plan: StepPlan, layer: MoELayer) -> str:
        selection = select(self.strategy, self.groups.topology, plan, layer=layer, device=self.limits)
        if self.strategy == AUTO and plan.is_replicated(self.groups.topology.tp_size):
            selection = Selection("allgather", "auto: tokens are replicated over TP, and vLLM itself adds up over TP")
        if self.selection is None or self.selection.strategy != selection.strategy:
            if self.rank == 0:
                logger.info(
                    "MoE communication: %s on %s (%s)", selection.strategy, self.groups.topology, selection.reason
                )
            self.selection = selection
        return selection.strategy
