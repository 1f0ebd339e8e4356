"""Every strategy against the reference, on real ranks: the cases of `vllm-npu verify` and of the tests.

Each rank makes the tensors of all ranks from one seed, so that it knows the expected output without communication.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import torch

from vllm_npu.core.ascend_recipes import ASKED_NOTHING, MC2Asked
from vllm_npu.core.limits import NVLINK, PORTABLE, BalanceMode, DeviceLimits, MoELayer, QuantMode
from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.core.token_layout import TokenSlice
from vllm_npu.core.tolerances import TOLERANCES
from vllm_npu.core.topology import ExpertPlacement, ParallelTopology
from vllm_npu.device import ops_of
from vllm_npu.device.portable_ops import npu_dynamic_quant
from vllm_npu.eplb.placement import ReplicaPlacement
from vllm_npu.eplb.replicas import to_physical
from vllm_npu.strategies.dispatch.symmetric_layout import why_not_symmetric
from vllm_npu.strategies.pipeline import ExpertsFunction
from vllm_npu.strategies.select import build, why_not
from vllm_npu.strategies.table import ALL_STRATEGIES, STRATEGIES
from vllm_npu.tools.launch import Rank
from vllm_npu.tools.reference import LinearExperts, reference_moe, select_topk
from vllm_npu.transport.symmetric_memory import gather_facts

HIDDEN_SIZE = 32
COLUMN_OF_THE_LARGEST = 0  # in exact int8 cases, this column of hidden_states sets the scale, and no expert reads it
SCALE_DTYPES = {torch.bfloat16: torch.bfloat16}  # of int8 weights in npu_grouped_matmul, by the dtype of its outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run of one strategy on one topology."""

    strategy: str
    tp_size: int
    dp_size: int
    num_tokens_across_dp: tuple[int, ...]
    expert_parallel: bool = True
    sharding: TokenSharding = TokenSharding.REPLICATED
    dtype: torch.dtype = torch.bfloat16
    integer: bool = True  # small integers: the result must be exact
    skewed: bool = False  # all tokens choose experts of the first ranks only
    hidden_size: int = HIDDEN_SIZE
    width: int = HIDDEN_SIZE  # columns of the experts' output
    experts_per_rank: int = 2
    top_k: int = 3
    quant_mode: QuantMode = QuantMode.NONE
    redundant_per_rank: int = 0  # slots of each rank that hold replicas; the seed gives the placement
    balance_mode: BalanceMode = BalanceMode.BY_RANK  # how tokens choose a replica
    asked: MC2Asked = ASKED_NOTHING  # of MC2's ops
    counts_bound: int | None = None  # the ranks know this bound, and each its own count; None: they know all counts
    seed: int = 0

    def step_on(self, dp_rank: int) -> StepPlan:
        """The plan of the step, as a rank of this DP rank has it."""
        if self.counts_bound is None:
            return StepPlan(num_tokens_across_dp=self.num_tokens_across_dp, sharding=self.sharding)
        return StepPlan(
            num_tokens_across_dp=(self.counts_bound,) * self.dp_size,
            sharding=self.sharding,
            own_tokens=self.num_tokens_across_dp[dp_rank],
        )

    @property
    def num_experts(self) -> int:
        """Routed experts of all ranks, without replicas."""
        return self.experts_per_rank * self.tp_size * self.dp_size

    @property
    def num_physical_experts(self) -> int:
        """Slots for routed experts of all ranks."""
        return self.num_experts + self.redundant_per_rank * self.tp_size * self.dp_size

    @property
    def layer(self) -> MoELayer:
        """The layer of the case, on which limits depend."""
        return MoELayer(
            num_experts=self.num_physical_experts,
            top_k=self.top_k,
            hidden_size=self.hidden_size,
            dtype=self.dtype,
            quant_mode=self.quant_mode,
        )

    def __str__(self) -> str:
        parts = [self.strategy, f"tp{self.tp_size}", f"dp{self.dp_size}", "ep" if self.expert_parallel else "no-ep"]
        parts += [self.sharding.value, str(list(self.num_tokens_across_dp)), str(self.dtype).removeprefix("torch.")]
        parts += [word for word, on in (("integer", self.integer), ("skewed", self.skewed)) if on]
        parts += [] if self.quant_mode is QuantMode.NONE else [self.quant_mode.name.lower()]
        if self.redundant_per_rank:
            parts += [f"{self.redundant_per_rank} redundant experts a rank {self.balance_mode.name.lower()}"]
        parts += [] if self.counts_bound is None else [f"counts unknown up to {self.counts_bound}"]
        return " ".join([*parts, f"hidden{self.hidden_size}", f"width{self.width}", f"seed{self.seed}"])


def grids(num_ranks: int) -> list[tuple[int, int]]:
    """(tp_size, dp_size) of every grid with this many ranks."""
    return [(tp, num_ranks // tp) for tp in range(1, num_ranks + 1) if num_ranks % tp == 0]


def count_patterns(tp_size: int, dp_size: int) -> list[tuple[int, ...]]:
    """Token counts that often reveal faults: none, fewer than TP, odd, unequal, idle ranks, one busy rank."""
    interesting = (0, 1, tp_size - 1, tp_size, tp_size + 1, 2 * tp_size - 1, 2 * tp_size + 1, 9, 33)
    patterns = [(count,) * dp_size for count in interesting]
    if dp_size > 1:
        patterns += [(0,) + (5,) * (dp_size - 1), (7,) + (0,) * (dp_size - 1), (0,) * (dp_size - 1) + (1,)]
        patterns += [tuple(interesting[(3 * rank + 2) % len(interesting)] for rank in range(dp_size))]
        patterns += [(64,) + (1,) * (dp_size - 1)]
    return sorted(set(patterns))


def cases(
    num_ranks: int,
    *,
    strategies: tuple[str, ...] = tuple(ALL_STRATEGIES),
    quick: bool,
    seed: int,
    device: DeviceLimits = PORTABLE,
) -> Iterator[Case]:
    """All cases that the device can run on this many ranks, with the least hidden size that it takes.

    `quick` keeps one dtype and one seed of each layout.
    """
    for case in _all_cases(num_ranks, strategies, quick, seed):
        limited = device.mc2 if case.strategy == "mc2" else None
        if limited is not None and limited.hidden_sizes is not None:  # returned rows have the size of sent rows
            least = max(HIDDEN_SIZE, limited.hidden_sizes[0])
            case = replace(case, hidden_size=least, width=least)
        topology = ParallelTopology.of_rank(
            0, tp_size=case.tp_size, dp_size=case.dp_size, expert_parallel=case.expert_parallel
        )
        if why_not(case.strategy, topology, case.layer, device) is None:
            yield case


def empty_rank_cases(num_ranks: int, seed: int) -> Iterator[Case]:
    """Every pattern of DP ranks without tokens.

    Tokens go to the experts of all ranks, and in further cases to the first rank's.
    """
    for strategy, row in STRATEGIES.items():
        for pattern in product((0, 3), repeat=num_ranks):
            case = Case(
                strategy=strategy, tp_size=1, dp_size=num_ranks, num_tokens_across_dp=pattern, top_k=2, seed=seed
            )
            if num_ranks > 1 or not row.needs_expert_parallel:
                yield case
                yield replace(case, skewed=True)


RANDOM_COUNTS = (0, 1, 257)  # token counts of random cases, together with numbers around tp_size


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomRun:
    """A random case, and what happens between its dispatch and its combine."""

    case: Case
    between: Case | None = None  # another micro-batch, which runs from its beginning to its end
    interrupted: bool = False  # the case runs once before, and all ranks raise an exception between the stages

    def __str__(self) -> str:
        parts = [str(self.case)] + [f"with {self.between} in between"] * (self.between is not None)
        return "; ".join(parts + ["after an exception"] * self.interrupted)


def random_runs(
    num_ranks: int, count: int, seed: int, strategies: Sequence[str] = tuple(STRATEGIES)
) -> list[RandomRun]:
    """`count` random runs. The same seed gives the same runs on every machine."""
    draw = random.Random(f"{num_ranks} {seed}")
    runs: list[RandomRun] = []
    while len(runs) < count:
        case, other = (_random_case(num_ranks, draw, strategies) for _ in range(2))
        same_grid = replace(other, tp_size=case.tp_size, dp_size=case.dp_size)
        between = replace(same_grid, num_tokens_across_dp=_random_counts(case.tp_size, case.dp_size, draw))
        runs.append(
            RandomRun(
                case=case,
                between=between if draw.random() < 0.3 and between.expert_parallel == case.expert_parallel else None,
                interrupted=draw.random() < 0.1,
            )
        )
    return runs


def _random_counts(tp_size: int, dp_size: int, draw: random.Random) -> tuple[int, ...]:
    around_tp = (tp_size - 1, tp_size, tp_size + 1, 2 * tp_size - 1)
    counts = [draw.choice((*RANDOM_COUNTS[:2], *around_tp, draw.randrange(40))) for _ in range(dp_size)]
    if draw.random() < 0.1:
        counts[draw.randrange(dp_size)] = RANDOM_COUNTS[2]
    return tuple(counts)


def _random_case(num_ranks: int, draw: random.Random, strategies: Sequence[str]) -> Case:
    strategy = draw.choice([name for name in strategies if num_ranks > 1 or not STRATEGIES[name].needs_expert_parallel])
    tp_size, dp_size = draw.choice(grids(num_ranks))
    expert_parallel = STRATEGIES[strategy].needs_expert_parallel or draw.random() < 0.7
    experts_per_rank = draw.choice((1, 2, 5))
    integer = draw.random() < 0.7
    dtype = torch.bfloat16 if integer else draw.choice((torch.bfloat16, torch.float16, torch.float32))
    quantised = dtype is torch.bfloat16 and draw.random() < 0.3
    return Case(
        strategy=strategy,
        tp_size=tp_size,
        dp_size=dp_size,
        num_tokens_across_dp=_random_counts(tp_size, dp_size, draw),
        expert_parallel=expert_parallel,
        sharding=draw.choice(list(TokenSharding)) if tp_size > 1 and expert_parallel else TokenSharding.REPLICATED,
        dtype=dtype,
        integer=integer,
        skewed=draw.random() < 0.3,
        width=HIDDEN_SIZE if quantised else draw.choice((HIDDEN_SIZE, HIDDEN_SIZE // 2)),
        experts_per_rank=experts_per_rank,
        top_k=draw.randint(1, min(4, experts_per_rank * num_ranks)),
        quant_mode=QuantMode.INT8_PER_TOKEN if quantised else QuantMode.NONE,
        seed=draw.randrange(1 << 16),
    )


def _all_cases(num_ranks: int, strategies: tuple[str, ...], quick: bool, seed: int) -> Iterator[Case]:
    for strategy in strategies:
        for tp_size, dp_size in grids(num_ranks):
            for case in _layouts(strategy, tp_size, dp_size):
                patterns = count_patterns(tp_size, dp_size)
                if case.expert_parallel and tp_size * dp_size > 1:
                    replicas = replace(case, num_tokens_across_dp=patterns[-1], redundant_per_rank=1, seed=seed)
                    yield from (replace(replicas, balance_mode=mode) for mode in BalanceMode)
                for counts in patterns:
                    exact = replace(case, num_tokens_across_dp=counts, seed=seed)
                    yield exact
                    yield replace(exact, quant_mode=QuantMode.INT8_PER_TOKEN)
                    if strategy == "mc2" and min(counts) > 0:
                        yield replace(exact, counts_bound=(max(counts) + 2) * tp_size)
                    if quick:
                        continue
                    yield replace(exact, skewed=True, width=HIDDEN_SIZE // 2, seed=seed + 1)
                    yield replace(exact, dtype=torch.float32, integer=False, seed=seed + 2)
                    yield replace(exact, dtype=torch.float16, integer=False, skewed=True, seed=seed + 3)
                    yield replace(exact, integer=False, seed=seed + 4)
                    yield replace(exact, integer=False, quant_mode=QuantMode.INT8_PER_TOKEN, seed=seed + 5)


def _layouts(strategy: str, tp_size: int, dp_size: int) -> Iterator[Case]:
    base = Case(strategy=strategy, tp_size=tp_size, dp_size=dp_size, num_tokens_across_dp=(0,) * dp_size)
    if tp_size * dp_size > 1 or not ALL_STRATEGIES[strategy].needs_expert_parallel:
        yield base
        if tp_size > 1:
            yield replace(base, sharding=TokenSharding.SLICED_OVER_TP)
    if not ALL_STRATEGIES[strategy].needs_expert_parallel:
        yield replace(base, expert_parallel=False)


@lru_cache(maxsize=8)
def _experts(layer: MoELayer, width: int, integer: bool, seed: int) -> LinearExperts:
    draw = LinearExperts.integer if integer else LinearExperts.random
    experts = draw(layer.num_experts, layer.hidden_size, width, seed=seed, dtype=layer.dtype)
    if layer.quant_mode is QuantMode.NONE:
        return experts
    if integer:
        experts.weights[:, COLUMN_OF_THE_LARGEST] = 0
    return experts.quantized()


def grouped_experts(experts: LinearExperts, dtype: torch.dtype) -> ExpertsFunction:
    """A function that runs these experts by the device's grouped matrix product. Outputs have dtype `dtype`."""
    scales = None if experts.scales is None else experts.scales.to(SCALE_DTYPES.get(dtype, torch.float32))

    def run(
        expert_input: torch.Tensor, tokens_per_expert: torch.Tensor, dynamic_scales: torch.Tensor | None = None
    ) -> torch.Tensor:
        output: torch.Tensor = ops_of(expert_input).npu_grouped_matmul(
            expert_input,
            experts.weights,
            tokens_per_expert,
            scale=scales,
            per_token_scale=dynamic_scales,
            output_dtype=dtype,
        )
        return output

    return run


def _replica_placement(case: Case) -> ReplicaPlacement:
    """Random slots for every expert and for replicas, from the case's seed. No rank holds an expert twice."""
    num_ranks = case.tp_size * case.dp_size
    generator = torch.Generator().manual_seed(case.seed)
    order = torch.randperm(case.num_experts, generator=generator).tolist()
    rows = [order[rank::num_ranks] for rank in range(num_ranks)]
    for row in rows:
        others = [
            expert for expert in torch.randperm(case.num_experts, generator=generator).tolist() if expert not in row
        ]
        row += others[: case.redundant_per_rank]
    return ReplicaPlacement.of(rows, case.num_experts)


@dataclass(frozen=True, slots=True)
class CaseTensors:
    """The tensors of all ranks for one case. They are the same on every rank."""

    dtype: torch.dtype
    replicas: ReplicaPlacement | None  # slots of the experts; None: in the order of their ids
    hidden_states: list[torch.Tensor]  # for each DP rank [num_tokens, hidden_size]
    topk_weights: list[torch.Tensor]
    topk_ids: list[torch.Tensor]
    experts: LinearExperts

    @classmethod
    def of(cls, case: Case) -> "CaseTensors":
        """Make the tensors from the case's seed."""
        generator = torch.Generator().manual_seed(case.seed)
        hidden_states, weights, ids = [], [], []
        for num_tokens in case.num_tokens_across_dp:
            logits = torch.randn(num_tokens, case.num_experts, generator=generator)
            if case.skewed:
                logits[:, : case.top_k] += 100
            topk_weights, topk_ids = select_topk(logits, min(case.top_k, case.num_experts))
            x = torch.randn(num_tokens, case.hidden_size, generator=generator)
            if case.integer:
                x = (x * 2).round().clamp(-3, 3)
                if case.quant_mode is not QuantMode.NONE:  # scales are 1 / 64, so int8 is exact
                    x[:, COLUMN_OF_THE_LARGEST] = 127
                    x /= 64
                topk_weights = topk_ids % 2 + 1.0
            hidden_states.append(x.to(case.dtype))
            weights.append(topk_weights)
            ids.append(topk_ids)
        return cls(
            case.dtype,
            _replica_placement(case) if case.redundant_per_rank else None,
            hidden_states,
            weights,
            ids,
            _experts(case.layer, case.width, case.integer, case.seed),
        )

    def input_of(self, topology: ParallelTopology, sharding: TokenSharding, device: torch.device) -> list[torch.Tensor]:
        """Inputs of the layer on one rank: hidden_states, weights, ids.

        Padding rows are NaN, with expert id 0 in every column.
        """
        tensors = [each[topology.dp_rank] for each in (self.hidden_states, self.topk_weights, self.topk_ids)]
        if sharding is TokenSharding.REPLICATED:
            return [tensor.to(device, copy=True) for tensor in tensors]
        num_tokens = tensors[0].shape[0]
        rows = TokenSlice.chunk(num_tokens, rank=0, size=topology.tp_size).length
        own = TokenSlice.chunk(num_tokens, rank=topology.tp_rank, size=topology.tp_size)
        sliced = []
        for tensor in tensors:
            poison = tensor.new_full((rows, tensor.shape[1]), float("nan") if tensor.is_floating_point() else 0)
            poison[: own.length] = own.take(tensor)
            sliced.append(poison.to(device))
        return sliced

    def experts_of(self, topology: ParallelTopology, device: torch.device) -> ExpertsFunction:
        """The experts of one rank as a function on its device."""
        return grouped_experts(self.linear_experts_of(topology).to(device), self.dtype)

    def linear_experts_of(self, topology: ParallelTopology) -> LinearExperts:
        """The experts of one rank: whole experts, or its part of every expert."""
        if self.replicas is not None:
            return self.experts.at(self.replicas.slots[topology.ep_rank])
        if topology.expert_parallel:
            placement = ExpertPlacement(self.experts.weights.shape[0], topology.ep_size)
            return self.experts.on_rank(placement.first_expert(topology.ep_rank), placement.experts_per_rank)
        return self.experts.shard(topology.rank, topology.world_size)

    def expected_on(self, topology: ParallelTopology, sharding: TokenSharding) -> torch.Tensor:
        """The rows of the output that this rank must get, without padding."""
        dp_rank = topology.dp_rank
        hidden_states, experts = self.hidden_states[dp_rank], self.experts
        if experts.scales is not None:
            values, scales = npu_dynamic_quant(hidden_states)
            hidden_states, experts = values * scales, experts.dequantized()
        weights, ids = self.topk_weights[dp_rank], self.topk_ids[dp_rank]
        whole = reference_moe(hidden_states, weights, ids, experts)
        whole = whole.to(self.dtype)
        if sharding is TokenSharding.REPLICATED:
            return whole
        return TokenSlice.chunk(whole.shape[0], rank=topology.tp_rank, size=topology.tp_size).take(whole)


def limits_of_device(rank: Rank) -> DeviceLimits:
    """Limits of the rank's device. COLLECTIVE over all ranks."""
    if rank.device.type == "cuda":
        facts = gather_facts(rank.groups(tp_size=1, dp_size=rank.num_ranks).ep)
        return PORTABLE if why_not_symmetric(facts, tokens_per_rank=1) else NVLINK
    limits: DeviceLimits = ops_of(torch.empty(0, device=rank.device)).device_limits()
    return limits


class _BetweenStagesError(Exception):
    """All ranks raise this error between dispatch and combine."""


def run_random(rank: Rank, run: RandomRun) -> str | None:
    """Run it on this rank. Return the fault, or None. COLLECTIVE over all ranks."""

    def interrupt() -> None:
        raise _BetweenStagesError

    faults: list[str | None] = []
    if run.interrupted:
        with suppress(_BetweenStagesError):
            run_case(rank, run.case, interrupt)
    other = run.between
    between = None if other is None else lambda: faults.append(run_case(rank, other))
    faults.insert(0, run_case(rank, run.case, between))
    return next(filter(None, faults), None)


def poisoned(experts: ExpertsFunction, between: Callable[[], None] | None = None) -> ExpertsFunction:
    """`experts` that first call `between`, and that write NaN and infinity to the rows of no token."""

    def run(
        expert_input: torch.Tensor, tokens_per_expert: torch.Tensor, dynamic_scales: torch.Tensor | None = None
    ) -> torch.Tensor:
        if between is not None:
            between()
        output = experts(expert_input, tokens_per_expert, dynamic_scales)
        unused = torch.arange(output.shape[0], device=output.device)[:, None] >= tokens_per_expert.sum()
        is_odd = torch.arange(output.shape[1], device=output.device) % 2 == 1
        poison = torch.full_like(output, float("nan")).masked_fill(is_odd, float("inf"))
        return torch.where(unused, poison, output)

    return run


def run_case(rank: Rank, case: Case, between: Callable[[], None] | None = None) -> str | None:
    """Run the case on this rank and return the fault, or None. COLLECTIVE over all ranks.

    `between` runs between dispatch and combine.
    """
    groups = rank.groups(tp_size=case.tp_size, dp_size=case.dp_size, expert_parallel=case.expert_parallel)
    tensors = CaseTensors.of(case)
    hidden_states, weights, ids = tensors.input_of(groups.topology, case.sharding, rank.device)
    before = [tensor.clone() for tensor in (hidden_states, weights, ids)]
    step = case.step_on(groups.topology.dp_rank)

    pipeline = build(case.strategy, groups, case.num_physical_experts, case.quant_mode, case.asked)
    experts = poisoned(tensors.experts_of(groups.topology, rank.device), between)
    physical_ids = ids
    if tensors.replicas is not None:
        table = tensors.replicas.eplb_table(rank.device)
        physical_ids = to_physical(ids, table, groups.topology, case.sharding, case.balance_mode)
    finalized = pipeline.run(hidden_states, weights, physical_ids, experts, step)

    expected = tensors.expected_on(groups.topology, case.sharding)
    output = finalized.hidden_states
    for tensor, copy in zip((hidden_states, weights, ids), before, strict=True):
        if not torch.equal(tensor.nan_to_num(), copy.nan_to_num()):
            return f"rank {rank.rank}: an input of the caller was written to"
    if output.shape != (hidden_states.shape[0], case.width) or output.dtype != case.dtype:
        return f"rank {rank.rank}: output is {output.dtype} {tuple(output.shape)}"
    if not finalized.reduced or finalized.sharding is not case.sharding:
        return f"rank {rank.rank}: output is tagged {finalized.sharding}, reduced={finalized.reduced}"
    if not bool(output.isfinite().all()):
        return f"rank {rank.rank}: the output has a NaN or infinity: poison from a row that should be unused"
    return difference_of(rank.rank, output[: expected.shape[0]].cpu(), expected, case)


def difference_of(rank: int, output: torch.Tensor, expected: torch.Tensor, case: Case) -> str | None:
    """Where the output of a case differs from the reference, or None. Both are [rows, width] on the CPU."""
    if output.numel() == 0:
        return None
    tolerance = 0.0 if case.integer else TOLERANCES[case.dtype]
    error = (output.float() - expected.float()).abs()
    if bool((error <= tolerance * (1 + expected.float().abs())).all()):
        return None
    worst = int(error.argmax())
    row, column = divmod(worst, output.shape[1])
    return (
        f"rank {rank}: row {row} column {column} is {output[row, column].item():g}, the reference has "
        f"{expected[row, column].item():g} (tolerance {tolerance:g})"
    )
