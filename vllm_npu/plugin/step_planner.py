"""Plans each step on every rank: counts its tokens, votes on the plan with the other ranks, and chooses the strategy."""

from collections import Counter
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
from vllm.config import CUDAGraphMode
from vllm.distributed import get_dp_group, model_parallel_is_initialized
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_npu import __version__
from vllm_npu.core.handles import Pending
from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.errors import PlanDisagreementError, UnsupportedConfigError
from vllm_npu.plugin import compat
from vllm_npu.plugin.captured_steps import CapturedSteps, Held
from vllm_npu.plugin.forward_context import PlannedStep, as_additional_context
from vllm_npu.plugin.groups import collective_counter, model_groups, trace_ring, vote_transport, watch_groups
from vllm_npu.plugin.layer_facts import LayerFacts
from vllm_npu.plugin.metrics import StepMetrics
from vllm_npu.plugin.options import Mode, Options
from vllm_npu.strategies.select import Selection, check_strategy, select_for_all, why_not
from vllm_npu.strategies.start_checks import describe_capacity
from vllm_npu.strategies.table import AUTO, CHOICES
from vllm_npu.trust.agreement import agree, agree_start
from vllm_npu.trust.self_test import OFF, run_self_test
from vllm_npu.trust.settings import prepare_together

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.parallel_state import GroupCoordinator
    from vllm.forward_context import BatchDescriptor, DPMetadata

logger = init_logger("vllm.npu.plugin.step_planner")  # vLLM shows the messages of loggers below "vllm"

UNAGREED_STRATEGIES = (AUTO, "mc2")  # what a moe_comm may be where ranks do not agree on token counts

DIFFERENT_STRATEGIES = (
    "ranks ask for different moe_comm; start all of them with the same --additional-config and VLLM_NPU_MOE_COMM"
)

DIFFERENT_COUNTS = (
    "some ranks agree on the token counts of each step, and some do not; start all with the same settings"
)


class StepPlanner:
    """Plans the steps of one model in this process, and counts them. The layers of a drafter belong to the model.

    All layers of a step take the same strategy, one that is within the limits of each layer.

    `proposed` is the strategy that this rank asks for. A new proposal takes effect at the first step at which every rank
    proposes the same. Until then the strategy that all ranks last agreed on stays in force.
    """

    def __init__(self, vllm_config: "VllmConfig", options: Options, layers: list[LayerFacts]) -> None:
        self.options = options
        self.proposed = options.moe_comm
        self.selection: Selection | None = None  # of the last step
        self.num_layers = len(layers)
        # Counted since the last moe_comm_counters:
        self.steps = 0
        self.tokens = 0
        self.more_counters: dict[str, Callable[[], dict[str, float]]] = {}
        """Counters that a platform adds to moe_comm_counters, by name. Each function returns the counts since its last call."""
        self.calls_reported: Counter[str] = Counter()  # collectives that moe_comm_counters has reported
        self.bytes_reported: Counter[str] = Counter()  # bytes sent that moe_comm_counters has reported
        self._planned = 0  # steps since the start of this epoch of the groups
        self._agreed: str | None = None  # the strategy in force
        self._vote: Pending[int | None] | None = None  # on the last plan, until confirm
        self._layers = tuple(dict.fromkeys(layer.moe_layer for layer in layers))  # one for each size
        self._sharding: TokenSharding = _same_in_all(layers, "sharding")
        self._expert_parallel: bool = _same_in_all(layers, "use_ep")
        self._groups = model_groups(expert_parallel=self._expert_parallel)
        self._topology = self._groups.topology
        self._device = compat.current().device_limits(vllm_config, layers, self._topology, options.moe_comm)
        self.counts_bound = self._bound_of_counts(compat.current().unagreed_tokens(vllm_config))
        """The most tokens of a data-parallel rank in a step whose counts the ranks do not agree on. None: they agree."""
        self._check(options.moe_comm)
        self._captured_steps = CapturedSteps(collective_counter())
        self._metrics = StepMetrics.if_wanted(self._topology, collective_counter())
        by_layer = [self._device.for_layer(layer, self._topology.ep_size) for layer in self._layers]
        capacities = [limits.capacities for limits in by_layer]
        mc2 = [(limits.mc2.comm_alg, limits.mc2.combine_quant_mode) for limits in by_layer if limits.mc2 is not None]
        fused = [self._device.fused_mc2_asked, *(limits.max_tokens_per_rank for limits in self._device.fused_mc2)]
        self._fixed_fields = {  # the part of each vote that no step changes
            "vllm_npu": __version__,
            "topology": str(self._topology),
            "layers": "; ".join(sorted({str(layer) for layer in layers})),  # sizes, dtype, quantisation
            "device": f"{self._device.family} {capacities} {mc2} {fused}",
            "self_test": options.self_test,
        }

    def restart(self) -> None:
        """Go on with vLLM's present groups, which are new. LOCAL. Call it on every rank before the next step.

        Ranks may have failed in different steps, so they count steps from 0 again, and forget the strategy in force and a vote
        that has not ended. The next step tests the new groups, as the first one did. What the user asked for stays.
        """
        self._groups = model_groups(expert_parallel=self._expert_parallel)
        self._planned = 0
        self._agreed = None
        self._vote = None

    def propose(self, name: str) -> None:
        """Ask for another strategy from the next step on. LOCAL.

        Raises UnsupportedConfigError if it cannot run here, or if captured graphs hold the strategies of the present one.
        """
        self._check(name)
        if name != self.proposed:
            self._captured_steps.check_change(name)
        self.proposed = name

    def may_take(self, strategy: str) -> bool:
        """Whether a step may take this strategy."""
        reasons = [why_not(strategy, self._topology, layer, self._device) for layer in self._layers]
        return self.proposed in (AUTO, strategy) and not any(reasons)

    def _bound_of_counts(self, theirs: int | None) -> int | None:
        """counts_bound, where `theirs` is what the platform gives. Only MC2's ops take rows that no rank counted."""
        mc2_takes_all = all(
            why_not("mc2", self._topology, layer, self._device) is None
            and (limits := self._device.for_layer(layer, self._topology.ep_size).mc2) is not None
            and limits.takes_uneven_ranks
            and theirs is not None
            and theirs <= limits.max_tokens_per_rank * self._topology.tp_size
            for layer in self._layers
        )
        return theirs if mc2_takes_all and self.options.moe_comm in UNAGREED_STRATEGIES else None

    def _check(self, strategy: str) -> None:
        if self.counts_bound is not None and strategy not in UNAGREED_STRATEGIES:
            raise UnsupportedConfigError(
                f"{strategy} needs the token counts of all data-parallel ranks. The ranks of this KV consumer do not agree on "
                f"them, because it started with moe_comm={self.options.moe_comm}; start it with moe_comm={strategy}"
            )
        for layer in self._layers:
            check_strategy(strategy, self._topology, layer, self._device)

    def describe(self) -> str:
        """One line for the log: the strategy, the device, the topology and MC2's capacity."""
        return (
            f"moe_comm={self.proposed} on {self._device.family}, {self._topology}; "
            f"{describe_capacity(self._device, self._topology, self._layers)}"
            f"{'' if self.counts_bound is None else f'; ranks do not agree on token counts of up to {self.counts_bound}'}"
        )

    def plan(self, num_tokens_across_dp: list[int], *, graph: Hashable | None = None) -> PlannedStep:
        """Plan a step, and start the vote on it. COLLECTIVE over the grid: as agree_start, on CPU.

        `graph` names the graph that holds the step; None: the step runs eagerly. Raises PlanDisagreementError if the ranks'
        plans differ: those of this step if it must wait for the vote, or those of the last step if no MoE layer ran in it.
        Raises UnsupportedConfigError if the graph was captured for another plan.
        """
        self.confirm()
        plan = self._plan_of(num_tokens_across_dp, captured=graph is not None)
        num_tokens = plan.tokens_of(self._topology.dp_rank)
        if (ring := trace_ring()) is not None:
            ring.enter_step(self._planned, "vote")
        if self._topology.world_size > 1:
            self._start_vote(plan)
            if self._must_wait(plan):
                self.confirm()
            if self._planned == 0:
                watch_groups()
                self._test_collectives()
        requested = self._requested_for(plan)
        selection = select_for_all(requested, self._topology, plan, layers=self._layers, device=self._device)
        if self._topology.rank == 0 and (self.selection is None or self.selection.strategy != selection.strategy):
            logger.info("MoE communication: %s on %s (%s)", selection.strategy, self._topology, selection.reason)
        if ring is not None:
            ring.enter_step(self._planned, selection.strategy)
        held_tokens = plan.num_tokens_across_dp if plan.own_tokens is None else (plan.own_tokens,)
        self._captured_steps.begin(graph, Held(held_tokens, selection.strategy))
        if self._metrics is not None:
            is_fallback = requested not in (AUTO, selection.strategy)
            self._metrics.begin_step(requested, selection.strategy, num_tokens, is_fallback=is_fallback)
        self.selection = selection
        self._planned += 1
        self.steps += 1
        self.tokens += num_tokens
        return PlannedStep(plan, selection.strategy, self._groups, self.confirm)

    def _plan_of(self, num_tokens_across_dp: list[int], *, captured: bool) -> StepPlan:
        """The plan of a step. Where the ranks do not agree on counts, the given ones are this rank's own number of tokens."""
        own, bound = num_tokens_across_dp[self._topology.dp_rank], self.counts_bound
        if bound is None or own > bound:
            # A step above the bound is one that all ranks run alike, as the profile run is. If they do not, the vote says so.
            return StepPlan(
                num_tokens_across_dp=tuple(num_tokens_across_dp), sharding=self._sharding, captured=captured
            )
        return StepPlan(
            num_tokens_across_dp=(bound,) * self._topology.dp_size,
            sharding=self._sharding,
            captured=captured,
            own_tokens=own,
        )

    def _requested_for(self, plan: StepPlan) -> str:
        """The strategy in force, or the one that a step without agreed counts must take. Equal on all ranks."""
        in_force = self._agreed or self.proposed
        if plan.own_tokens is None:
            return in_force
        fits = in_force == AUTO and all(
            why_not("fused_mc2", self._topology, layer, self._device) is None
            and (limits := self._device.fused_limits(layer)) is not None
            and limits.takes_uneven_ranks
            for layer in self._layers
        )
        return "fused_mc2" if fits else "mc2"

    def confirm(self) -> None:
        """Wait for the end of the vote, if one has begun. Raises PlanDisagreementError if the ranks' plans differ."""
        vote, self._vote = self._vote, None
        if vote is None:
            return
        try:
            proposal = vote.finish()
            if proposal is not None:
                self._agreed = CHOICES[proposal]
            elif self._agreed is None:  # on all ranks, since they voted on the strategy in force too
                agree({"moe_comm": self.proposed}, vote_transport(), difference=DIFFERENT_STRATEGIES)
        except PlanDisagreementError:
            if self._metrics is not None:
                self._metrics.plans_differ()
            raise

    def _test_collectives(self) -> None:
        """Run the self-test that the options name. COLLECTIVE over the grid. The counter of collectives leaves it out."""
        mode = self.options.self_test
        if mode == OFF:
            return
        counter = collective_counter()
        before = None if counter is None else (counter.calls.copy(), counter.bytes_sent.copy())
        seconds = run_self_test(self._groups, vote_transport(), torch.device(current_platform.device_type), mode)
        if counter is not None and before is not None:
            counter.calls, counter.bytes_sent = before
        logger.info("Self-test (%s) of collectives on %s: passed in %.0f ms", mode, self._topology, seconds * 1e3)

    def _start_vote(self, plan: StepPlan) -> None:
        counted = plan.own_tokens is None
        fields = {
            **self._fixed_fields,
            "tokens": list(plan.num_tokens_across_dp) if counted else f"up to {self.counts_bound} on each rank",
            "sharding": plan.sharding.value,
            "captured": plan.captured if counted else "each rank on its own",
            "step": self._planned,
            "in force": self._agreed,
        }
        self._vote = agree_start(fields, vote_transport(), CHOICES.index(self.proposed))

    def _must_wait(self, plan: StepPlan) -> bool:
        """Whether the vote must end before the step begins. Otherwise it ends before the first MoE layer runs.

        It must end before the step for three reasons:
        - The vote may change the strategy. It cannot while this rank proposes the strategy in force.
        - With TP, the model's own collectives run before the first MoE layer.
        - A graph runs the layers, and a graph runs no Python.
        """
        return self.proposed != self._agreed or self._topology.tp_size > 1 or plan.captured


def _same_in_all(layers: list[LayerFacts], fact: str) -> Any:
    """The value of this fact, which a step has once. Raises UnsupportedConfigError if layers differ in it."""
    values = {getattr(layer, fact) for layer in layers}
    if len(values) > 1:
        raise UnsupportedConfigError(
            f"the MoE layers of this model (and its drafter) differ in {fact}: {sorted(map(str, values))}; a step has one. "
            "Choose another drafter, or run without expert and data parallelism"
        )
    return values.pop()


# The planners of vLLM's groups, by id(vllm_config). They end with the groups, and an entry also ends with its vllm_config.
_PLANNERS: "WeakKeyDictionary[GroupCoordinator, dict[int, tuple[ref[VllmConfig], StepPlanner | None]]]"
_PLANNERS = WeakKeyDictionary()


def planner_of(vllm_config: "VllmConfig") -> StepPlanner | None:
    """The planner of the model on vLLM's present groups. None if moe_comm=off, or if no layer of the model is ours.

    The first call reads the options and the layers, so the model must be built by then. If layers are ours, it is COLLECTIVE
    over the grid, and raises UnsupportedConfigError on every rank if one rank cannot start.
    """
    known = _PLANNERS.setdefault(get_dp_group(), {})  # vLLM makes a group for ep only for MoE models
    key = id(vllm_config)
    if key not in known:
        planner = _make_planner(vllm_config)
        known[key] = ref(vllm_config, lambda _: known.pop(key, None)), planner
    return known[key][1]


def _make_planner(vllm_config: "VllmConfig") -> StepPlanner | None:
    options = Options.of(vllm_config)
    layers = [] if options.mode is Mode.OFF else _our_layers(vllm_config)
    if not layers:
        return None
    planner = prepare_together(lambda: StepPlanner(vllm_config, options, layers), vote_transport())
    # Ranks that agree on the counts of each step do so in a collective, which the others would not enter.
    counts = "agreed" if planner.counts_bound is None else f"up to {planner.counts_bound}, not agreed"
    agree({"token counts of a step": counts}, vote_transport(), difference=DIFFERENT_COUNTS)
    return planner


def restart_planners() -> None:
    """Restart all planners on vLLM's present groups. LOCAL, as StepPlanner.restart."""
    for _, planner in _PLANNERS.get(get_dp_group(), {}).values():
        if planner is not None:
            planner.restart()


def plan_step(
    *,
    vllm_config: "VllmConfig",
    dp_metadata: "DPMetadata | None" = None,
    num_tokens: int | None = None,
    cudagraph_runtime_mode: CUDAGraphMode = CUDAGraphMode.NONE,
    batch_descriptor: "BatchDescriptor | None" = None,
    **_: Any,
) -> dict[str, Any]:
    """Plan a step of vLLM, and return what its forward context must hold. COLLECTIVE as StepPlanner.plan.

    Empty if the step has no token count (it runs no forward pass), if vLLM has made no groups in this process (a part of the
    model runs alone), or if the model has no layer of ours.
    """
    if num_tokens is None or not model_parallel_is_initialized():
        return {}
    planner = planner_of(vllm_config)
    if planner is None:
        return {}
    counts: list[int] = [num_tokens] if dp_metadata is None else dp_metadata.num_tokens_across_dp_cpu.tolist()
    # vLLM keeps a graph for each mode and batch descriptor.
    graph = None if cudagraph_runtime_mode is CUDAGraphMode.NONE else (cudagraph_runtime_mode.name, batch_descriptor)
    return as_additional_context(planner.plan(counts, graph=graph))


def _our_layers(vllm_config: "VllmConfig") -> list[LayerFacts]:
    ours, foreign = compat.current().moe_layers(vllm_config)
    parallel_config = vllm_config.parallel_config
    several_ranks = parallel_config.data_parallel_size > 1 or parallel_config.enable_expert_parallel
    is_moe = vllm_config.model_config is not None and vllm_config.model_config.is_moe
    if is_moe and several_ranks and (foreign or not ours):
        logger.warning_once(
            "This MoE model bypasses vllm_npu in %s: moe_comm has no effect there, and on a CPU vLLM's own path does not "
            "support expert or data parallelism.",
            f"{len(foreign)} layers ({', '.join(sorted(set(foreign)))})" if foreign else "all its layers",
        )
    return ours
