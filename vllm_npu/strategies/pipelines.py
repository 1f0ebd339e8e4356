"""The pipelines of a process: one for all layers that have the same strategy and the same sizes."""

from vllm_npu.core.ascend_recipes import ASKED_NOTHING, FusedOperator, MC2Asked
from vllm_npu.core.limits import QuantMode
from vllm_npu.strategies.pipeline import FusedPipeline, MoEPipeline
from vllm_npu.strategies.select import build, build_fused
from vllm_npu.transport.base import Groups


class Pipelines:
    """Builds the pipelines over `groups` and keeps them. Layers may share a pipeline, since it keeps no state of a call."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.max_sms: int | None = None
        self._pipelines: dict[tuple[str, int, QuantMode, MC2Asked], MoEPipeline] = {}
        self._fused: dict[tuple[FusedOperator, int, QuantMode], FusedPipeline] = {}

    def get(
        self,
        strategy: str,
        num_experts: int,  # over all ranks, redundant ones included
        quant_mode: QuantMode = QuantMode.NONE,
        asked: MC2Asked = ASKED_NOTHING,
    ) -> MoEPipeline:
        """Return the pipeline, and build it at the first call. LOCAL. Raises UnsupportedConfigError as build does."""
        key = strategy, num_experts, quant_mode, asked
        found = self._pipelines.get(key)
        if found is None:
            # Micro-batches may ask from several threads: setdefault returns the same pipeline to all of them.
            found = self._pipelines.setdefault(key, build(strategy, self.groups, num_experts, quant_mode, asked))
            found.dispatcher.max_sms = self.max_sms
        return found

    def limit_sms(self, max_sms: int | None) -> None:
        """Set Dispatcher.max_sms of all pipelines, also of those to come. LOCAL. Equal on all ranks."""
        self.max_sms = max_sms
        for pipeline in tuple(self._pipelines.values()):
            pipeline.dispatcher.max_sms = max_sms

    def get_fused(self, operator: FusedOperator, num_experts: int, quant_mode: QuantMode) -> FusedPipeline:
        """As get, for fused_mc2 with this operator. LOCAL."""
        key = operator, num_experts, quant_mode
        found = self._fused.get(key)
        if found is None:
            found = self._fused.setdefault(key, build_fused(operator, self.groups, num_experts, quant_mode))
        return found

    def check_failed(self) -> None:
        """Raise the error of Dispatcher.check_failed, if a dispatcher has one. LOCAL. Host sync: no. Call it in each step."""
        for pipeline in tuple(self._pipelines.values()):  # a copy: micro-batches of other threads may build pipelines
            pipeline.dispatcher.check_failed()

    def close(self) -> None:
        """Close and forget all pipelines. LOCAL. Safe to call twice. No handle may be in flight."""
        self._fused.clear()  # they open nothing
        while self._pipelines:
            self._pipelines.popitem()[1].dispatcher.close()
