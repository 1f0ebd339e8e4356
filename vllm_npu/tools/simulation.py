"""Estimated times of an exchange on clusters of up to 768 ranks: an alpha-beta model with the figures of fabrics.toml.

The time of a stage (dispatch, combine) is a start-up time (alpha), plus the time of the busiest rank's bytes on its links
(beta). Links in the node and links between nodes work at the same time, or one after the other if they share ports. The model
ignores contention between ranks, the time of the host, sorting, quantising and overlap. All ranks are data parallel and have
equally many tokens. calibration.py corrects the bytes' time by published times, and says how far off the result may be.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_npu.core.limits import DEVICES, NVLINK, DeviceLimits, MoELayer
from vllm_npu.core.token_layout import ceil_div
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.strategies.planning import COUNT_BYTES, collectives, row_bytes
from vllm_npu.strategies.select import distinct_destinations, why_not
from vllm_npu.strategies.table import ALL_STRATEGIES

FIGURES = Path(__file__).parent / "fabrics.toml"
DRAWN_TOKENS = 1 << 16  # random tokens, from which a skewed demand for experts is estimated
KERNEL, COLLECTIVE = "kernel", "collective"
PER_EXPERT, PER_RANK, PER_NODE, GATHER, SLOTS = "per_expert", "per_rank", "per_node", "gather", "slots"

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fabric:
    """A kind of cluster. fabrics.toml has the figures and their meaning."""

    name: str
    summary: str
    device: str  # GPU, or a family of limits.DEVICES
    ranks_per_node: int
    node_gb_s: float
    node_pair_gb_s: float | None = None
    network_gb_s: float
    shared_links: bool
    kernel_us: float
    kernel_network_us: float
    collective_us: float
    peer_us: float
    tflops: float
    memory_gb_s: float
    sources: Mapping[str, str]

    @property
    def limits(self) -> DeviceLimits:
        """Limits of the device."""
        return NVLINK if self.device == "GPU" else DEVICES[self.device]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Expected number of rows that a token sends to each rank."""

    per_expert: Array  # [ep_size]; if a token sends one row for each chosen expert
    per_rank: Array  # [ep_size]; if a token sends one row to each rank with chosen experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One step of one MoE layer."""

    layer: MoELayer
    ep_size: int
    tokens: int  # of each rank
    intermediate_size: int = 2048  # of an expert
    skew: float = 0.0  # exponent of a Zipf law of the experts' popularity; 0: uniform
    seed: int = 0

    @property
    def placed(self) -> MoELayer:
        """The layer with redundant experts, so that all ranks hold equally many."""
        return replace(self.layer, num_experts=ceil_div(self.layer.num_experts, self.ep_size) * self.ep_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """One strategy on one workload. Times are those of the slowest rank, in microseconds."""

    strategy: str
    reason: str | None  # why the strategy cannot run; then the times are infinite
    dispatch_us: float = np.inf
    combine_us: float = np.inf
    experts_us: float = np.inf
    low: float = 1.0  # published times of such an exchange were this part of their estimates, or more
    high: float = 1.0  # ... and this part or less

    @property
    def exchange_us(self) -> float:
        """Time of dispatch and combine."""
        return self.dispatch_us + self.combine_us

    @property
    def middle_us(self) -> float:
        """The middle of the interval of exchange_us, in the sense of factors. Strategies are compared by it."""
        return float(self.exchange_us * np.sqrt(self.low * self.high))

    @property
    def layer_us(self) -> float:
        """Time of dispatch, experts and combine."""
        return self.exchange_us + self.experts_us


@cache
def figures() -> dict[str, Any]:
    """The content of fabrics.toml."""
    return tomllib.loads(FIGURES.read_text(encoding="utf-8"))


def fabrics() -> dict[str, Fabric]:
    """The fabrics of fabrics.toml by name."""
    return {name: Fabric(name=name, **values) for name, values in figures()["fabrics"].items()}


# --- rows between ranks ---


def popularity(num_experts: int, skew: float, seed: int) -> Array:
    """[num_experts] shares of a Zipf law, which add up to 1. The seed gives their order."""
    shares = np.arange(1, num_experts + 1, dtype=np.float64) ** -skew
    np.random.default_rng(seed).shuffle(shares)
    return shares / shares.sum()


@cache
def draw_choices(num_experts: int, top_k: int, skew: float, seed: int) -> NDArray[np.int64]:
    """[DRAWN_TOKENS, top_k] random experts of each token, all different. Popular experts are chosen more often."""
    waits = np.random.default_rng(seed + 1).standard_exponential((DRAWN_TOKENS, num_experts), dtype=np.float32)
    waits /= popularity(num_experts, skew, seed).astype(np.float32)
    return np.argpartition(waits, top_k - 1, axis=1)[:, :top_k]  # the experts with the shortest waiting times


@cache
def demand(num_experts: int, top_k: int, ep_size: int, skew: float, seed: int) -> Demand:
    """Expected rows of a token for each rank: exact for uniform routing, estimated from DRAWN_TOKENS tokens for skewed routing.

    Rank 0 holds the first experts, rank 1 the next ones. If there are more slots than experts, the last slots hold replicas of
    the first experts, and a token takes any replica.
    """
    if skew == 0:
        even = np.full(ep_size, 1 / ep_size)
        places = ceil_div(num_experts, ep_size) * ep_size
        reached = (
            distinct_destinations(places, ep_size, top_k)
            if places == num_experts
            else _distinct_with_replicas(num_experts, top_k, ep_size)
        )
        return Demand(per_expert=top_k * even, per_rank=reached * even)
    choices = draw_choices(num_experts, top_k, skew, seed)
    ranks = _rank_of(choices, num_experts, ep_size, np.arange(DRAWN_TOKENS)[:, None])
    each_once = np.sort(ranks, axis=1)
    is_first = np.ones_like(each_once, dtype=bool)
    is_first[:, 1:] = each_once[:, 1:] != each_once[:, :-1]
    return Demand(
        per_expert=np.bincount(ranks.ravel(), minlength=ep_size) / DRAWN_TOKENS,
        per_rank=np.bincount(each_once[is_first], minlength=ep_size) / DRAWN_TOKENS,
    )


def _rank_of(experts: NDArray[np.int64], num_experts: int, ep_size: int, token: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rank of each chosen expert. The number of the token decides between replicas."""
    places = ceil_div(num_experts, ep_size) * ep_size
    replicas = (places - 1 - experts) // num_experts + 1  # its slots are expert, expert + num_experts, ...
    return (experts + num_experts * (token % replicas)) // (places // ep_size)


def _distinct_with_replicas(num_experts: int, top_k: int, ep_size: int) -> float:
    choices = draw_choices(num_experts, top_k, 0.0, 0)
    ranks = np.sort(_rank_of(choices, num_experts, ep_size, np.arange(DRAWN_TOKENS)[:, None]), axis=1)
    return float(1 + (ranks[:, 1:] != ranks[:, :-1]).sum() / DRAWN_TOKENS)


def busiest_rows(expected: Array, tokens: int, ranks_per_node: int, seed: int) -> tuple[float, float]:
    """Rows of the busiest rank in its node, and over the network. A rank counts the larger one of sent and received rows.

    `expected` is the number of rows of a token for each rank. Received rows are Poisson numbers from the seed.
    """
    ep_size = len(expected)
    ranks = np.arange(ep_size)
    node = ranks // ranks_per_node
    peers_in_node = np.bincount(node)[node] - 1
    of_node = np.bincount(node, weights=expected)[node]
    generator = np.random.default_rng(seed + 2)
    received_in_node = generator.poisson(tokens * peers_in_node * expected)
    received_outside = generator.poisson(tokens * (ep_size - 1 - peers_in_node) * expected)
    in_node = np.maximum(tokens * (of_node - expected), received_in_node)
    outside = np.maximum(tokens * (expected.sum() - of_node), received_outside)
    return float(in_node.max()), float(outside.max())


# --- times ---


def start_us(fabric: Fabric, ep_size: int, exchange: str, by: str) -> float:
    """Start-up time of a stage."""
    in_node = min(ep_size, fabric.ranks_per_node)
    if by == KERNEL:
        return fabric.kernel_us if ep_size == in_node else fabric.kernel_network_us
    peers = ceil_div(ep_size, fabric.ranks_per_node) - 1 if exchange == GATHER else ep_size - in_node
    return fabric.collective_us + fabric.peer_us * peers


def bytes_us(fabric: Fabric, ep_size: int, in_node: float, outside: float) -> float:
    """Time of a rank's bytes: `in_node` inside the node, `outside` over the network."""
    bandwidth = fabric.node_gb_s
    if fabric.node_pair_gb_s is not None:
        bandwidth = min(bandwidth, fabric.node_pair_gb_s * max(min(ep_size, fabric.ranks_per_node) - 1, 1))
    node, network = in_node / (bandwidth * 1e3), outside / (fabric.network_gb_s * 1e3)
    return node + network if fabric.shared_links else max(node, network)


def rows_of(fabric: Fabric, ep_size: int, exchange: str, tokens: int, wanted: Demand, seed: int) -> tuple[float, float]:
    """Rows of the busiest rank in a stage: in its node, and over the network."""
    ranks = min(ep_size, fabric.ranks_per_node)
    if exchange == GATHER:  # rings: every row passes the port of every rank, and the network once for each node
        return tokens * (ep_size - 1.0), tokens * (ep_size - ranks) / ranks
    if exchange == SLOTS:
        return tokens * (ranks - 1.0), tokens * float(ep_size - ranks)
    rows = wanted.per_expert if exchange == PER_EXPERT else wanted.per_rank
    return busiest_rows(rows, tokens, fabric.ranks_per_node, seed)


def estimate(fabric: Fabric, workload: Workload, strategy: str) -> Estimate:
    """Times of one strategy on one workload, or the reason why it cannot run."""
    from vllm_npu.tools.calibration import Path, calibration_of  # it uses the model

    layer, ep_size, tokens = workload.placed, workload.ep_size, workload.tokens
    topology = ParallelTopology.of_rank(0, tp_size=1, dp_size=ep_size)
    device = fabric.limits.for_layer(layer, ep_size)
    reason = why_not(strategy, topology, layer, device)
    if reason is None and not device.fits(strategy, tokens):
        reason = f"{strategy} takes {device.capacities[strategy]} tokens a rank"
    if reason is not None:
        return Estimate(strategy=strategy, reason=reason)
    wanted = demand(workload.layer.num_experts, layer.top_k, ep_size, workload.skew, workload.seed)
    native = device.mc2 is not None and device.mc2.native
    exchange, by = _protocol(strategy, native_mc2=native)
    rows = rows_of(fabric, ep_size, exchange, tokens, wanted, workload.seed)
    start = start_us(fabric, ep_size, exchange, by)
    calibration = calibration_of(Path.of(fabric, exchange, by, ep_size))
    there, back = (
        calibration.scale(ep_size) * bytes_us(fabric, ep_size, rows[0] * size, rows[1] * size)
        for size in row_bytes(strategy, layer, native_mc2=native)
    )
    starts_of_dispatch = 1 if by == KERNEL else collectives(strategy, topology) - 1
    if strategy == "all2all":
        there += bytes_us(fabric, ep_size, COUNT_BYTES * ep_size, COUNT_BYTES * ep_size)
    return Estimate(
        strategy=strategy,
        reason=None,
        dispatch_us=starts_of_dispatch * start + there,
        combine_us=start + back,
        experts_us=experts_us(fabric, workload, wanted),
        low=calibration.low,
        high=calibration.high,
    )


def _protocol(strategy: str, *, native_mc2: bool) -> tuple[str, str]:
    if strategy == "mc2":
        return (PER_EXPERT, KERNEL) if native_mc2 else (SLOTS, COLLECTIVE)
    return {"symmetric": (PER_RANK, KERNEL), "all2all": (PER_RANK, COLLECTIVE)}.get(strategy, (GATHER, COLLECTIVE))


def experts_us(fabric: Fabric, workload: Workload, wanted: Demand) -> float:
    """Time of the busiest rank's grouped MLP at the device's peak: the products, or the reads of the weights if longer."""
    layer = workload.placed
    rows = float(
        np.random.default_rng(workload.seed + 3).poisson(workload.tokens * workload.ep_size * wanted.per_expert).max()
    )
    weights = 3.0 * layer.hidden_size * workload.intermediate_size  # of one expert: gate, up and down
    weight_bytes = min(layer.num_experts / workload.ep_size, rows) * weights * layer.dtype.itemsize
    return max(2 * rows * weights / (fabric.tflops * 1e6), weight_bytes / (fabric.memory_gb_s * 1e3))


def estimates(fabric: Fabric, workload: Workload) -> list[Estimate]:
    """The estimates of all strategies."""
    return [estimate(fabric, workload, strategy) for strategy in ALL_STRATEGIES]


def fastest(found: Sequence[Estimate]) -> Estimate:
    """The estimate with the shortest exchange, by the middles of the intervals."""
    return min(found, key=lambda each: each.middle_us)
