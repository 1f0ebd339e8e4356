"""The MoE layer as vLLM builds it, on several ranks, against a dense computation from the same weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.time_limits import on_this_machine
from tests.vllm.vllm_ranks import (
    DP2,
    DP4,
    HIDDEN,
    NUM_EXPERTS,
    TOP_K,
    TP2,
    TP2_DP2,
    TP4,
    Grid,
    VllmRanks,
    Weights,
    build_layer,
    make_config,
    own_slice,
    ranks,  # noqa: F401 - fixture
    seconds_until_error,
    vllm_step,
)
from vllm_npu.core.token_layout import TokenSlice
from vllm_npu.errors import InvalidInputError, PlanDisagreementError, UnsupportedConfigError
from vllm_npu.strategies.table import STRATEGIES

pytest.importorskip("vllm")

REFUSAL_SECONDS = 10  # for a vote of the ranks that fails, on a quiet machine; a time-out takes longer
DP2_NO_EP, TP2_DP2_NO_EP, TP2_NO_EP = Grid(1, 2, ep=False), Grid(2, 2, ep=False), Grid(2, 1, ep=False)


@dataclass(frozen=True)
class Layout:
    """A grid, and whether the model slices its tokens over TP before the layer."""

    grid: Grid
    sequence_parallel: bool = False

    @property
    def strategies(self) -> list[str]:
        return [name for name, row in STRATEGIES.items() if self.grid.ep or not row.needs_expert_parallel]

    def __str__(self) -> str:
        return f"{self.grid}{'-sliced' if self.sequence_parallel else ''}"


LAYOUTS = [
    Layout(TP2),
    Layout(DP2),
    Layout(DP2_NO_EP),
    Layout(TP2_DP2),
    Layout(TP2_DP2, sequence_parallel=True),
    Layout(TP2_DP2_NO_EP),
    Layout(TP4),
]


def counts_of(grid: Grid) -> list[tuple[int, ...]]:
    return [(5,), (1,), (8,)] if grid.dp == 1 else [(5, 2), (1, 1), (0, 3), (4, 9)]


@dataclass(frozen=True)
class Tokens:
    """One step's input on this rank, and the rows of its output that are tokens."""

    hidden_states: torch.Tensor
    router_logits: torch.Tensor
    whole: tuple[torch.Tensor, torch.Tensor]  # the DP rank's, before slicing
    own: TokenSlice  # of the whole

    @classmethod
    def random(cls, layout: Layout, grid: Grid, counts, dtype: torch.dtype, num_experts: int = NUM_EXPERTS) -> "Tokens":
        generator = torch.Generator().manual_seed(sum(counts))
        total = sum(counts)
        hidden_states = torch.randn(total, HIDDEN, generator=generator).to(dtype).split(counts)[grid.dp_rank]
        router_logits = torch.randn(total, num_experts, generator=generator).to(dtype).split(counts)[grid.dp_rank]
        if not layout.sequence_parallel:
            own = TokenSlice(0, hidden_states.shape[0])
            return cls(hidden_states.clone(), router_logits.clone(), (hidden_states, router_logits), own)
        return cls(
            own_slice(grid, hidden_states),
            own_slice(grid, router_logits),
            (hidden_states, router_logits),
            TokenSlice.chunk(hidden_states.shape[0], rank=grid.tp_rank, size=grid.tp),
        )


def dense_moe(tokens: Tokens, weights: Weights, *, shared: bool, top_k: int = TOP_K) -> torch.Tensor:
    """Compute the layer in float64, with every expert on every token. Returns the rows of this rank's output."""
    x, logits = (tensor.double() for tensor in tokens.whole)
    scores, ids = logits.softmax(-1).topk(top_k, dim=-1)
    choice = torch.zeros_like(logits).scatter_(1, ids, scores / scores.sum(-1, keepdim=True))
    gate, up, down = weights.gate.double(), weights.up.double(), weights.down.double()
    each = torch.einsum("ehi,eti->eth", down, F.silu(x @ gate.transpose(1, 2)) * (x @ up.transpose(1, 2)))
    output = torch.einsum("te,eth->th", choice, each)
    if shared:
        inner = F.silu(x @ weights.shared_gate.double().T) * (x @ weights.shared_up.double().T)
        output += inner @ weights.shared_down.double().T
    return tokens.own.take(output)


def check_output(output: torch.Tensor, tokens: Tokens, expected: torch.Tensor, what: Any) -> None:
    assert output.shape == tokens.hidden_states.shape, what
    assert output.dtype == tokens.hidden_states.dtype, what
    atol, rtol = (1e-5, 1e-5) if output.dtype == torch.float32 else (8e-2, 5e-2)
    torch.testing.assert_close(
        output[: tokens.own.length].double(), expected, atol=atol, rtol=rtol, msg=lambda text: f"{what}: {text}"
    )


# ----------------------------------------------------------------------------------------- against the dense layer


def run_against_dense(grid: Grid, layout: Layout, shared: bool, dtype: torch.dtype) -> None:
    from vllm_npu.plugin.cpu.moe_runner import CpuMoERunner
    from vllm_npu.plugin.step_planner import planner_of

    config = make_config(grid)
    layer = build_layer(grid, config, dtype=dtype, shared=shared, sequence_parallel=layout.sequence_parallel)
    assert type(layer) is CpuMoERunner
    planner = planner_of(config)
    for strategy in layout.strategies:
        planner.propose(strategy)
        for counts in counts_of(grid):
            tokens = Tokens.random(layout, grid, counts, dtype)
            before = tokens.hidden_states.clone(), tokens.router_logits.clone()
            with vllm_step(grid, config, counts):
                output = layer(hidden_states=tokens.hidden_states, router_logits=tokens.router_logits)
            assert planner.selection.strategy == strategy
            expected = dense_moe(tokens, Weights.random(dtype), shared=shared)
            check_output(output, tokens, expected, (strategy, counts))
            after = tokens.hidden_states, tokens.router_logits
            torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shared", [False, True], ids=["routed", "shared"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_strategy_gives_the_dense_output(ranks: VllmRanks, layout, shared, dtype):  # noqa: F811
    ranks.run(run_against_dense, layout.grid, layout, shared, dtype)


def run_uneven(grid: Grid, layout: Layout, num_experts: int) -> None:
    from vllm_npu.plugin.step_planner import planner_of

    config = make_config(grid)
    layer = build_layer(grid, config, num_experts=num_experts, sequence_parallel=layout.sequence_parallel)
    fewest, fuller = divmod(num_experts, grid.size)
    assert layer.routed_experts.local_num_experts == fewest + (grid.rank < fuller)
    weights = Weights.random(torch.float32, num_experts)
    for strategy in layout.strategies:
        planner_of(config).propose(strategy)
        for counts in ((5, 2, 0, 9)[: grid.dp], (1,) * grid.dp):
            tokens = Tokens.random(layout, grid, counts, torch.float32, num_experts)
            with vllm_step(grid, config, counts):
                output = layer(hidden_states=tokens.hidden_states, router_logits=tokens.router_logits)
            assert planner_of(config).selection.strategy == strategy
            check_output(output, tokens, dense_moe(tokens, weights, shared=False), (strategy, counts))


@pytest.mark.parametrize("num_experts", [5, 6, 7])
@pytest.mark.parametrize("layout", [Layout(TP2_DP2, sequence_parallel=True), Layout(TP4), Layout(DP4)], ids=str)
def test_ranks_may_differ_by_one_expert(ranks: VllmRanks, layout, num_experts):  # noqa: F811
    ranks.run(run_uneven, layout.grid, layout, num_experts)


def outputs_of(layer: Any, config: Any, grid: Grid, layout: Layout) -> Iterator[tuple[str, Tokens, torch.Tensor]]:
    """Run each strategy in a step of its own on the same tokens. Yields its name, the tokens and the layer's output."""
    from vllm_npu.plugin.step_planner import planner_of

    counts = counts_of(grid)[0]
    for strategy in layout.strategies:
        planner_of(config).propose(strategy)
        tokens = Tokens.random(layout, grid, counts, torch.float32)
        with vllm_step(grid, config, counts):
            output = layer(hidden_states=tokens.hidden_states, router_logits=tokens.router_logits)
        yield strategy, tokens, output


def run_variant(grid: Grid, layout: Layout, options, top_k: int, factor: float) -> None:
    """`factor` scales the routed output. The shared experts' output is added without it."""
    config = make_config(grid)
    layer = build_layer(grid, config, shared=True, top_k=top_k, **options)
    weights = Weights.random(torch.float32)
    for strategy, tokens, output in outputs_of(layer, config, grid, layout):
        routed = dense_moe(tokens, weights, shared=False, top_k=top_k)
        shared = dense_moe(tokens, weights, shared=True, top_k=top_k) - routed
        check_output(output, tokens, routed * factor + shared, (strategy, options))


@pytest.mark.parametrize("layout", [Layout(TP2_DP2), Layout(TP2_DP2_NO_EP)], ids=str)
def test_routed_experts_are_scaled_once(ranks: VllmRanks, layout):  # noqa: F811
    options = {"routed_scaling_factor": 2.5, "apply_routed_scale_to_output": True}
    ranks.run(run_variant, layout.grid, layout, options, TOP_K, 2.5)


def run_weight_on_input(grid: Grid, layout: Layout) -> None:
    config = make_config(grid)
    layer = build_layer(grid, config, top_k=1, renormalize=False, apply_router_weight_on_input=True)
    weights = Weights.random(torch.float32)
    for strategy, tokens, output in outputs_of(layer, config, grid, layout):
        x, logits = tokens.whole
        weighted = x * logits.softmax(-1).amax(-1, keepdim=True)
        expected = dense_moe(Tokens(weighted, logits, (weighted, logits), tokens.own), weights, shared=False, top_k=1)
        check_output(output, tokens, expected, strategy)


@pytest.mark.parametrize("layout", [Layout(TP2), Layout(DP2)], ids=str)
def test_the_router_weight_may_go_on_the_input(ranks: VllmRanks, layout):  # noqa: F811
    ranks.run(run_weight_on_input, layout.grid, layout)


def run_routed_outside(grid: Grid, layout: Layout) -> None:
    """As vLLM's transformers backend builds and calls the layer if the model's own router has chosen the experts."""
    from vllm.model_executor.models.transformers.moe import TransformersMoERunner, TransformersMoEState

    from vllm_npu.plugin.cpu.moe_runner import CpuTransformersMoERunner
    from vllm_npu.plugin.step_planner import planner_of

    config, state = make_config(grid), TransformersMoEState()
    layer = build_layer(
        grid,
        config,
        runner_cls=TransformersMoERunner,
        runner_args={"moe_state": state},
        custom_routing_function=lambda gating_output, **_: (gating_output, state.topk_ids),
    )
    assert type(layer) is CpuTransformersMoERunner
    for strategy in layout.strategies:
        planner_of(config).propose(strategy)
        for counts in counts_of(grid):
            tokens = Tokens.random(layout, grid, counts, torch.float32)
            scores, ids = tokens.router_logits.softmax(-1).topk(TOP_K, dim=-1)
            with vllm_step(grid, config, counts):
                output = layer(tokens.hidden_states, ids, scores / scores.sum(-1, keepdim=True))
            expected = dense_moe(tokens, Weights.random(torch.float32), shared=False)
            check_output(output, tokens, expected, (strategy, counts))


@pytest.mark.parametrize("layout", [Layout(TP2), Layout(DP2), Layout(TP2_DP2)], ids=str)
def test_a_model_may_choose_the_experts_itself(ranks: VllmRanks, layout):  # noqa: F811
    ranks.run(run_routed_outside, layout.grid, layout)


def run_bias(grid: Grid, layout: Layout) -> None:
    config = make_config(grid)
    layer = build_layer(grid, config, has_bias=True)
    generator = torch.Generator().manual_seed(5)
    experts = layer.routed_experts
    down_bias = torch.randn(NUM_EXPERTS, HIDDEN, generator=generator)
    experts.w13_bias.data.zero_()
    experts.w2_bias.data.zero_()
    # Where every rank has a shard of each expert, the model's own loader gives the bias to the first (gpt_oss in vLLM).
    for expert in range(NUM_EXPERTS if layer.moe_config.tp_rank == 0 else 0):
        experts.w2_bias.weight_loader(
            experts.w2_bias, down_bias[expert], "model.layers.0.mlp.experts.w2_bias", "w2", expert
        )
    weights = Weights.random(torch.float32)
    for strategy, tokens, output in outputs_of(layer, config, grid, layout):
        logits = tokens.whole[1].double()
        scores, ids = logits.softmax(-1).topk(TOP_K, dim=-1)
        choice = torch.zeros_like(logits).scatter_(1, ids, scores / scores.sum(-1, keepdim=True))
        expected = dense_moe(tokens, weights, shared=False) + choice @ down_bias.double()
        check_output(output, tokens, expected, strategy)


@pytest.mark.parametrize("layout", [Layout(TP2), Layout(TP2_DP2), Layout(DP2_NO_EP), Layout(TP2_DP2_NO_EP)], ids=str)
def test_an_experts_bias_is_added_once(ranks: VllmRanks, layout):  # noqa: F811
    ranks.run(run_bias, layout.grid, layout)


class Narrowing(torch.nn.Module):
    """A latent MoE's projections: the routed experts see the first HIDDEN columns."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., :HIDDEN].contiguous()


class Widening(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, HIDDEN))


class WideShared(torch.nn.Module):
    """Shared experts on 2 * HIDDEN columns. Each TP rank holds a share, so the shares add up to `x`."""

    def __init__(self, tp_size: int) -> None:
        super().__init__()
        self.tp_size = tp_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / self.tp_size


def run_latent(grid: Grid, layout: Layout) -> None:
    from vllm_npu.plugin.step_planner import planner_of

    config = make_config(grid)
    layer = build_layer(
        grid,
        config,
        shared_experts=WideShared(grid.tp),
        routed_input_transform=Narrowing(),
        routed_output_transform=Widening(),
    )
    for strategy in layout.strategies:
        planner_of(config).propose(strategy)
        counts = counts_of(grid)[0]
        tokens = Tokens.random(layout, grid, counts, torch.float32)
        wide = torch.cat([tokens.hidden_states, -tokens.hidden_states], dim=1)
        with vllm_step(grid, config, counts):
            output = layer(hidden_states=wide, router_logits=tokens.router_logits)
        routed = dense_moe(tokens, Weights.random(torch.float32), shared=False)
        expected = wide.double() + F.pad(routed, (0, HIDDEN))
        torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [Layout(TP2), Layout(TP2_DP2)], ids=str)
def test_shared_experts_may_be_wider_than_the_routed_ones(ranks: VllmRanks, layout):  # noqa: F811
    ranks.run(run_latent, layout.grid, layout)


def run_without_final_reduction(grid: Grid, layout: Layout, shared: bool) -> None:
    from vllm.distributed import get_tp_group

    config = make_config(grid)
    layer = build_layer(grid, config, shared=shared, reduce_results=False)
    assert layer.moe_config.skip_final_all_reduce
    for strategy, tokens, partial in outputs_of(layer, config, grid, layout):
        output = get_tp_group().all_reduce(partial.clone())  # as the model's next layer does
        check_output(output, tokens, dense_moe(tokens, Weights.random(torch.float32), shared=shared), strategy)


@pytest.mark.parametrize("shared", [False, True], ids=["routed", "shared"])
@pytest.mark.parametrize("grid", [TP2, TP4], ids=str)
def test_a_model_that_reduces_itself_counts_nothing_twice(ranks: VllmRanks, grid, shared):  # noqa: F811
    ranks.run(run_without_final_reduction, grid, Layout(grid), shared)


def storages_of(tensors: tuple[torch.Tensor, ...]) -> set[int]:
    return {each.untyped_storage().data_ptr() for each in tensors}


def run_for_storages(grid: Grid, layout: Layout, shared: bool) -> None:
    from vllm_npu.plugin.step_planner import planner_of

    config = make_config(grid)
    layer = build_layer(grid, config, shared=shared, sequence_parallel=layout.sequence_parallel)
    for strategy in layout.strategies:
        planner_of(config).propose(strategy)
        counts = counts_of(grid)[0]
        tokens = Tokens.random(layout, grid, counts, torch.float32)
        inputs = (tokens.hidden_states, tokens.router_logits)
        with vllm_step(grid, config, counts):
            returned = layer._forward_impl(*inputs, tokens.hidden_states if shared else None)
        outputs = returned if shared else (returned,)
        assert len(storages_of(outputs)) == len(outputs), (strategy, "both outputs are views of one storage")
        assert not storages_of(outputs) & storages_of(inputs), (strategy, "an output is the input's memory")


@pytest.mark.parametrize("shared", [False, True], ids=["routed", "shared"])
@pytest.mark.parametrize("layout", [Layout(TP2), Layout(TP2_DP2), Layout(TP2_DP2, sequence_parallel=True)], ids=str)
def test_outputs_of_the_layers_op_share_no_memory(ranks: VllmRanks, layout, shared):  # noqa: F811
    """By the schemas of vLLM's ops moe_forward and moe_forward_shared, their outputs alias nothing."""
    ranks.run(run_for_storages, layout.grid, layout, shared)


# ------------------------------------------------------------------------------------------------- collectives


def run_counting(grid: Grid, layout: Layout, shared: bool) -> dict[str, dict[str, int]]:
    from vllm_npu.plugin.groups import collective_counter
    from vllm_npu.plugin.step_planner import planner_of

    config = make_config(grid)
    layer = build_layer(grid, config, shared=shared, sequence_parallel=layout.sequence_parallel)
    calls = {}
    for strategy in layout.strategies:
        planner_of(config).propose(strategy)
        counts = counts_of(grid)[0]
        tokens = Tokens.random(layout, grid, counts, torch.float32)
        with vllm_step(grid, config, counts):
            collective_counter().reset()
            layer(hidden_states=tokens.hidden_states, router_logits=tokens.router_logits)
            calls[strategy] = dict(collective_counter().calls)
    return calls


GATHER_TP, REDUCE_TP = {"tp.all_gather": 1}, {"tp.all_reduce": 1}
MC2, ALL2ALL = {"ep.all_to_all": 2}, {"ep.all_to_all": 3}
OVER_DP, BROADCAST_DP = {"dp.all_gather": 1, "dp.reduce_scatter": 1}, {"dp.broadcast": 2, "dp.reduce_scatter": 1}
CALLS = {  # of one layer without shared experts
    Layout(TP2): {"mc2": MC2 | GATHER_TP, "all2all": ALL2ALL | GATHER_TP, "allgather": REDUCE_TP, "naive": REDUCE_TP},
    Layout(DP2): {"mc2": MC2, "all2all": ALL2ALL, "allgather": OVER_DP, "naive": BROADCAST_DP},
    Layout(DP2_NO_EP): {"allgather": OVER_DP, "naive": BROADCAST_DP},
    Layout(TP2_DP2): {
        "mc2": MC2 | GATHER_TP,
        "all2all": ALL2ALL | GATHER_TP,
        "allgather": OVER_DP | REDUCE_TP,
        "naive": BROADCAST_DP | REDUCE_TP,
    },
    Layout(TP2_DP2_NO_EP): {"allgather": OVER_DP | REDUCE_TP, "naive": BROADCAST_DP | REDUCE_TP},
    Layout(TP2_DP2, sequence_parallel=True): {
        "mc2": MC2,
        "all2all": ALL2ALL,
        "allgather": {"ep.all_gather": 1, "ep.reduce_scatter": 1},
        "naive": {"ep.broadcast": 4, "ep.reduce_scatter": 1},
    },
}


@pytest.mark.parametrize("shared", [False, True], ids=["routed", "shared"])
@pytest.mark.parametrize("layout", CALLS, ids=str)
def test_a_layer_makes_these_collectives_and_no_others(ranks: VllmRanks, layout, shared):  # noqa: F811
    expected = CALLS[layout]
    if shared and layout.grid.tp > 1 and not layout.sequence_parallel:
        expected = {strategy: calls | REDUCE_TP for strategy, calls in expected.items()}
    for calls in ranks.run(run_counting, layout.grid, layout, shared):
        assert calls == expected


# ---------------------------------------------------------------------------------------------------- compiled


def run_compiled(grid: Grid, layout: Layout, shared: bool, backend: str, steps) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    from vllm_npu.plugin.groups import collective_counter
    from vllm_npu.plugin.step_planner import planner_of

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    config = make_config(grid)
    layer = build_layer(grid, config, shared=shared, sequence_parallel=layout.sequence_parallel)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with torch.no_grad():
        for strategy, counts in steps:
            planner_of(config).propose(strategy)
            tokens = Tokens.random(layout, grid, counts, torch.float32)
            torch._dynamo.mark_dynamic(tokens.hidden_states, 0)
            torch._dynamo.mark_dynamic(tokens.router_logits, 0)
            with vllm_step(grid, config, counts):
                collective_counter().reset()
                output = compiled(hidden_states=tokens.hidden_states, router_logits=tokens.router_logits)
            expected = dense_moe(tokens, Weights.random(torch.float32), shared=shared)
            check_output(output, tokens, expected, (strategy, counts))
            calls = CALLS[layout][strategy]
            shared_sum = REDUCE_TP if shared and grid.tp > 1 and not layout.sequence_parallel else {}
            assert dict(collective_counter().calls) == calls | shared_sum, "a step ran another step's collectives"
    assert counter.frame_count == 1, "a step was traced anew"


SWITCHES = {
    1: [("mc2", (5,)), ("allgather", (5,)), ("all2all", (7,)), ("naive", (4,)), ("mc2", (9,))],
    2: [("mc2", (5, 4)), ("allgather", (5, 4)), ("all2all", (4, 7)), ("naive", (6, 6)), ("mc2", (9, 4))],
}


@pytest.mark.parametrize("shared", [False, True], ids=["routed", "shared"])
@pytest.mark.parametrize("layout", [Layout(TP2), Layout(TP2_DP2)], ids=str)
def test_a_trace_with_one_strategy_runs_all(ranks: VllmRanks, layout, shared):  # noqa: F811
    ranks.run(run_compiled, layout.grid, layout, shared, "eager", SWITCHES[layout.grid.dp])


@pytest.mark.slow
def test_inductor_may_switch_strategies_too(ranks: VllmRanks):  # noqa: F811
    ranks.run(run_compiled, TP2, Layout(TP2), True, "inductor", SWITCHES[1])


# ------------------------------------------------------------------------------------------------ what is refused


def quantisation(**attributes: Any) -> Any:
    """A quantisation with these attributes, whose MoE method is not ours. It gives the numbers of the unquantised method."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.quantization.experts_int8 import ExpertsInt8Config

    method = type("QuantisedMoEMethod", (UnquantizedFusedMoEMethod,), attributes)

    class Quantisation(ExpertsInt8Config):
        def get_quant_method(self, layer: Any, prefix: str) -> UnquantizedFusedMoEMethod:
            return method(layer.moe_config)

    return Quantisation()


def run_quantised(grid: Grid) -> str:
    with pytest.raises(UnsupportedConfigError) as error:
        build_layer(grid, make_config(grid), quant_config=quantisation())
    return str(error.value)


@pytest.mark.parametrize("grid", [TP2, DP2, DP2_NO_EP], ids=str)
def test_quantised_experts_that_would_exchange_tokens_twice_are_refused(ranks: VllmRanks, grid):  # noqa: F811
    for message in ranks.run(run_quantised, grid):
        assert "model.layers.0.mlp.experts: QuantisedMoEMethod exchanges tokens itself" in message
        assert "serve an unquantised checkpoint" in message


def run_own_path(grid: Grid, shared: bool, quantised: bool) -> None:
    from vllm_npu.plugin.groups import collective_counter
    from vllm_npu.plugin.step_planner import planner_of

    config = make_config(grid)
    layer = build_layer(grid, config, shared=shared, **({"quant_config": quantisation()} if quantised else {}))
    assert planner_of(config) is None
    tokens = Tokens.random(Layout(grid), grid, (5,), torch.float32)
    collective_counter().reset()
    with vllm_step(grid, config, (5,)):
        output = layer(hidden_states=tokens.hidden_states, router_logits=tokens.router_logits)
    assert not collective_counter().calls
    check_output(output, tokens, dense_moe(tokens, Weights.random(torch.float32), shared=shared), "vLLM's own path")


@pytest.mark.parametrize(("shared", "quantised"), [(False, False), (True, False), (False, True)])
def test_tensor_parallel_experts_alone_are_left_to_vllm(ranks: VllmRanks, shared, quantised):  # noqa: F811
    ranks.run(run_own_path, TP2_NO_EP, shared, quantised)


def run_refusals(grid: Grid) -> list[str]:
    messages = []
    for options in ({"num_experts": 3}, {"activation": "swiglustep"}, {"apply_router_weight_on_input": True}):
        with pytest.raises(UnsupportedConfigError) as error:
            build_layer(grid, make_config(grid), **options)
        messages.append(str(error.value))
    return messages


def test_what_a_layer_cannot_do_is_refused_when_it_is_built(ranks: VllmRanks):  # noqa: F811
    for experts, activation, weight in ranks.run(run_refusals, TP4):
        assert "3 experts do not divide over ep_size=4; choose tp_size * dp_size = 3" in experts
        assert "'swiglustep'" in activation
        assert "supported: silu" in activation
        assert "model.layers.0.mlp.experts: the router's weight goes on the experts' input" in weight


def run_foreign_runner(grid: Grid) -> str:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    from vllm_npu.plugin.step_planner import planner_of

    class ModelsOwnRunner(MoERunner):
        pass

    config = make_config(grid)
    build_layer(grid, config, runner_cls=ModelsOwnRunner)
    with pytest.raises(UnsupportedConfigError) as error:
        planner_of(config)
    return str(error.value)


def test_our_experts_in_a_models_own_runner_are_refused_by_name(ranks: VllmRanks):  # noqa: F811
    for message in ranks.run(run_foreign_runner, DP2):
        assert "model.layers.0.mlp.experts: this model brings its own MoE layer" in message
        assert "ModelsOwnRunner" in message


# ----------------------------------------------------------------------------------------------------- planning


def run_disagreement(grid: Grid) -> tuple[float, Exception, str]:
    from vllm_npu.plugin.step_planner import planner_of

    config = make_config(grid, moe_comm=list(STRATEGIES)[grid.rank])
    build_layer(grid, config)

    def step() -> None:
        with vllm_step(grid, config, (3,) * grid.dp):
            pass

    seconds, error = seconds_until_error(step)
    planner_of(config).propose("all2all")
    step()
    return seconds, error, planner_of(config).selection.strategy


@pytest.mark.parametrize("grid", [TP2, DP2, TP2_DP2], ids=str)
def test_ranks_that_ask_for_different_strategies_are_all_named(ranks: VllmRanks, grid):  # noqa: F811
    for seconds, error, recovered in ranks.run(run_disagreement, grid):
        assert isinstance(error, PlanDisagreementError)
        for rank, strategy in zip(range(grid.size), STRATEGIES, strict=False):
            assert f"ranks [{rank}]: {strategy}" in str(error)
        assert seconds < on_this_machine(REFUSAL_SECONDS)
        assert recovered == "all2all"


def run_other_counts(grid: Grid) -> tuple[list[tuple[float, Exception]], int]:
    from vllm_npu.plugin.groups import collective_counter

    config = make_config(grid)
    layer = build_layer(grid, config)
    counts, unlike_others = (3,) * grid.dp, (3,) * (grid.dp - 1) + (3 + grid.rank,)

    def step(counts: tuple[int, ...], *, layers: int) -> None:
        with vllm_step(grid, config, counts):
            for _ in range(layers):
                tokens = counts[grid.dp_rank]
                layer(hidden_states=torch.ones(tokens, HIDDEN), router_logits=torch.zeros(tokens, NUM_EXPERTS))

    def step_without_layers_and_another() -> None:
        step(unlike_others, layers=0)
        step(counts, layers=1)

    step(counts, layers=1)
    collective_counter().reset()
    failures = [seconds_until_error(lambda: step(unlike_others, layers=1))]
    failures.append(seconds_until_error(step_without_layers_and_another))
    moved = collective_counter().calls.total()
    step(counts, layers=1)
    return failures, moved


@pytest.mark.parametrize("grid", [DP2, TP2_DP2], ids=str)
def test_ranks_with_different_counts_fail_before_a_token_moves(ranks: VllmRanks, grid):  # noqa: F811
    for failures, moved in ranks.run(run_other_counts, grid):
        for seconds, error in failures:
            assert isinstance(error, PlanDisagreementError)
            assert "tokens: ranks [0" in str(error)
            assert seconds < on_this_machine(REFUSAL_SECONDS)
        assert moved == 0


def run_other_model(grid: Grid, layout: Layout) -> tuple[float, Exception]:
    config = make_config(grid)
    build_layer(grid, config, top_k=1 + grid.rank % 2)

    def step() -> None:
        with vllm_step(grid, config, (3,) * grid.dp):
            pass

    return seconds_until_error(step)


def test_ranks_with_different_layers_are_told_apart(ranks: VllmRanks):  # noqa: F811
    for seconds, error in ranks.run(run_other_model, TP2_DP2, Layout(TP2_DP2)):
        assert isinstance(error, PlanDisagreementError)
        assert "ranks [0, 2]" in str(error)
        assert "ranks [1, 3]" in str(error)
        assert "top 1" in str(error)
        assert seconds < on_this_machine(REFUSAL_SECONDS)


def run_switch(grid: Grid) -> list[str]:
    from vllm_npu.plugin.step_planner import planner_of

    config = make_config(grid, moe_comm="mc2")
    layer = build_layer(grid, config)
    planner = planner_of(config)
    counts = (3,) * grid.dp
    tokens = Tokens.random(Layout(grid), grid, counts, torch.float32)
    expected = dense_moe(tokens, Weights.random(torch.float32), shared=False)
    taken = []

    def step() -> None:
        with vllm_step(grid, config, counts):
            output = layer(hidden_states=tokens.hidden_states, router_logits=tokens.router_logits)
        check_output(output, tokens, expected, taken)
        taken.append(planner.selection.strategy)

    step()
    for proposer in range(grid.size):  # one rank after another hears of the new strategy
        if proposer == grid.rank:
            planner.propose("allgather")
        step()
    if grid.rank == 0:
        planner.propose("all2all")
    step()
    if grid.rank == 0:
        planner.propose("allgather")
    step()
    return taken


def test_a_new_strategy_waits_for_the_last_rank(ranks: VllmRanks):  # noqa: F811
    for taken in ranks.run(run_switch, TP2_DP2):
        assert taken == ["mc2"] * 4 + ["allgather"] * 3


def run_two_layers(grid: Grid) -> tuple[list[str], int]:
    """The strategies whose pipelines two layers built in two rounds of steps, and how often the options were read."""
    from vllm_npu.plugin.groups import model_pipelines
    from vllm_npu.plugin.options import Options
    from vllm_npu.plugin.step_planner import planner_of
    from vllm_npu.strategies import pipelines

    built, read = [], []
    build, read_options = pipelines.build, Options.of

    def noted_build(strategy: str, *args: Any) -> Any:
        built.append(strategy)
        return build(strategy, *args)

    def noted_options(vllm_config: Any) -> Options:
        read.append(vllm_config)
        return read_options(vllm_config)

    config = make_config(grid)
    layers = [build_layer(grid, config, prefix=f"model.layers.{number}.mlp.experts") for number in (0, 1)]
    model_pipelines(expert_parallel=True).close()
    tokens = Tokens.random(Layout(grid), grid, (3,) * grid.dp, torch.float32)
    expected = dense_moe(tokens, Weights.random(torch.float32), shared=False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pipelines, "build", noted_build)
        patched.setattr(Options, "of", noted_options)
        for strategy in (*STRATEGIES, *STRATEGIES):
            planner_of(config).propose(strategy)
            with vllm_step(grid, config, (3,) * grid.dp):
                for layer in layers:
                    output = layer(hidden_states=tokens.hidden_states, router_logits=tokens.router_logits)
                    check_output(output, tokens, expected, (strategy, layer.layer_name))
    return built, len(read)


def test_layers_share_their_pipelines_and_the_options_are_read_once(ranks: VllmRanks):  # noqa: F811
    for built, times_read in ranks.run(run_two_layers, DP2):
        assert built == list(STRATEGIES)
        assert times_read == 1


def run_proposals(grid: Grid) -> list[str]:
    from vllm_npu.plugin.step_planner import planner_of

    config = make_config(grid)
    build_layer(grid, config)
    planner = planner_of(config)
    messages = []
    for name in ("mc2", "fastest"):
        with pytest.raises(UnsupportedConfigError) as error:
            planner.propose(name)
        messages.append(str(error.value))
    assert planner.proposed == "auto"
    return messages


def test_a_proposal_that_cannot_be_is_refused(ranks: VllmRanks):  # noqa: F811
    for needs_ep, unknown in ranks.run(run_proposals, DP2_NO_EP):
        assert "mc2 needs ep_size > 1" in needs_ep
        assert all(name in unknown for name in ("fastest", "auto", *STRATEGIES))


def run_unplanned(grid: Grid) -> str:
    from vllm.forward_context import set_forward_context

    config = make_config(grid)
    layer = build_layer(grid, config)
    with set_forward_context(None, config):
        with pytest.raises(InvalidInputError) as error:
            layer(hidden_states=torch.zeros(3, HIDDEN), router_logits=torch.zeros(3, NUM_EXPERTS))
    return str(error.value)


def test_a_step_without_a_token_count_is_not_guessed(ranks: VllmRanks):  # noqa: F811
    for message in ranks.run(run_unplanned, TP2):
        assert "in a step that has no token count" in message


def run_wrong_input(grid: Grid) -> list[str]:
    config = make_config(grid, moe_comm="allgather")
    layer = build_layer(grid, config)
    counts = (3,) * grid.dp
    messages = []
    with vllm_step(grid, config, counts):
        for rows, logits_rows, experts in ((4, 4, NUM_EXPERTS), (3, 2, NUM_EXPERTS), (3, 3, NUM_EXPERTS + 1)):
            with pytest.raises(InvalidInputError) as error:
                layer(hidden_states=torch.zeros(rows, HIDDEN), router_logits=torch.zeros(logits_rows, experts))
            messages.append(str(error.value))
    return messages


def test_an_input_that_is_not_the_planned_one_is_refused_before_any_collective(ranks: VllmRanks):  # noqa: F811
    for rows, logits, experts in ranks.run(run_wrong_input, DP2):
        assert "hidden_states has 4 rows" in rows
        assert "router_logits" in logits
        assert "router_logits" in experts
