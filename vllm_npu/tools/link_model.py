"""The links of clusters of up to 768 ranks, with the figures of fabrics.toml, and the rows that an exchange moves over them.

The time of a stage (dispatch, combine) is a start-up time (alpha), plus the time of the busiest rank's bytes on its links
(beta). Links in the node and links between nodes work at the same time, or one after the other if they share ports. All ranks
are data parallel and have equally many tokens.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_npu.core.limits import DEVICES, NVLINK, DeviceLimits
from vllm_npu.core.token_layout import ceil_div
from vllm_npu.strategies.select import distinct_destinations

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
