"""Calls that a served model's workers understand, through vLLM's collective_rpc."""

from collections import Counter
from typing import TYPE_CHECKING, Any

from vllm_npu.errors import InvalidInputError
from vllm_npu.plugin import compat
from vllm_npu.plugin.groups import collective_counter
from vllm_npu.plugin.step_planner import StepPlanner, planner_of
from vllm_npu.trust.recording import CollectiveCounter

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class MoECommWorkerExtension:
    """Mixed into vLLM's worker by our platform."""

    vllm_config: "VllmConfig"  # the worker's
    model_runner: Any  # the worker's

    def set_moe_comm(self, name: str) -> None:
        """Change the strategy of a running engine: `llm.collective_rpc("set_moe_comm", args=("all2all",))`.

        LOCAL; it takes effect at the first step at which all ranks propose the same name. Raises UnsupportedConfigError
        for a name that this topology cannot use.
        """
        _planner(self.vllm_config).propose(name)

    def moe_comm_counters(self) -> dict[str, Any]:
        """What this rank did since the last call: steps, tokens, layers run, and, where VLLM_NPU_COUNT_COLLECTIVES=1,
        collectives and bytes sent; where moe_comm=compare, how many layer calls differed; where experts are balanced,
        rearrangements and experts received. LOCAL."""
        planner = _planner(self.vllm_config)
        counter = collective_counter() or CollectiveCounter()
        calls, sent = counter.calls - planner.calls_reported, counter.bytes_sent - planner.bytes_reported
        planner.calls_reported, planner.bytes_reported = Counter(counter.calls), Counter(counter.bytes_sent)
        report = {
            "strategy": planner.selection.strategy if planner.selection else None,
            "reason": planner.selection.reason if planner.selection else None,
            "steps": planner.steps,
            "moe_layer_calls": planner.steps * planner.num_layers,
            "tokens": planner.tokens,
            "calls": dict(calls),
            "bytes_sent": sent.total(),
        }
        if planner.comparison is not None:
            report["comparison"] = planner.comparison.take()
        balanced = compat.current().eplb_report(self.model_runner)
        if balanced is not None:
            report["eplb"] = balanced
        planner.steps = planner.tokens = 0
        return report


def _planner(vllm_config: "VllmConfig") -> StepPlanner:
    planner = planner_of(vllm_config)
    if planner is None:
        raise InvalidInputError(
            "this worker has no MoE layer of vllm_npu: the model is dense, or runs without expert and data parallelism"
        )
    return planner
