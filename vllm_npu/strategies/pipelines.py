"""The pipelines of one set of groups: each is built once, and all MoE layers share it."""

from vllm_npu.core.limits import QuantMode
from vllm_npu.strategies.pipeline import MoEPipeline
from vllm_npu.strategies.select import build
from vllm_npu.transport.base import Groups


class Pipelines:
    """Builds a pipeline when it is first asked for, and keeps it. A pipeline has no state of a call, so layers may share it."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self._built: dict[tuple[str, int, QuantMode, int], MoEPipeline] = {}

    def get(
        self,
        strategy: str,
        num_experts: int,
        quant_mode: QuantMode = QuantMode.NONE,
        shared_expert_ranks: int = 0,
    ) -> MoEPipeline:
        """The pipeline of a strategy. LOCAL. Raises UnsupportedConfigError as select.build does."""
        key = strategy, num_experts, quant_mode, shared_expert_ranks
        if key not in self._built:
            self._built[key] = build(strategy, self.groups, num_experts, quant_mode, shared_expert_ranks)
        return self._built[key]
