"""Functions that a running engine's workers offer through vLLM's collective_rpc."""

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
    """Methods that vLLM adds to its worker class: our platform names this class as worker_extension_cls."""

    vllm_config: "VllmConfig"  # set by vLLM's worker
    model_runner: Any  # set by vLLM's worker

    def set_moe_comm(self, name: str) -> None:
        """Change the strategy of a running engine: `llm.collective_rpc("set_moe_comm", args=("all2all",))`.

        LOCAL. The strategy changes at the first step at which all ranks propose the same name. Raises UnsupportedConfigError
        for a strategy that cannot run on this topology, and InvalidInputError if the worker has no MoE layer of vllm_npu.
        """
        _planner(self.vllm_config).propose(name)

    def moe_comm_counters(self) -> dict[str, Any]:
        """What this rank did since the last call, and its strategy. LOCAL. Raises InvalidInputError as set_moe_comm does.

        Always: steps, tokens and runs of MoE layers. With VLLM_NPU_COUNT_COLLECTIVES=1 also collectives and bytes sent. With
        moe_comm=compare also the layer calls whose outputs differ. With EPLB also rearrangements and experts received.
        """
        planner = _planner(self.vllm_config)
        counter = collective_counter() or CollectiveCounter()
        calls, sent = counter.calls - planner.calls_reported, counter.bytes_sent - planner.bytes_reported
        planner.calls_reported, planner.bytes_reported = Counter(counter.calls), Counter(counter.bytes_sent)
        report: dict[str, Any] = {
            "strategy": planner.selection.strategy if planner.selection else None,
            "reason": planner.selection.reason if planner.selection else None,
            "steps": planner.steps,
            "moe_layer_calls": planner.steps * planner.num_layers,
            "tokens": planner.tokens,
            "calls": dict(calls),
            "bytes_sent": sent.total(),
        }
        report |= {name: take() for name, take in planner.more_counters.items()}
        moved_experts = compat.current().eplb_report(self.model_runner)
        if moved_experts is not None:
            report["eplb"] = moved_experts
        planner.steps = planner.tokens = 0
        return report


def _planner(vllm_config: "VllmConfig") -> StepPlanner:
    planner = planner_of(vllm_config)
    if planner is None:
        raise InvalidInputError(
            "this worker has no MoE layer of vllm_npu: the model is dense, or runs without expert and data parallelism"
        )
    return planner
