"""The choice of a step's strategy, and the construction of its pipeline. select sees only facts that are equal on all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from vllm_npu.core.ascend_recipes import ASKED_NOTHING, HIERARCHY, FusedOperator, MC2Asked
from vllm_npu.core.limits import NVLINK, PORTABLE, DeviceLimits, MC2Limits, MoELayer, QuantMode
from vllm_npu.core.step_plan import StepPlan
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.strategies.dispatch.base import Dispatcher
from vllm_npu.strategies.pipeline import FusedPipeline, MoEPipeline
from vllm_npu.strategies.prepare_finalize.base import PrepareAndFinalize
from vllm_npu.strategies.prepare_finalize.mc2 import EvenPrepareAndFinalize
from vllm_npu.strategies.table import ALL_STRATEGIES, AUTO, FUSED_OPERATORS, FUSED_STRATEGIES
from vllm_npu.transport.base import Groups

# all2all sends a token to the ranks of its experts, allgather to all ranks. Up to this share of the ranks, the saved bytes
# outweigh the exchange of counts. Chosen from the byte model, not yet from measurements on a cluster.
ALL2ALL_MAX_SHARE_OF_RANKS = 0.75


KNOWN_STRATEGIES = ALL_STRATEGIES | FUSED_STRATEGIES


@dataclass(frozen=True, slots=True)
class Selection:
    """The strategy of a step, and the reason for logs and errors."""

    strategy: str
    reason: str


def why_not(
    name: str, topology: ParallelTopology, layer: MoELayer | None = None, device: DeviceLimits = PORTABLE
) -> str | None:
    """The reason why no step of `layer` can take this strategy here, and what to do. None: some step can.

    `layer` None stands for any layer.
    """
    device = device.for_layer(layer, topology.ep_size)
    if KNOWN_STRATEGIES[name].needs_expert_parallel and topology.ep_size == 1:
        return (
            f"{name} needs ep_size > 1 (got 1 on {topology}); use allgather, or start vLLM with --enable-expert-parallel on "
            "more than one rank"
        )
    instead = "all2all" if device.all2all else "allgather"
    if name == "mc2":
        if device.mc2 is None:
            return f"{device.family} has no MC2; use {instead}"
        reason = None if layer is None else device.mc2.why_not(layer, topology.ep_size)
        return reason and f"{reason}; use {instead}"
    if name == "fused_mc2":
        reason = _why_not_fused(topology, layer, device)
        return reason and f"{reason}; use {'mc2' if device.mc2 is not None else instead}"
    if name == "symmetric":
        if device.symmetric is None:
            return f"symmetric needs GPUs of one host that can write each other's memory; use {instead}"
        if topology.ep_size > device.symmetric.max_ep_size:
            return f"symmetric takes up to {device.symmetric.max_ep_size} ranks, not {topology.ep_size}; use {instead}"
        row_bytes = 0 if layer is None else layer.hidden_size * layer.dtype.itemsize
        if row_bytes % device.symmetric.row_alignment:
            return (
                f"symmetric moves rows of a multiple of {device.symmetric.row_alignment} bytes, not {row_bytes} (hidden_size="
                f"{layer and layer.hidden_size}); use {instead}"
            )
    if name == "all2all" and not device.all2all:
        return f"{device.family} runs allgather and naive only; use allgather"
    return None


def _why_not_fused(topology: ParallelTopology, layer: MoELayer | None, device: DeviceLimits) -> str | None:
    if not device.fused_mc2:
        return f"{device.family} has no fused MC2"
    if device.fused_mc2_asked is None:
        return (
            "fused_mc2 needs weights that vllm-ascend prepares with --additional-config '{\"enable_fused_mc2\": 1}', and it is "
            "not set"
        )
    if layer is None:
        return None
    limits = device.fused_limits(layer)
    if limits is None:
        return (
            f"{device.fused_mc2_asked.operator.value} takes no layers of quantisation {layer.quant_mode.name.lower()}"
        )
    return limits.why_not(layer, topology.ep_size)


def why_not_fused_step(topology: ParallelTopology, step: StepPlan, layer: MoELayer, device: DeviceLimits) -> str | None:
    """The reason why this step of a layer that why_not allows cannot take fused_mc2, or None. LOCAL, and equal on all ranks.

    The rows that arrive at a rank are bounded by the counts of all ranks, before any routing is known.
    """
    limits, asked = device.fused_limits(layer), device.fused_mc2_asked
    if limits is None or asked is None:
        return _why_not_fused(topology, layer, device)
    tokens_per_rank = step.padded_tokens(topology.tp_size) // topology.tp_size
    if tokens_per_rank > limits.max_tokens_per_rank:
        return f"fused_mc2 takes {limits.max_tokens_per_rank} tokens a rank, this step brings {tokens_per_rank}"
    if step.own_tokens is not None and not limits.takes_uneven_ranks:
        return f"{limits.name} needs the token counts of all ranks, and they do not agree on them"
    if asked.max_rows is None:
        return None
    padding_travels = not limits.takes_mask and not step.is_full(topology.tp_size)
    sent = tokens_per_rank * topology.ep_size if padding_travels else sum(step.num_tokens_across_dp)
    rows = limits.received_rows(layer, topology.ep_size, sent)
    if rows > asked.max_rows:
        return (
            f"fused_mc2 has room for {asked.max_rows} rows on a rank (mega_moe_max_tokens), and up to {rows} may arrive in "
            "this step"
        )
    return None


def check_strategy(
    name: str, topology: ParallelTopology, layer: MoELayer | None = None, device: DeviceLimits = PORTABLE
) -> None:
    """Raise UnsupportedConfigError for an unknown `name`, and for a strategy that why_not refuses. "auto" is always allowed."""
    if name == AUTO:
        return
    if name not in KNOWN_STRATEGIES:
        raise UnsupportedConfigError(f"unknown moe_comm {name!r}; there are: {AUTO}, {', '.join(KNOWN_STRATEGIES)}")
    reason = why_not(name, topology, layer, device)
    if reason is not None:
        raise UnsupportedConfigError(reason)


def distinct_destinations(num_experts: int, ep_size: int, top_k: int) -> float:
    """Expected number of ranks that hold a token's top_k experts, for uniform routing."""
    elsewhere = 1.0  # probability that a given rank holds none of them
    for chosen in range(top_k):
        elsewhere *= max(num_experts - num_experts / ep_size - chosen, 0) / (num_experts - chosen)
    return ep_size * (1 - elsewhere)


def select(
    requested: str,
    topology: ParallelTopology,
    step: StepPlan,
    *,
    layer: MoELayer,
    device: DeviceLimits = PORTABLE,
) -> Selection:
    """Choose the strategy of a step. LOCAL, and equal on all ranks: no argument may be a fact of one rank alone.

    A requested strategy is taken as it is, with these exceptions. mc2 and symmetric become all2all for a step above their
    capacity, or allgather where the step is captured. fused_mc2 becomes mc2 for a step whose rows may not fit, and what mc2
    becomes where mc2 does not fit. all2all becomes allgather where the step is captured: a graph freezes
    sizes, so all2all would send room for every token to every rank, and these are allgather's bytes or more. Raises
    UnsupportedConfigError where check_strategy does, and for a captured step whose strategy no graph of this device can hold.
    """
    check_strategy(requested, topology, layer, device)
    selection = _select(requested, topology, step, layer, device)
    if step.captured and selection.strategy not in device.captures:
        instead = f"use {' or '.join(device.captures)}, or " if device.captures else ""
        raise UnsupportedConfigError(
            f"{selection.strategy} ({selection.reason}) reads sizes on the host, so no graph can hold it on {device.family}; "
            f"{instead}start vLLM with --enforce-eager"
        )
    return selection


# The more layers a strategy can serve, the earlier it stands. allgather serves every layer; mc2 and symmetric have limits.
MOST_GENERAL_FIRST = ("allgather", "naive", "all2all", "mc2", "fused_mc2", "symmetric")


def select_for_all(
    requested: str,
    topology: ParallelTopology,
    step: StepPlan,
    *,
    layers: Sequence[MoELayer],  # at least one
    device: DeviceLimits = PORTABLE,
) -> Selection:
    """Choose one strategy for a step that runs all these layers. LOCAL, and equal on all ranks. Raises the errors of select.

    Where select would choose differently for two layers, the strategy that serves more layers is taken.
    """
    chosen = [select(requested, topology, step, layer=layer, device=device) for layer in layers]
    return min(chosen, key=lambda selection: MOST_GENERAL_FIRST.index(selection.strategy))


def _select(
    requested: str, topology: ParallelTopology, step: StepPlan, layer: MoELayer, device: DeviceLimits
) -> Selection:
    not_fused = ""
    asked = device.fused_mc2_asked
    if requested == "fused_mc2" or (requested == AUTO and topology.ep_size > 1 and asked is not None):
        reason = why_not("fused_mc2", topology, layer, device) or why_not_fused_step(topology, step, layer, device)
        if reason is None and asked is not None:
            by_auto = f"auto: vllm-ascend's enable_fused_mc2 asks for {asked.operator.value}"
            return Selection("fused_mc2", "requested" if requested == "fused_mc2" else by_auto)
        if requested == "fused_mc2":
            requested = "mc2" if why_not("mc2", topology, layer, device) is None else "all2all"
        not_fused = f" ({reason})"
    selection = _select_apart(requested, topology, step, layer, device)
    return Selection(selection.strategy, selection.reason + not_fused) if not_fused else selection


def _select_apart(
    requested: str, topology: ParallelTopology, step: StepPlan, layer: MoELayer, device: DeviceLimits
) -> Selection:
    """_select among strategies whose experts are the caller's."""
    device = device.for_layer(layer, topology.ep_size)
    tokens_per_rank = step.padded_tokens(topology.tp_size) // topology.tp_size
    instead = "allgather" if step.captured else "all2all"
    if not device.fits(requested, tokens_per_rank):
        most = device.capacities[requested]
        return Selection(instead, f"{requested} takes {most} tokens a rank, this step brings {tokens_per_rank}")
    no_mc2 = None if device.mc2 is None else _why_not_mc2_step(device.mc2, step, topology.tp_size)
    if requested == "mc2" and no_mc2 is not None:
        return Selection(instead, no_mc2)
    if requested == "all2all" and step.captured and "allgather" in device.captures:
        return Selection("allgather", "in a graph, all2all needs room for every token on every rank, as allgather does")
    if requested != AUTO:
        return Selection(requested, "requested")
    if topology.ep_size == 1:
        return Selection("allgather", "auto: no expert parallelism")
    if not device.all2all:
        return Selection("allgather", f"auto: {device.family} runs allgather and naive only")
    kernels = ("symmetric", "mc2") if device.mc2 is not None and device.mc2.native else ("symmetric",)
    for name in kernels:
        if name == "mc2" and no_mc2 is not None:
            continue
        if device.fits(name, tokens_per_rank) and why_not(name, topology, layer, device) is None:
            return Selection(name, f"auto: {tokens_per_rank} tokens a rank fit {device.capacities[name]}")
    if step.captured:
        return Selection("allgather", f"auto: a captured step of {tokens_per_rank} tokens a rank")
    share = distinct_destinations(layer.num_experts, topology.ep_size, layer.top_k) / topology.ep_size
    if share <= ALL2ALL_MAX_SHARE_OF_RANKS:
        return Selection("all2all", f"auto: a token needs {share:.0%} of the {topology.ep_size} ranks")
    return Selection("allgather", f"auto: a token needs {share:.0%} of the {topology.ep_size} ranks")


def _why_not_mc2_step(mc2: MC2Limits, step: StepPlan, tp_size: int) -> str | None:
    """The reason why the ops cannot take the rows of this step, or None. A mask marks padding, which makes ranks even."""
    if mc2.takes_mask:
        return None
    if not step.divides_over_tp(tp_size):
        return (
            f"mc2 takes no mask here, and in {step} a rank has no token, or TP ranks have different numbers of tokens"
        )
    if not mc2.takes_uneven_ranks and not step.is_full(tp_size):
        return f"mc2 takes no mask here and as many rows from each rank, and in {step} ranks differ"
    return None


def build(
    name: str,
    groups: Groups,
    num_experts: int,
    quant_mode: QuantMode = QuantMode.NONE,
    asked: MC2Asked = ASKED_NOTHING,
) -> MoEPipeline:
    """Build the pipeline of a strategy on these groups. LOCAL. `asked`: what options ask of MC2's ops.

    Raises UnsupportedConfigError for an unknown name, and where the topology or the transport cannot carry the strategy.
    """
    # NVLINK refuses nothing that PORTABLE takes. Whether GPUs share memory, SymmetricDispatcher finds out when it opens it.
    check_strategy(name, groups.topology, device=NVLINK)
    prepare_finalize, dispatcher = classes_of(name)
    if name == "mc2" and asked.algorithm == HIERARCHY:  # it takes as many rows from each rank
        prepare_finalize = EvenPrepareAndFinalize
    pipeline = MoEPipeline(
        prepare_finalize=prepare_finalize(groups),
        dispatcher=dispatcher(groups, num_experts, quant_mode),
    )
    pipeline.dispatcher.asked = asked
    return pipeline


def build_fused(
    operator: FusedOperator, groups: Groups, num_experts: int, quant_mode: QuantMode = QuantMode.NONE
) -> FusedPipeline:
    """Build the pipeline of fused_mc2 with this operator on these groups. LOCAL. why_not says whether a layer may take it."""
    row = FUSED_OPERATORS[operator]
    return FusedPipeline(
        prepare_finalize=_class(row.prepare_finalize)(groups),
        fused=_class(row.dispatcher)(groups, num_experts, quant_mode),
    )


def classes_of(name: str) -> tuple[type[PrepareAndFinalize], type[Dispatcher]]:
    """The two classes of a strategy in ALL_STRATEGIES."""
    row = ALL_STRATEGIES[name]
    return _class(row.prepare_finalize), _class(row.dispatcher)


@cache
def _class(path: str) -> Any:
    """Import the class that a row of the table names."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)
