"""Checks before the first token. They are pure functions of facts that are equal on every rank."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from vllm_npu.core.expert_limits import ExpertsWanted
from vllm_npu.core.limits import DeviceLimits, FusedMC2Limits, MC2Limits, MoELayer
from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.core.token_layout import ceil_div
from vllm_npu.core.topology import ExpertPlacement, ParallelTopology
from vllm_npu.errors import DeviceLimitError, HcclBufferError, UnsupportedConfigError, UnsupportedDeviceError
from vllm_npu.strategies.select import check_strategy, classes_of, select, why_not, why_not_fused_step
from vllm_npu.strategies.table import AUTO

Limits = TypeVar("Limits", MC2Limits, FusedMC2Limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedShape:
    """The steps that the engine is configured for. Sizes are numbers of tokens on one DP rank."""

    decode_tokens: int  # size of the step in which all sequences decode at once; mc2 is for such steps
    graph_tokens: tuple[int, ...] = ()  # sizes of the steps that run as captured graphs; empty: all steps run eagerly


def check_choice(top_k: int | None, num_experts: int | None) -> None:
    """Raise UnsupportedConfigError for tokens that choose more experts than a layer has. LOCAL. None: not known, which passes.

    An engine on any device, `vllm-npu doctor` and `vllm-npu plan` call it. Without it, top-k fails in the first step, or an op
    reads past the scores.
    """
    if top_k is not None and num_experts is not None and top_k > num_experts:
        raise UnsupportedConfigError(
            f"a token chooses {top_k} experts of {num_experts}; correct config.json (num_experts_per_tok and the number of "
            "experts), --hf-overrides, or --topk and --experts"
        )


def check_chip(topology: ParallelTopology, device: DeviceLimits) -> None:
    """Raise UnsupportedDeviceError where tokens would travel between chips on which no engine can have that. LOCAL.

    An engine and `vllm-npu doctor --model` call it.
    """
    if device.no_engine is not None and (topology.ep_size > 1 or topology.dp_size > 1):
        raise UnsupportedDeviceError(
            f"vllm_npu moves no tokens between chips of {device.family}: {device.no_engine}. Leave out "
            "--enable-expert-parallel and --data-parallel-size, or keep vllm-ascend's own communication: --additional-config "
            '\'{"vllm_npu": {"moe_comm": "off"}}\''
        )


def check_experts(wanted: ExpertsWanted, topology: ParallelTopology, device: DeviceLimits) -> None:
    """Raise UnsupportedConfigError for experts that the device cannot compute where tokens travel. LOCAL.

    An engine, `vllm-npu doctor --model` and `vllm-npu plan --model` call it. A fact that config.json does not give passes.
    """
    if device.experts is None or (topology.ep_size == 1 and topology.dp_size == 1):
        return
    reason = device.experts.why_not(wanted)
    if reason is not None:
        raise UnsupportedConfigError(reason)


def check_inside_vllm(strategy: str, *, replicated_over_tp: bool, extra_tensors: int) -> None:
    """Raise UnsupportedConfigError where the strategy cannot carry a layer whose experts are vLLM's. LOCAL.

    replicated_over_tp: several TP ranks hold the same tokens. extra_tensors: what the experts want beside each row.
    """
    prepare_finalize, dispatcher = classes_of(strategy)
    if replicated_over_tp and not prepare_finalize.gathers_tokens:
        raise UnsupportedConfigError(
            f"{strategy} completes the sum over TP, and vLLM would add it up again for this model, whose tokens are replicated "
            "over TP; choose allgather or naive, or set --tensor-parallel-size 1"
        )
    most = dispatcher.max_extra_tensors
    if most is not None and extra_tensors > most:
        raise UnsupportedConfigError(
            f"{strategy} does not send what quantised experts need beside their rows; choose symmetric (one tensor of scales), "
            "all2all, allgather or naive"
        )


def check_start(
    requested: str,
    topology: ParallelTopology,
    layer: MoELayer,
    device: DeviceLimits,
    *,
    shape: PlannedShape,
    hccl_buffer_mb: int,
) -> DeviceLimits:
    """Return `device` with the capacities of the layer's MC2 algorithm and fused operator lowered to what HCCL's buffer takes.
    LOCAL, and equal on all ranks that have the same HCCL_BUFFSIZE. The result serves as `device` for the next layer of the
    model.

    Raises UnsupportedDeviceError for a chip without the op of `requested`. Raises DeviceLimitError for a layer past the op's
    limits, and for fused_mc2 where the rows of decode steps may not fit. Raises HcclBufferError where even the decode steps do
    not fit the buffer. Raises UnsupportedConfigError where the experts do not divide over the ranks, and ranks may not differ;
    where vllm-ascend prepares no weights for fused_mc2; for a strategy that reads counts on the host inside of a graph.
    """
    layer = device.placed(layer, topology.ep_size)
    ExpertPlacement(layer.num_experts, topology.ep_size)
    for_layer = device.for_layer(layer, topology.ep_size)
    check_strategy(AUTO if requested in ("mc2", "fused_mc2") else requested, topology, layer, device)
    device = _check_fused(requested, topology, layer, device, shape, hccl_buffer_mb)
    reason = why_not("mc2", topology, layer, device)
    if requested == "mc2" and reason is not None:
        raise (UnsupportedDeviceError if device.mc2 is None else DeviceLimitError)(reason)
    # Also for another request, since a running engine may switch to mc2.
    if reason is None and for_layer.mc2 is not None:
        if requested in (AUTO, "mc2"):
            _check_buffer(topology, layer, for_layer.mc2, shape, hccl_buffer_mb)
        lowered = _within_buffer(topology, layer, for_layer.mc2, hccl_buffer_mb)
        is_hierarchy = for_layer.mc2 is device.mc2_hierarchy
        device = replace(device, mc2_hierarchy=lowered) if is_hierarchy else replace(device, mc2=lowered)
    for tokens in shape.graph_tokens:
        counts = (tokens,) * topology.dp_size
        step = StepPlan(num_tokens_across_dp=counts, sharding=TokenSharding.REPLICATED, captured=True)
        select(requested, topology, step, layer=layer, device=device)
    return device


def _check_fused(
    requested: str,
    topology: ParallelTopology,
    layer: MoELayer,
    device: DeviceLimits,
    shape: PlannedShape,
    hccl_buffer_mb: int,
) -> DeviceLimits:
    """Return the device with the fused operator's capacity for this layer. Where fused_mc2 is `requested`, raise the errors of
    check_start unless the decode steps fit."""
    reason = why_not("fused_mc2", topology, layer, device)
    limits = device.fused_limits(layer)
    if requested == "fused_mc2" and reason is not None:
        if not device.fused_mc2:
            raise UnsupportedDeviceError(reason)
        raise (UnsupportedConfigError if device.fused_mc2_asked is None else DeviceLimitError)(reason)
    if reason is not None or limits is None:
        return device
    lowered = _within_buffer(topology, layer, limits, hccl_buffer_mb)
    fitting = replace(device, fused_mc2=tuple(lowered if each is limits else each for each in device.fused_mc2))
    if requested == "fused_mc2":
        _check_fused_decode(topology, layer, limits, fitting, shape, hccl_buffer_mb)
    return fitting


def _check_fused_decode(
    topology: ParallelTopology,
    layer: MoELayer,
    limits: FusedMC2Limits,
    fitting: DeviceLimits,
    shape: PlannedShape,
    hccl_buffer_mb: int,
) -> None:
    """Raise HcclBufferError or DeviceLimitError if the decode steps never fit, with the number to set."""
    planned = ceil_div(shape.decode_tokens, topology.tp_size)
    needed = limits.buffer_mb(layer, topology.ep_size, planned)
    if needed > hccl_buffer_mb:
        facts = f"{topology}, top {layer.top_k}, hidden size {layer.hidden_size}"
        raise _buffer_error(limits, needed, planned, facts, hccl_buffer_mb)
    decode = StepPlan(num_tokens_across_dp=(shape.decode_tokens,) * topology.dp_size, sharding=TokenSharding.REPLICATED)
    reason = why_not_fused_step(topology, decode, layer, fitting)
    if reason is None:
        return
    todo, asked = "lower --max-num-seqs, or choose another moe_comm", fitting.fused_mc2_asked
    if asked is not None and asked.max_rows is not None:
        rows = limits.received_rows(layer, topology.ep_size, planned * topology.ep_size)
        todo = f"set vllm-ascend's --additional-config '{{\"mega_moe_max_tokens\": {rows}}}', {todo}"
    raise DeviceLimitError(f"{reason}: the decode step of --max-num-seqs; {todo}")


def _check_buffer(
    topology: ParallelTopology, layer: MoELayer, limits: MC2Limits, shape: PlannedShape, hccl_buffer_mb: int
) -> None:
    """Raise HcclBufferError unless the buffer takes the decode steps, or all steps within the op's own capacity."""
    planned = min(ceil_div(shape.decode_tokens, topology.tp_size), limits.max_tokens_per_rank)
    needed = limits.buffer_mb(layer, topology.ep_size, planned)
    if needed is not None and needed > hccl_buffer_mb:
        facts = f"{topology}, {layer.num_experts} experts, hidden size {layer.hidden_size}"
        raise _buffer_error(limits, needed, planned, facts, hccl_buffer_mb)


def _within_buffer(topology: ParallelTopology, layer: MoELayer, limits: Limits, hccl_buffer_mb: int) -> Limits:
    """Return the limits with the largest capacity that the buffer takes. More tokens never need less of it."""
    capacity = bisect_right(
        range(1, limits.max_tokens_per_rank + 1),
        hccl_buffer_mb,
        key=lambda tokens: limits.buffer_mb(layer, topology.ep_size, tokens) or 0,
    )
    return replace(limits, max_tokens_per_rank=capacity)


def _buffer_error(
    limits: MC2Limits | FusedMC2Limits, needed: int, planned: int, facts: str, hccl_buffer_mb: int
) -> HcclBufferError:
    return HcclBufferError(
        f"{limits.name} needs HCCL_BUFFSIZE={needed} for steps of {planned} tokens a rank ({facts}), and it is "
        f"{hccl_buffer_mb} (MiB); export HCCL_BUFFSIZE={needed} on every rank, lower --max-num-seqs, or choose another moe_comm"
    )


def describe_capacity(device: DeviceLimits, topology: ParallelTopology, layers: Sequence[MoELayer]) -> str:
    """Describe in one line for the log how many tokens MC2 takes here, or why it runs no step."""
    for layer in layers:
        reason = why_not("mc2", topology, layer, device)
        if reason is not None:
            return f"no mc2: {reason}{_describe_fused(device, topology, layers)}"
    by_layer = [device.for_layer(layer, topology.ep_size) for layer in layers]
    capacity = min(limits.capacities["mc2"] for limits in by_layer)
    asked = {_arguments(limits.mc2) for limits in by_layer if limits.mc2 is not None}
    return (
        f"mc2{''.join(sorted(asked))} takes up to {capacity} tokens a rank{_describe_fused(device, topology, layers)}"
    )


def _arguments(mc2: MC2Limits) -> str:
    """The arguments of MC2's ops that are not their defaults, in brackets."""
    arguments = [f"comm_alg={mc2.comm_alg}"] if mc2.comm_alg else []
    arguments += [f"comm_quant_mode={mc2.combine_quant_mode}"] if mc2.combine_quant_mode else []
    return f" ({', '.join(arguments)})" if arguments else ""


def _describe_fused(device: DeviceLimits, topology: ParallelTopology, layers: Sequence[MoELayer]) -> str:
    """What fused_mc2 takes, behind a semicolon. Nothing if vllm-ascend was not asked for it."""
    asked = device.fused_mc2_asked
    if asked is None:
        return ""
    reasons = [why_not("fused_mc2", topology, layer, device) for layer in layers]
    if any(reasons):
        return f"; no fused_mc2: {next(filter(None, reasons))}"
    most = min(limits.max_tokens_per_rank for layer in layers if (limits := device.fused_limits(layer)) is not None)
    rows = "" if asked.max_rows is None else f", and up to {asked.max_rows} rows that arrive at one"
    return f"; fused_mc2 takes up to {most} tokens a rank{rows}"
