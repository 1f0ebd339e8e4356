"""Every strategy inside captured graphs against the reference: the cases of `vllm-npu verify --graph`.

A graph freezes the number of rows of a step. So each DP rank pads its tokens to that number, and the rows past its tokens are
NaN. Two graphs of different sizes are captured once, and are replayed in turn over other tokens, other routings and other
token counts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from vllm_npu.core.limits import DeviceLimits
from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.core.token_layout import TokenSlice, ceil_div
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.eplb.replicas import to_physical
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.strategies.pipeline import ExpertsFunction, MoEPipeline
from vllm_npu.strategies.select import build
from vllm_npu.tools.launch import Rank
from vllm_npu.tools.reference import LinearExperts
from vllm_npu.tools.verification import Case, CaseTensors, cases, difference_of, poisoned

GRAPH_CLASSES = {"cuda": "CUDAGraph", "npu": "NPUGraph"}
REPLAYS = 2  # rounds in which each graph is replayed over other tokens


def graph_cases(
    num_ranks: int, *, strategies: tuple[str, ...], quick: bool, seed: int, device: DeviceLimits
) -> Iterator[Case]:
    """The cases whose strategy a graph of this device can hold, without steps of no token.

    Raises UnsupportedConfigError where no graph of the device can hold one of the strategies.
    """
    held = tuple(name for name in strategies if name in device.captures)
    if not held:
        can = ", ".join(device.captures) or "none"
        raise UnsupportedConfigError(
            f"no graph of {device.family} can hold {', '.join(strategies)} (it can hold: {can}); leave --graph out, or "
            "choose another strategy"
        )
    for case in cases(num_ranks, strategies=held, quick=quick, seed=seed, device=device):
        if max(case.num_tokens_across_dp) > 0:
            yield case


@dataclass(frozen=True, slots=True)
class GraphInputs:
    """The tensors of one replay on one rank. All have the rows of the graph."""

    own: list[torch.Tensor]
    """hidden_states, topk_weights, topk_ids of this rank. Rows past its tokens are NaN, with the first experts' ids: a router
    chooses different experts for such a row too."""

    expected: torch.Tensor  # rows of this rank, on the CPU; NaN past its tokens

    @classmethod
    def of(
        cls, tensors: CaseTensors, rows: int, topology: ParallelTopology, sharding: TokenSharding, device: torch.device
    ) -> "GraphInputs":
        """Pad the tensors of every DP rank to `rows` rows, and take this rank's part."""

        def pad(tensor: torch.Tensor) -> torch.Tensor:
            more = rows - tensor.shape[0]
            if tensor.is_floating_point():
                return F.pad(tensor, (0, 0, 0, more), value=float("nan"))
            return torch.cat([tensor, torch.arange(tensor.shape[1], dtype=tensor.dtype).repeat(more, 1)])

        padded = replace(
            tensors,
            hidden_states=[pad(each) for each in tensors.hidden_states],
            topk_weights=[pad(each) for each in tensors.topk_weights],
            topk_ids=[pad(each) for each in tensors.topk_ids],
        )
        expected = pad(tensors.expected_on(topology, TokenSharding.REPLICATED))
        if sharding is TokenSharding.SLICED_OVER_TP:
            own = TokenSlice.chunk(rows, rank=topology.tp_rank, size=topology.tp_size)
            expected = F.pad(
                own.take(expected), (0, 0, 0, ceil_div(rows, topology.tp_size) - own.length), value=float("nan")
            )
        return cls(padded.input_of(topology, sharding, device), expected)


class CapturedStep:
    """One layer's graph on one rank, of a fixed number of rows, with the tensors that it reads and writes."""

    def __init__(
        self,
        pipeline: MoEPipeline,
        as_physical: Callable[[torch.Tensor], torch.Tensor],
        experts: ExpertsFunction,
        step: StepPlan,
        inputs: GraphInputs,
    ) -> None:
        self._inputs = [tensor.clone() for tensor in inputs.own]

        def layer() -> torch.Tensor:
            hidden_states, weights, ids = self._inputs
            return pipeline.run(hidden_states, weights, as_physical(ids), experts, step).hidden_states

        layer()  # opens groups and windows, which no graph can do
        self._replay, self._output = captured(layer, self._inputs[0].device)

    def replay(self, inputs: GraphInputs) -> torch.Tensor:
        """Enqueue a replay over other inputs. The result is valid when the stream has reached it. COLLECTIVE."""
        for static, new in zip(self._inputs, inputs.own, strict=True):
            static.copy_(new)
        self._replay()
        return self._output


def captured(function: Callable[[], torch.Tensor], device: torch.device) -> tuple[Callable[[], None], torch.Tensor]:
    """Capture `function` in a graph of the device. Returns the replay, and the tensor that each replay writes.

    Raises UnsupportedConfigError on a device without graphs.
    """
    if device.type not in GRAPH_CLASSES:
        raise UnsupportedConfigError(f"graphs are captured on GPUs and NPUs, not on {device.type}; leave --graph out")
    module = torch.get_device_module(device)
    graph = getattr(module, GRAPH_CLASSES[device.type])()
    with module.graph(graph):
        output = function()
    replay: Callable[[], None] = graph.replay
    return replay, output


def experts_without_a_sync(experts: LinearExperts, dtype: torch.dtype) -> ExpertsFunction:
    """The experts in float32 by a product for each row. No count is read on the host, unlike in grouped_experts on GPUs."""
    weights = experts.weights.float()
    if experts.scales is not None:
        weights = weights * experts.scales[:, None]

    def run(
        expert_input: torch.Tensor, tokens_per_expert: torch.Tensor, dynamic_scales: torch.Tensor | None = None
    ) -> torch.Tensor:
        rows = torch.arange(expert_input.shape[0], device=expert_input.device)
        expert = torch.searchsorted(tokens_per_expert.cumsum(0), rows, right=True).clamp_max(weights.shape[0] - 1)
        x = expert_input.float()
        if dynamic_scales is not None:
            x = x * dynamic_scales[:, None]
        return torch.bmm(x[:, None], weights[expert])[:, 0].to(dtype)

    return run


def run_in_graphs(rank: Rank, case: Case) -> str | None:
    """Capture the case's layer in two graphs and replay them. Return the fault, or None. COLLECTIVE over all ranks."""
    groups = rank.groups(tp_size=case.tp_size, dp_size=case.dp_size, expert_parallel=case.expert_parallel)
    topology = groups.topology
    pipeline = build(case.strategy, groups, case.num_physical_experts, case.quant_mode)
    first = CaseTensors.of(case)
    table = None if first.replicas is None else first.replicas.eplb_table(rank.device)
    own_experts = first.experts_of(topology, rank.device)
    if rank.device.type == "cuda":
        own_experts = experts_without_a_sync(first.linear_experts_of(topology).to(rank.device), case.dtype)
    experts = poisoned(own_experts)
    most = max(case.num_tokens_across_dp)
    sizes = (most, most + case.tp_size)

    def as_physical(ids: torch.Tensor) -> torch.Tensor:
        return ids if table is None else to_physical(ids, table, topology, case.sharding, case.balance_mode)

    def inputs(size: int, number: int) -> GraphInputs:
        counts = tuple(max(count - number, 0) for count in case.num_tokens_across_dp)
        other = CaseTensors.of(replace(case, num_tokens_across_dp=counts, seed=case.seed + number))
        return GraphInputs.of(
            replace(other, experts=first.experts, replicas=first.replicas), size, topology, case.sharding, rank.device
        )

    graphs: dict[int, CapturedStep] = {}
    for size in sizes:
        step = StepPlan(num_tokens_across_dp=(size,) * case.dp_size, sharding=case.sharding, captured=True)
        graphs[size] = CapturedStep(pipeline, as_physical, experts, step, inputs(size, 0))
    for number in range(REPLAYS):
        in_flight: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        for size, graph in graphs.items():
            wanted = inputs(size, number)
            in_flight.append((size, wanted.expected, graph.replay(wanted)))
        for size, expected, output in in_flight:
            fault = _fault(rank.rank, output.cpu(), expected, case)
            if fault is not None:
                return f"{fault} (graph of {size} rows, replay {number})"
    return None


def _fault(rank: int, output: torch.Tensor, expected: torch.Tensor, case: Case) -> str | None:
    if output.shape != expected.shape or output.dtype != expected.dtype:
        return f"rank {rank}: output is {output.dtype} {tuple(output.shape)}, the reference {tuple(expected.shape)}"
    tokens = int((~expected.isnan().any(1)).sum())  # rows of tokens come first
    return difference_of(rank, output[:tokens], expected[:tokens], case)
