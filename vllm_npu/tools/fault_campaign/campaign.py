"""One run of the campaign: ranks serve drawn steps through the real strategies, with a vote before each, and meet drawn faults.

What must hold for every seed:

- No rank ever has wrong data.
- No rank waits past the deadline and the time that the watchdog takes.
- Every error names a rank that a fault has hit. One case is an exception: the network between two ranks was cut for so long
  that a collective failed, and works again when the ranks look. Then all can be reached, and an error may name nobody.
- Ranks that all live serve all steps in the end. If a rank has ended, all others end with an error that names it.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property, partial

import torch

from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.errors import PlanDisagreementError, RankFailureError, VllmNpuError
from vllm_npu.strategies.pipelines import Pipelines
from vllm_npu.strategies.table import STRATEGIES
from vllm_npu.tools.fault_campaign.network import Cut, Network, SimulatedGroup, SimulatedMailboxes, SimulatedTransport
from vllm_npu.tools.fault_campaign.simulation import Simulation
from vllm_npu.tools.verification import Case, CaseTensors, difference_of, grids, poisoned
from vllm_npu.transport.base import Groups
from vllm_npu.trust.agreement import agree_start
from vllm_npu.trust.watchdog import FAILURE_SECONDS, Watchdog

DEADLINE = 4.0  # simulated seconds that a collective may take
STEPS, LAYERS = 3, 2
COMPUTE_SECONDS = 0.2  # the most that a layer's experts take
FAULTS_BEGIN_BEFORE = 2.5  # simulated seconds; the steps take 1 to 4
LINGER_SECONDS = 60.0  # a rank that has served all steps still answers the others
ATTEMPTS = 8  # to meet in a new epoch; a cut between two ranks lasts for up to 12 s
ATTEMPTS_WITHOUT_A_RANK = 2  # where a rank ends
SLACK_SECONDS = 1.0  # of an error's time, for messages between mailboxes


class FaultKind(Enum):
    """What happens to a rank."""

    NONE = "none"
    LATE = "stopped for less than the deadline"
    STOPPED = "stopped for longer than the deadline"
    ENDED = "ended"
    CUT = "two ranks cut off from each other, and healed"
    BUSY = "computes for longer than the deadline"
    ERROR = "an exception in a rank's step"
    DISAGREE = "plans another step"


HARMLESS = (FaultKind.NONE, FaultKind.LATE)
SECOND_SHARE = 0.25  # of the seeds with a fault: they have another one


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of one rank, or of a pair of ranks."""

    kind: FaultKind
    ranks: tuple[int, ...]
    begin: float
    seconds: float
    silent: bool = False  # an end that closes no connection, as a host that loses its power

    @property
    def end(self) -> float:
        """When it is over."""
        return self.begin + self.seconds

    def __str__(self) -> str:
        return f"{self.kind.name} ranks {list(self.ranks)} at {self.begin:.2f} s for {self.seconds:.2f} s"


@dataclass(frozen=True, slots=True)
class Controls:
    """Parts that are taken away to show that the campaign finds their absence."""

    epochs: bool = True  # groups are named by their epoch
    deadline: float = DEADLINE
    names: bool = True  # errors name ranks


@dataclass(slots=True)
class Outcome:
    """What one seed came to."""

    seed: int
    faults: tuple[Fault, ...]
    violations: list[str] = field(default_factory=list)
    errors: int = 0  # RankFailureErrors of all ranks
    exact: int = 0  # of them: those that name only ranks that a fault has hit
    unnamed: int = 0  # RankFailureErrors that name nobody, after a cut that healed before the ranks looked
    disagreements: int = 0  # PlanDisagreementErrors of all ranks
    epochs: int = 0  # entered after the first
    worst_seconds: float = 0.0  # from the begin of a collective to its error
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def kind(self) -> str:
        """The kinds of the faults."""
        return " + ".join(sorted({fault.kind.value for fault in self.faults}))


class _StepFailedError(Exception):
    """An exception in a rank's step that no transport raises."""


class _Run:
    """The ranks of one seed."""

    def __init__(self, seed: int, controls: Controls) -> None:
        draw = random.Random(f"run {seed}")
        self.controls = controls
        num_ranks = draw.choice((2, 3, 4))
        self.tp_size, self.dp_size = draw.choice(grids(num_ranks))
        self.simulation = Simulation(num_ranks)
        self.network = Network(self.simulation, seed, DEADLINE)
        self.outcome = Outcome(seed, _drawn_faults(draw, num_ranks))
        self.layers = [self._drawn_layer(draw) for _ in range(STEPS * LAYERS)]
        self.compute = [[draw.uniform(0, COMPUTE_SECONDS) for _ in self.layers] for _ in range(num_ranks)]
        self.pending = [{fault for fault in self.outcome.faults if fault.ranks == (rank,)} for rank in range(num_ranks)]
        self.finished = [False] * num_ranks

    def _drawn_layer(self, draw: random.Random) -> "_Layer":
        strategy = draw.choice(list(STRATEGIES))
        counts = tuple(draw.choice((0, 1, 2, 5, 9)) for _ in range(self.dp_size))
        sharding = draw.choice(list(TokenSharding)) if self.tp_size > 1 else TokenSharding.REPLICATED
        return _Layer(
            Case(
                strategy=strategy,
                tp_size=self.tp_size,
                dp_size=self.dp_size,
                num_tokens_across_dp=counts,
                sharding=sharding,
                top_k=2,
                hidden_size=8,
                width=8,
                seed=draw.randrange(1 << 16),
            )
        )

    def run(self) -> Outcome:
        simulation, outcome = self.simulation, self.outcome
        for fault in outcome.faults:
            self._schedule(fault)
        for rank, result in enumerate(simulation.run(self._main)):
            if isinstance(result, Exception):
                outcome.violations.append(f"rank {rank} raised {type(result).__name__}: {result}")
        if simulation.hung:
            left = [rank for rank, finished in enumerate(self.finished) if not finished and not simulation.ended[rank]]
            outcome.violations.append(f"ranks {left} hung")
        ended = any(fault.kind is FaultKind.ENDED for fault in outcome.faults)
        if not ended and not all(self.finished) and not outcome.violations:
            outcome.violations.append(f"not all ranks served all steps: {self.finished}")
        if all(fault.kind in HARMLESS for fault in outcome.faults) and (outcome.errors or outcome.disagreements):
            outcome.violations.append("an error without a fault")
        if outcome.worst_seconds > DEADLINE + FAILURE_SECONDS + SLACK_SECONDS:
            outcome.violations.append(f"an error came after {outcome.worst_seconds:.1f} s")
        outcome.counts = self.network.counts
        outcome.epochs = max(self.network.epochs)
        return outcome

    def _schedule(self, fault: Fault) -> None:
        simulation, network = self.simulation, self.network
        match fault.kind:
            case FaultKind.LATE | FaultKind.STOPPED:
                simulation.at(fault.begin, lambda: simulation.stop(fault.ranks[0], fault.seconds))
            case FaultKind.ENDED:
                simulation.at(fault.begin, lambda: self._end(fault))
            case FaultKind.CUT:
                network.cuts.append(Cut(frozenset(fault.ranks), fault.begin, fault.begin + fault.seconds))

    def _end(self, fault: Fault) -> int | None:
        rank = fault.ranks[0]
        if fault.silent:
            self.network.silent_hosts.add(rank)
        else:
            others = [other for other in range(self.simulation.num_ranks) if other != rank]
            for group in {name for name, _ in self.opened[rank]}:
                self.network.close(rank, group, others)
        return self.simulation.end(rank)

    @cached_property
    def opened(self) -> list[list[tuple[str, SimulatedGroup]]]:
        """The groups that each rank has open, with the names under which their messages travel."""
        return [[] for _ in range(self.simulation.num_ranks)]

    # --- what a rank does ---

    def _main(self, rank: int) -> None:
        watchdog = Watchdog(SimulatedMailboxes(self.network, rank), self.controls.deadline)
        serving = self._open(rank, watchdog)
        step = 0
        while True:
            try:
                while step < STEPS:
                    self._step(serving, step)
                    step += 1
                self.finished[rank] = True
                if not self._is_wanted(serving):
                    return
            except PlanDisagreementError:
                self.outcome.disagreements += 1
                self._expect_hit("the ranks' plans differ", FaultKind.DISAGREE)
                continue  # no token has moved, and the groups work
            except RankFailureError as error:
                self._note(error)
            except _StepFailedError as error:
                serving.watchdog.tell_fault(error)
            self.finished[rank] = False
            recovered = self._recover(serving, step)
            if recovered is None:
                return
            serving, step = recovered

    def _recover(self, serving: "_Serving", step: int) -> "tuple[_Serving, int] | None":
        """New groups, and the step at which all ranks go on. None: the rank gives up."""
        watchdog = serving.watchdog
        some_ended = any(fault.kind is FaultKind.ENDED for fault in self.outcome.faults)
        for _ in range(ATTEMPTS_WITHOUT_A_RANK if some_ended else ATTEMPTS):
            serving.leave()
            self.opened[serving.rank].clear()
            try:
                watchdog = watchdog.next_epoch()
                serving = self._open(serving.rank, watchdog)
                behind = serving.vote.maximum_start([-step]).finish()[0]
                return serving, -behind
            except RankFailureError as error:
                self._note(error)
        if not some_ended:
            self.outcome.violations.append(f"rank {serving.rank} met the others in none of {ATTEMPTS} attempts")
        return None

    def _open(self, rank: int, watchdog: Watchdog) -> "_Serving":
        topology = ParallelTopology.of_rank(rank, tp_size=self.tp_size, dp_size=self.dp_size)
        everyone = tuple(range(self.simulation.num_ranks))
        members = {"tp": topology.tp_group, "dp": topology.dp_group, "ep": everyone, "vote": everyone}
        name_epoch = watchdog.epoch if self.controls.epochs else 0
        self.network.epochs[rank] = watchdog.epoch
        transports = {}
        for name, ranks in members.items():
            group = SimulatedGroup(self.network, name, ranks, rank, watchdog, name_epoch)
            self.opened[rank].append((group.travels_as, group))
            transports[name] = SimulatedTransport(group, ranks.index(rank))
        groups = Groups(topology, transports["tp"], transports["dp"], transports["ep"])
        return _Serving(rank, watchdog, Pipelines(groups), transports["vote"])

    def _step(self, serving: "_Serving", step: int) -> None:
        layers = self.layers[step * LAYERS : (step + 1) * LAYERS]
        plan: dict[str, object] = {"layers": [str(layer.case) for layer in layers], "step": step}
        if self._take(serving.rank, FaultKind.DISAGREE):
            plan["step"] = "another one"
        vote = agree_start(plan, serving.vote)
        for number, layer in enumerate(layers):
            if number == 0:
                self._compute(serving.rank, step * LAYERS)
                vote.finish()
            fault = layer.run(serving, partial(self._compute, serving.rank, step * LAYERS + number))
            if fault:
                self.outcome.violations.append(f"wrong data in step {step}: {fault}")

    def _compute(self, rank: int, layer: int) -> None:
        """Pass the time of a layer's experts, and meet the rank's faults."""
        self.simulation.sleep(rank, self.compute[rank][layer])
        if (fault := self._take(rank, FaultKind.BUSY)) is not None:
            self.simulation.sleep(rank, fault.seconds)
        if self._take(rank, FaultKind.ERROR):
            raise _StepFailedError("drawn by the seed")

    def _take(self, rank: int, kind: FaultKind) -> Fault | None:
        """A fault of this kind whose time has come. Each happens once."""
        for fault in self.pending[rank]:
            if fault.kind is kind and fault.begin <= self.simulation.now:
                self.pending[rank].remove(fault)
                return fault
        return None

    def _is_wanted(self, serving: "_Serving") -> bool:
        """Wait after the last step. Returns whether another rank needs this one in a new epoch."""
        until = self.simulation.now + LINGER_SECONDS
        while self.simulation.now < until:
            if serving.watchdog.is_left():
                return True
            self.simulation.sleep(serving.rank, 1.0)
        return False

    def _note(self, error: RankFailureError) -> None:
        self.outcome.errors += 1
        hit = {rank for fault in self.outcome.faults if fault.begin <= self.simulation.now for rank in fault.ranks}
        named = set(error.ranks) if self.controls.names else set()
        healed = any(fault.kind is FaultKind.CUT and fault.end <= self.simulation.now for fault in self.outcome.faults)
        if not named and healed:
            self.outcome.unnamed += 1
        elif not named & hit:
            self.outcome.violations.append(f"the ranks {sorted(hit)} are hit, and rank {error.rank} says: {error}")
        self.outcome.exact += bool(named) and named <= hit
        groups = [group for opened in self.opened for _, group in opened]
        self.outcome.worst_seconds = max([self.outcome.worst_seconds, *(group.worst_seconds for group in groups)])

    def _expect_hit(self, what: str, kind: FaultKind) -> None:
        if not any(fault.kind is kind for fault in self.outcome.faults):
            self.outcome.violations.append(f"{what}, and no rank has this fault")


@dataclass(frozen=True, slots=True)
class _Serving:
    """A rank's groups in one epoch."""

    rank: int
    watchdog: Watchdog
    pipelines: Pipelines
    vote: SimulatedTransport

    def leave(self) -> None:
        self.pipelines.groups.leave()
        self.vote.leave()


class _Layer:
    """A layer of a step, with the tensors of all ranks."""

    def __init__(self, case: Case) -> None:
        self.case = case

    @cached_property
    def tensors(self) -> CaseTensors:
        return CaseTensors.of(self.case)

    def run(self, serving: _Serving, compute: Callable[[], None]) -> str | None:
        """Run it on this rank, and return what is wrong with its output. COLLECTIVE."""
        case, topology, device = self.case, serving.pipelines.groups.topology, torch.device("cpu")
        hidden_states, weights, ids = self.tensors.input_of(topology, case.sharding, device)
        experts = poisoned(self.tensors.experts_of(topology, device), compute)
        step = StepPlan(num_tokens_across_dp=case.num_tokens_across_dp, sharding=case.sharding)
        pipeline = serving.pipelines.get(case.strategy, case.num_experts)
        output = pipeline.run(hidden_states, weights, ids, experts, step).hidden_states
        expected = self.tensors.expected_on(topology, case.sharding)
        return difference_of(serving.rank, output[: expected.shape[0]], expected, case)


def _drawn_faults(draw: random.Random, num_ranks: int) -> tuple[Fault, ...]:
    first = _drawn_fault(draw, num_ranks)
    if first.kind is FaultKind.NONE or draw.random() >= SECOND_SHARE:
        return (first,)
    return first, _drawn_fault(draw, num_ranks)


def _drawn_fault(draw: random.Random, num_ranks: int) -> Fault:
    kind = draw.choice(list(FaultKind))
    victims = tuple(sorted(draw.sample(range(num_ranks), 2))) if kind is FaultKind.CUT else (draw.randrange(num_ranks),)
    least, most = (0.1, 0.4) if kind is FaultKind.LATE else (1.05, 3.0)
    return Fault(
        kind,
        victims,
        begin=draw.uniform(0, FAULTS_BEGIN_BEFORE),
        seconds=draw.uniform(least, most) * DEADLINE,
        silent=draw.random() < 0.3,
    )


def run_seed(seed: int, controls: Controls | None = None) -> Outcome:
    """Run one seed. LOCAL; about 0.05 s. torch should use one thread (torch.set_num_threads)."""
    try:
        return _Run(seed, controls or Controls()).run()
    except VllmNpuError as error:
        error.add_note(f"in seed {seed}")
        raise
