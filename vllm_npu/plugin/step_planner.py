"""Once a step, on every rank: plan it, vote on the plan, and choose the strategy."""

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CUDAGraphMode
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_npu import __version__
from vllm_npu.core.handles import Pending
from vllm_npu.core.step_plan import StepPlan
from vllm_npu.errors import PlanDisagreementError
from vllm_npu.plugin import compat
from vllm_npu.plugin.forward_context import PlannedStep, as_additional_context, running_step
from vllm_npu.plugin.groups import collective_counter, model_groups, trace_ring, vote_transport, watch_groups
from vllm_npu.plugin.layer_facts import LayerFacts
from vllm_npu.plugin.metrics import StepMetrics
from vllm_npu.plugin.options import Options
from vllm_npu.strategies.select import Selection, check_strategy, select, why_not
from vllm_npu.strategies.start_checks import describe_capacity
from vllm_npu.strategies.table import AUTO, STRATEGIES
from vllm_npu.transport.base import Groups
from vllm_npu.trust.agreement import agree_start
from vllm_npu.trust.self_test import OFF, run_self_test

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import DPMetadata

logger = init_logger("vllm.npu.step_planner")  # under "vllm": the names whose messages vLLM shows

PROPOSALS = (AUTO, *STRATEGIES)


class StepPlanner:
    """The choice of this process: what it proposes, what all ranks last agreed on, and what came of it.

    A new proposal takes effect at the first step at which every rank proposes the same; until then the old one stays.
    """

    def __init__(self, vllm_config: "VllmConfig", layers: list[LayerFacts]) -> None:
        self._vllm_config = vllm_config
        options = Options.of(vllm_config)
        self.proposed = options.moe_comm
        self._self_test = options.self_test
        self.selection: Selection | None = None
        self.comparison: Any = None  # of our path with vllm-ascend's, where moe_comm=compare
        self.num_layers = len(layers)
        self.steps = 0
        self.tokens = 0
        self.calls_reported: Counter[str] = Counter()  # of collectives, by moe_comm_counters
        self.bytes_reported: Counter[str] = Counter()
        self._planned = 0  # steps since the start
        self._agreed: str | None = None
        self._vote: Pending[list[int]] | None = None  # under way
        self._sharding = layers[0].sharding
        self._layer = layers[0].moe_layer
        self._topology = model_groups(expert_parallel=layers[0].use_ep).topology
        self._device = compat.current().device_limits(vllm_config, layers, self._topology)
        self._metrics = StepMetrics.if_wanted(self._topology, collective_counter())
        self._fixed_fields = {
            "vllm_npu": __version__,
            "topology": str(self._topology),
            "layers": "; ".join(sorted({str(layer) for layer in layers})),  # sizes, dtype, quantisation
            "device": f"{self._device.family} {self._device.capacities}",
            "self_test": self._self_test,
        }

    def propose(self, name: str) -> None:
        """Ask for another strategy from the next step on. LOCAL. Raises UnsupportedConfigError for one that cannot be."""
        check_strategy(name, self._topology, self._layer, self._device)
        self.proposed = name

    def may_take(self, strategy: str) -> bool:
        """Whether some step may take this strategy."""
        return (
            self.proposed in (AUTO, strategy) and why_not(strategy, self._topology, self._layer, self._device) is None
        )

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"moe_comm={self.proposed} on {self._device.family}, {self._topology}; "
            f"{describe_capacity(self._device, self._topology, [self._layer])}"
        )

    def plan(self, num_tokens_across_dp: list[int], *, captured: bool = False) -> PlannedStep:
        """Plan a step, and start the vote on it. COLLECTIVE over the grid: 16 bytes to each rank, on CPU."""
        self.confirm()  # of a step without an MoE layer
        plan = StepPlan(num_tokens_across_dp=tuple(num_tokens_across_dp), sharding=self._sharding, captured=captured)
        if (ring := trace_ring()) is not None:
            ring.enter_step(self._planned, "vote")
        if self._topology.world_size > 1:
            self._start_vote(plan)
            if self._must_wait(plan):
                self.confirm()
            if self._planned == 0:
                groups = model_groups(expert_parallel=self._topology.expert_parallel)
                watch_groups(groups)
                self._test_collectives(groups)
        requested = self._agreed or self.proposed
        selection = select(requested, self._topology, plan, layer=self._layer, device=self._device)
        if self._topology.rank == 0 and (self.selection is None or self.selection.strategy != selection.strategy):
            logger.info("MoE communication: %s on %s (%s)", selection.strategy, self._topology, selection.reason)
        if ring is not None:
            ring.enter_step(self._planned, selection.strategy)
        num_tokens = num_tokens_across_dp[self._topology.dp_rank]
        if self._metrics is not None:
            is_fallback = requested not in (AUTO, selection.strategy)
            self._metrics.begin_step(requested, selection.strategy, num_tokens, is_fallback=is_fallback)
        self.selection = selection
        self._planned += 1
        self.steps += 1
        self.tokens += num_tokens
        return PlannedStep(plan, selection.strategy, self.confirm)

    def confirm(self) -> None:
        """Wait for the vote that is under way, if one is. Raises PlanDisagreementError where ranks' plans differ."""
        vote, self._vote = self._vote, None
        if vote is None:
            return
        try:
            proposals = [PROPOSALS[index] for index in vote.finish()]
            if len(set(proposals)) == 1:
                self._agreed = proposals[0]
            elif self._agreed is None:
                raise PlanDisagreementError(
                    f"ranks ask for different moe_comm: {dict(enumerate(proposals))}; start all of them with the same "
                    "--additional-config and VLLM_NPU_MOE_COMM"
                )
        except PlanDisagreementError:
            if self._metrics is not None:
                self._metrics.plans_differ()
            raise

    def _test_collectives(self, groups: Groups) -> None:
        """COLLECTIVE over the grid. Its calls are not counted."""
        if self._self_test == OFF:
            return
        seconds = run_self_test(groups, vote_transport(), torch.device(current_platform.device_type), self._self_test)
        if (counter := collective_counter()) is not None:
            counter.reset()
        logger.info(
            "Self-test (%s) of collectives on %s: passed in %.0f ms", self._self_test, self._topology, seconds * 1e3
        )

    def _start_vote(self, plan: StepPlan) -> None:
        fields = {
            **self._fixed_fields,
            "tokens": list(plan.num_tokens_across_dp),
            "sharding": plan.sharding.value,
            "captured": plan.captured,
            "step": self._planned,
            "in force": self._agreed,
        }
        self._vote = agree_start(fields, vote_transport(), PROPOSALS.index(self.proposed))

    def _must_wait(self, plan: StepPlan) -> bool:
        """Whether the vote must end before the step begins, not before its first MoE layer: where it may change the strategy
        (it does not while this rank proposes what is in force), where TP's own collectives come first, and where a graph
        runs the layers."""
        return self.proposed != self._agreed or self._topology.tp_size > 1 or plan.captured


_PLANNERS: dict[int, StepPlanner] = {}  # by id of the vllm_config, which its planner keeps alive


def planner_of(vllm_config: "VllmConfig") -> StepPlanner | None:
    """The planner of the model of this process, or None where no layer of it is ours. The model must be built."""
    if id(vllm_config) not in _PLANNERS:
        layers = _our_layers(vllm_config)
        if not layers:
            return None
        _PLANNERS[id(vllm_config)] = StepPlanner(vllm_config, layers)
    return _PLANNERS[id(vllm_config)]


def plan_step(
    *,
    vllm_config: "VllmConfig",
    dp_metadata: "DPMetadata | None" = None,
    num_tokens: int | None = None,
    cudagraph_runtime_mode: CUDAGraphMode = CUDAGraphMode.NONE,
    **_: Any,
) -> dict[str, Any]:
    """The step's plan for the forward context, or nothing: no token count (a step without forward), no layer of ours."""
    planner = None if num_tokens is None else planner_of(vllm_config)
    if planner is None:
        return {}
    counts: list[int] = [num_tokens or 0] if dp_metadata is None else dp_metadata.num_tokens_across_dp_cpu.tolist()
    return as_additional_context(planner.plan(counts, captured=cudagraph_runtime_mode is not CUDAGraphMode.NONE))


def planned_step() -> str | None:
    """The strategy of the step that is running, or None where none was planned."""
    step = running_step()
    return None if step is None else step.strategy


def _our_layers(vllm_config: "VllmConfig") -> list[LayerFacts]:
    ours, foreign = compat.current().moe_layers(vllm_config)
    parallel_config = vllm_config.parallel_config
    several_ranks = parallel_config.data_parallel_size > 1 or parallel_config.enable_expert_parallel
    is_moe = vllm_config.model_config is not None and vllm_config.model_config.is_moe
    if is_moe and several_ranks and (foreign or not ours):
        logger.warning_once(
            "This MoE model bypasses vllm_npu in %s: moe_comm has no say there, and on a CPU vLLM's own path does not "
            "support expert or data parallelism.",
            f"{len(foreign)} layers ({', '.join(sorted(set(foreign)))})" if foreign else "all its layers",
        )
    return ours
