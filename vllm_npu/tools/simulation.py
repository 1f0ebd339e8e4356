"""Estimated times of strategies on clusters of up to 768 ranks: link_model.py's times, with calibration.py's corrections.

The estimates ignore contention between ranks, the time of the host, sorting, quantising and overlap. docs/simulate.md compares
them with published times.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vllm_npu.core.limits import MoELayer
from vllm_npu.core.token_layout import ceil_div
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.strategies.planning import COUNT_BYTES, collectives, row_bytes
from vllm_npu.strategies.select import why_not
from vllm_npu.strategies.table import ALL_STRATEGIES
from vllm_npu.tools.calibration import RowPath, calibration_of
from vllm_npu.tools.link_model import (
    COLLECTIVE,
    GATHER,
    KERNEL,
    PER_EXPERT,
    PER_RANK,
    SLOTS,
    Demand,
    Fabric,
    bytes_us,
    demand,
    rows_of,
    start_us,
)


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


def estimate(fabric: Fabric, workload: Workload, strategy: str) -> Estimate:
    """Times of one strategy on one workload, or the reason why it cannot run."""
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
    calibration = calibration_of(RowPath.of(fabric, exchange, by, ep_size))
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
