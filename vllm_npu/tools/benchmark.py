"""Times of the exchanges of a mixture-of-experts layer: every strategy and its peers, on the same ranks, in one run.

An exchange brings a rank's tokens to the ranks of their experts, and the outputs back. No expert runs. For mc2 and all2all,
prepare, dispatch, combine and finalize are measured. For allgather and naive, prepare and finalize are measured. For symmetric,
prepare, the exchange of slots and finalize are measured. The last three strategies sort tokens by expert on the rank itself,
and this sort is left out: the peers leave it to the expert kernels.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch

from vllm_npu.core.limits import MoELayer
from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.strategies.dispatch.symmetric import SymmetricDispatcher
from vllm_npu.strategies.dispatch.symmetric_layout import why_not_symmetric
from vllm_npu.strategies.select import build, check_strategy, why_not
from vllm_npu.strategies.table import ALL_STRATEGIES
from vllm_npu.tools.gpu_clock import graph_of, microseconds
from vllm_npu.tools.launch import Rank
from vllm_npu.tools.peers import Peer, PeerExchanges, Tokens
from vllm_npu.tools.reference import select_topk
from vllm_npu.tools.verification import limits_of_device
from vllm_npu.transport.base import Groups, Transport
from vllm_npu.transport.symmetric_memory import gather_facts, open_push
from vllm_npu.trust.recording import CollectiveCounter

HOST_READS_SIZES = ("all2all",)  # the host reads sizes in these exchanges, so no graph can hold them
WARM_UP_ROUNDS = 5
WARM_UP_SECONDS = {"cpu": 0.0, "cuda": 1.0, "npu": 0.0}  # an idle GPU takes this long to raise its clocks
CALLS_IN_A_ROW = 10  # on a GPU; each call then costs a tenth of the start of a graph, or of the ranks' different starts
LINK_BYTES = {"cpu": 16 << 20, "cuda": 64 << 20, "npu": 16 << 20}  # sent by each rank to measure the bandwidth
LINK_ROUNDS = 10
PEER, STRATEGY = "peer", "strategy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One step with uniform routing. All ranks are data parallel."""

    counts: tuple[int, ...]  # tokens of each rank
    layer: MoELayer
    rounds: int  # each round measures every exchange once
    graph: bool = False  # replay captured CUDA graphs
    only: str | None = None  # measure this strategy and the peers; None: all strategies that can run
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One exchange. Times are in microseconds. The slowest rank gives the time of a round."""

    name: str
    kind: str  # "strategy" or "peer"
    us_median: float
    us_p10: float
    us_p90: float
    collectives: int
    bytes_sent_per_rank: float  # mean over ranks
    share_of_limit: float  # time of these bytes at the link's bandwidth, divided by us_median
    link: str  # how that bandwidth was measured: "push" or "all-to-all"
    link_gb_per_s: float


def counts_of(tokens: int, ranks: int, skew: float) -> tuple[int, ...]:
    """Token counts of the ranks: `tokens` on the first one, and tokens / skew, at least one, on each other rank."""
    return (tokens, *[max(1, math.ceil(tokens / skew))] * (ranks - 1))


def measure(rank: Rank, workload: Workload) -> list[Result]:
    """Measure every strategy and every peer. COLLECTIVE over all ranks, which all return the same results."""
    if len(workload.counts) != rank.num_ranks:
        raise UnsupportedConfigError(f"{len(workload.counts)} token counts for {rank.num_ranks} ranks; give one a rank")
    if workload.graph and rank.device.type != "cuda":
        raise UnsupportedConfigError(f"graphs are captured on GPUs only, not on {rank.device.type}; leave --graph out")
    groups = rank.groups(tp_size=1, dp_size=rank.num_ranks)
    tokens = _tokens(rank, workload)
    exchanges = _strategies(rank, workload, tokens) | _peers(groups, tokens)
    clock = _clock(rank, groups.ep, workload.graph)
    runs = [peer.run for _, peer in exchanges.values()]
    _warm_up(rank, groups.ep, clock, runs)
    times = _times(clock, runs, workload.rounds)  # [exchanges, rounds]
    slowest = groups.ep.all_gather(times.to(rank.device)[None]).amax(0)
    bytes_sent = torch.tensor([peer.bytes_sent for _, peer in exchanges.values()], dtype=torch.float64)
    mean_bytes = groups.ep.all_gather(bytes_sent.to(rank.device)[None]).mean(0).tolist()
    link, bandwidth = _bandwidth(rank, groups.ep)
    results = []
    for (name, (kind, peer)), us, sent in zip(exchanges.items(), slowest.cpu(), mean_bytes, strict=True):
        median = float(us.median())
        results.append(
            Result(
                name=name,
                kind=kind,
                us_median=median,
                us_p10=float(us.quantile(0.1)),
                us_p90=float(us.quantile(0.9)),
                collectives=peer.collectives,
                bytes_sent_per_rank=sent,
                share_of_limit=sent / bandwidth / median,
                link=link,
                link_gb_per_s=bandwidth / 1e3,
            )
        )
    return results


def _tokens(rank: Rank, workload: Workload) -> Tokens:
    generator = torch.Generator().manual_seed(workload.seed + rank.rank)
    layer, num_tokens = workload.layer, workload.counts[rank.rank]
    logits = torch.randn(num_tokens, layer.num_experts, generator=generator)
    weights, ids = select_topk(logits, layer.top_k)
    hidden_states = torch.randn(num_tokens, layer.hidden_size, generator=generator).to(layer.dtype)
    return Tokens(
        hidden_states=hidden_states.to(rank.device),
        router_logits=logits.to(rank.device),
        topk_weights=weights.to(rank.device),
        topk_ids=ids.to(rank.device),
        counts=workload.counts,
    )


def _strategies(rank: Rank, workload: Workload, tokens: Tokens) -> dict[str, tuple[str, Peer]]:
    groups = rank.groups(tp_size=1, dp_size=rank.num_ranks)
    limits = limits_of_device(rank)
    found = {}
    if workload.only is not None:
        check_strategy(workload.only, groups.topology, workload.layer, limits)
    for name in ALL_STRATEGIES if workload.only is None else (workload.only,):
        fits = limits.fits(name, max(workload.counts)) and not (workload.graph and name in HOST_READS_SIZES)
        if fits and why_not(name, groups.topology, workload.layer, limits) is None:
            counter = CollectiveCounter()
            counted = _exchange(name, rank.groups(tp_size=1, dp_size=rank.num_ranks, counter=counter), tokens, workload)
            counted()
            run = _exchange(name, groups, tokens, workload)
            found[name] = (STRATEGY, Peer(run, counter.calls.total(), counter.bytes_sent.total()))
    return found


def _exchange(name: str, groups: Groups, tokens: Tokens, workload: Workload) -> Callable[[], torch.Tensor]:
    pipeline = build(name, groups, workload.layer.num_experts)
    step = StepPlan(num_tokens_across_dp=workload.counts, sharding=TokenSharding.REPLICATED)
    routing = (tokens.topk_weights, tokens.topk_ids)

    def prepare_and_finalize() -> torch.Tensor:
        prepared = pipeline.prepare_finalize.prepare(tokens.hidden_states, routing, step)
        return pipeline.prepare_finalize.finalize(prepared.hidden_states, prepared.handle).hidden_states

    def whole() -> torch.Tensor:
        return pipeline.run(tokens.hidden_states, *routing, lambda rows, *_: rows, step).hidden_states

    def slots() -> torch.Tensor:
        dispatcher = pipeline.dispatcher
        if not isinstance(dispatcher, SymmetricDispatcher):
            raise TypeError(f"{name} has a {type(dispatcher).__name__}, which has no slots")
        prepared = pipeline.prepare_finalize.prepare(tokens.hidden_states, routing, step)
        weights, ids = prepared.per_token
        sent = dispatcher.dispatch_slots(prepared.hidden_states, weights, ids, prepared.mask)
        combined = dispatcher.combine_slots(sent.hidden_states, sent.handle)
        return pipeline.prepare_finalize.finalize(combined, prepared.handle).hidden_states

    return {"allgather": prepare_and_finalize, "naive": prepare_and_finalize, "symmetric": slots}.get(name, whole)


def _peers(groups: Groups, tokens: Tokens) -> dict[str, tuple[str, Peer]]:
    return {name: (PEER, peer) for name, peer in PeerExchanges(groups.ep, tokens).all().items()}


Clock = Callable[[Callable[[], object]], float]
"""Runs a function, which all ranks start at the same moment, and returns the microseconds of one call."""


def _clock(rank: Rank, transport: Transport, graph: bool) -> Clock:
    """A clock of the host. On GPUs: a clock of the device, over calls in a row, as the layers of a model follow one another.

    A single eager call would measure mostly how far apart the ranks start: 105 to 178 us where calls in a row took a fourth.
    """

    def host(run: Callable[[], object]) -> float:
        transport.barrier()
        start = time.perf_counter()
        run()
        if rank.device.type != "cpu":
            torch.accelerator.synchronize()
        return (time.perf_counter() - start) * 1e6

    one = torch.zeros(1, device=rank.device)

    def meet() -> None:
        transport.all_reduce(one)

    def in_a_row(run: Callable[[], object]) -> float:
        def calls() -> None:
            for _ in range(CALLS_IN_A_ROW):
                run()

        return microseconds(calls, meet, head_start=False) / CALLS_IN_A_ROW

    graphs: dict[Callable[[], object], Callable[[], None]] = {}

    def replay(run: Callable[[], object]) -> float:
        if run not in graphs:
            graphs[run] = graph_of(run, CALLS_IN_A_ROW)
        return microseconds(graphs[run], meet, head_start=True) / CALLS_IN_A_ROW

    if graph:
        return replay
    return in_a_row if rank.device.type == "cuda" else host


def _warm_up(rank: Rank, transport: Transport, clock: Clock, runs: list[Callable[[], torch.Tensor]]) -> None:
    """Run everything WARM_UP_ROUNDS times, and until WARM_UP_SECONDS are over on all ranks. COLLECTIVE."""
    started, rounds, waiting = time.monotonic(), 0, True
    while rounds < WARM_UP_ROUNDS or waiting:
        for run in runs:
            clock(run)
        rounds += 1
        left = WARM_UP_SECONDS[rank.device.type] - (time.monotonic() - started)
        waiting = bool(transport.all_gather(torch.tensor([left > 0], dtype=torch.uint8, device=rank.device)).any())


def _times(clock: Clock, runs: list[Callable[[], torch.Tensor]], rounds: int) -> torch.Tensor:
    """[runs, rounds] float64 on the CPU. Exchanges take turns, so that a slow moment of the machine slows all of them."""
    return torch.tensor([[clock(run) for run in runs] for _ in range(rounds)], dtype=torch.float64).t().contiguous()


def _bandwidth(rank: Rank, transport: Transport) -> tuple[str, float]:
    """How the link was measured, and the bytes that a rank sends over it in one microsecond. COLLECTIVE.

    "push": every GPU copies into its neighbour's memory, all at once. "all-to-all": one large all-to-all, where ranks share no
    memory. An all-to-all of NCCL reaches about 0.7 of what a push reaches, so it is no limit of the link.
    """
    num_bytes, clock = LINK_BYTES[rank.device.type], _clock(rank, transport, graph=False)
    with ExitStack() as until_measured:
        if rank.device.type == "cuda" and why_not_symmetric(gather_facts(transport), tokens_per_rank=1) is None:
            name, sent = "push", num_bytes
            run = until_measured.enter_context(open_push(transport, num_bytes))
        else:
            part = num_bytes // transport.size
            name, sent = "all-to-all", part * (transport.size - 1)
            x = torch.zeros(part * transport.size, dtype=torch.uint8, device=rank.device)
            sizes = [part] * transport.size
            run = partial(transport.all_to_all, x, sizes, sizes)
        fastest = min(clock(run) for _ in range(LINK_ROUNDS))
    slowest = transport.all_gather(torch.tensor([fastest], dtype=torch.float64, device=rank.device)).max()
    return name, sent / float(slowest)


def best(results: list[Result]) -> Result:
    """The fastest strategy."""
    return min((each for each in results if each.kind == STRATEGY), key=lambda each: each.us_median)


def with_ratios(results: list[Result]) -> Iterator[tuple[Result, float]]:
    """Each result, with its time divided by the time of AgRs."""
    agrs = next(each.us_median for each in results if each.name == "AgRs")
    for each in results:
        yield each, each.us_median / agrs
