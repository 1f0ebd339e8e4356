"""Forecast of a layer's exchange before anything runs: legal strategies, auto's choice, bytes, and HCCL's buffer."""

from dataclasses import dataclass

from vllm_npu.core.ascend_recipes import INT8_GROUPS
from vllm_npu.core.limits import INT8_GROUP, DeviceLimits, FusedMC2Limits, MC2Limits, MoELayer, QuantMode
from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.core.token_layout import ceil_div
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.strategies.select import distinct_destinations, select, why_not
from vllm_npu.strategies.table import AUTO, FUSED_STRATEGIES, STRATEGIES

ROUTING_BYTES = 8  # a float32 weight and an int32 id, for each expert of a token
ID_BYTES = 4  # an int32 id
SCALE_BYTES = 4  # the float32 scale of an int8 row
COUNT_BYTES = 8  # the int64 count of rows that all2all sends to each rank


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyPlan:
    """Forecast of one strategy on this layer."""

    strategy: str
    reason: str | None  # why the strategy cannot run, and what to do; None: it can run
    collectives: int  # number for one layer
    bytes_sent: int  # by one rank for one layer, routing uniform over experts


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoRange:
    """A range of step sizes for which `auto` takes the same strategy. Sizes are tokens of the DP rank that has most."""

    first_tokens: int
    last_tokens: int
    strategy: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferPlan:
    """The buffer of HCCL that one algorithm of MC2 needs."""

    algorithm: str
    reason: str | None  # why the algorithm cannot run this layer; None: it can run
    tokens_per_rank: int  # size of the planned step, or the algorithm's capacity where that is smaller
    needed_mb: int | None  # HCCL_BUFFSIZE in MiB; None: the algorithm cannot run, or needs no buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """Forecast of one layer."""

    strategies: tuple[StrategyPlan, ...]
    auto: tuple[AutoRange, ...]
    buffers: tuple[BufferPlan, ...]


def plan_layer(layer: MoELayer, topology: ParallelTopology, device: DeviceLimits, num_tokens: int) -> LayerPlan:
    """Forecast the layer for steps of up to `num_tokens` tokens on each DP rank, replicated over TP. LOCAL."""
    strategies = tuple(
        StrategyPlan(
            strategy=name,
            reason=why_not(name, topology, layer, device),
            collectives=collectives(name, topology),
            bytes_sent=bytes_sent(
                name,
                layer,
                topology,
                num_tokens,
                native_mc2=device.mc2 is not None and device.mc2.native,
                combine_quant_mode=0 if device.mc2 is None else device.mc2.combine_quant_mode,
            ),
        )
        for name in (*STRATEGIES, *(FUSED_STRATEGIES if device.fused_mc2 else ()))
    )
    tokens_per_rank = ceil_div(num_tokens, topology.tp_size)
    algorithms: list[MC2Limits | FusedMC2Limits] = [
        limits for limits in (device.mc2, device.mc2_hierarchy) if limits is not None and limits.native
    ]
    if (fused := device.fused_limits(layer)) is not None:
        algorithms.append(fused)
    return LayerPlan(
        strategies=strategies,
        auto=auto_ranges(layer, topology, device, num_tokens),
        buffers=tuple(_buffer(limits, layer, topology.ep_size, tokens_per_rank) for limits in algorithms),
    )


def auto_ranges(
    layer: MoELayer, topology: ParallelTopology, device: DeviceLimits, max_tokens: int
) -> tuple[AutoRange, ...]:
    """The choices of `auto` for steps of 1 to max_tokens tokens, the same number on each DP rank."""
    ranges: list[AutoRange] = []
    for tokens in range(1, max_tokens + 1):
        step = StepPlan(num_tokens_across_dp=(tokens,) * topology.dp_size, sharding=TokenSharding.REPLICATED)
        chosen = select(AUTO, topology, step, layer=layer, device=device)
        first = tokens
        if ranges and ranges[-1].strategy == chosen.strategy:
            first = ranges.pop().first_tokens
        ranges.append(AutoRange(first_tokens=first, last_tokens=tokens, strategy=chosen.strategy, reason=chosen.reason))
    return tuple(ranges)


def collectives(strategy: str, topology: ParallelTopology) -> int:
    """Number of collectives of one layer, for tokens replicated over TP."""
    dp, tp = topology.dp_size, topology.tp_size
    over_ranks = {
        "fused_mc2": 1,
        "mc2": 2,
        "all2all": 3,
        "allgather": 2 if dp > 1 else 0,
        "naive": dp + 1 if dp > 1 else 0,
    }
    return over_ranks[strategy] + (tp > 1)


def bytes_sent(
    strategy: str,
    layer: MoELayer,
    topology: ParallelTopology,
    num_tokens: int,
    *,
    native_mc2: bool,
    combine_quant_mode: int = 0,  # of native mc2
) -> int:
    """Bytes that one rank sends to others for one layer, for num_tokens real tokens on each DP rank, replicated over TP.

    RecordingTransport counts the same bytes. For all2all and native mc2 the number is the mean over uniform routing.
    """
    tp, dp, world = topology.tp_size, topology.dp_size, topology.world_size
    hidden = layer.hidden_size * layer.dtype.itemsize
    there_and_back = sum(row_bytes(strategy, layer, native_mc2=native_mc2, combine_quant_mode=combine_quant_mode))
    if strategy in ("allgather", "naive"):
        return (dp - 1) * num_tokens * there_and_back + 2 * (tp - 1) * num_tokens * hidden // tp
    rows = ceil_div(num_tokens, tp)
    gather_over_tp = (tp - 1) * rows * hidden
    if strategy == "all2all":
        sent_rows = rows * distinct_destinations(layer.num_experts, topology.ep_size, layer.top_k) * (world - 1) / world
        return round(sent_rows * there_and_back) + (world - 1) * COUNT_BYTES + gather_over_tp
    if native_mc2 or strategy == "fused_mc2":
        return rows * layer.top_k * there_and_back * (world - 1) // world + gather_over_tp
    return rows * (world - 1) * there_and_back + gather_over_tp


def row_bytes(strategy: str, layer: MoELayer, *, native_mc2: bool, combine_quant_mode: int = 0) -> tuple[int, int]:
    """Bytes that travel to the experts for one row, with its ids, weights and scale, and bytes that travel back.

    A row is one token for one destination rank. In native mc2 it is one token for one expert. In portable mc2 it is one slot of
    a rank, and top_k rows come back for it.
    """
    back = layer.hidden_size * layer.dtype.itemsize
    there = back if layer.quant_mode is QuantMode.NONE else layer.hidden_size + SCALE_BYTES
    if strategy == "fused_mc2":
        return there, back
    if strategy != "mc2":
        return there + layer.top_k * ROUTING_BYTES, back
    if native_mc2 and combine_quant_mode == INT8_GROUPS:
        back = layer.hidden_size + back // INT8_GROUP
    return (there, back) if native_mc2 else (there + layer.top_k * ID_BYTES, layer.top_k * back)


def _buffer(limits: MC2Limits | FusedMC2Limits, layer: MoELayer, ep_size: int, tokens_per_rank: int) -> BufferPlan:
    """The buffer of one algorithm for steps of up to tokens_per_rank tokens on each rank."""
    planned = min(tokens_per_rank, limits.max_tokens_per_rank)
    reason = limits.why_not(layer, ep_size)
    needed = None if reason else limits.buffer_mb(layer, ep_size, planned)
    return BufferPlan(algorithm=limits.name, reason=reason, tokens_per_rank=planned, needed_mb=needed)
