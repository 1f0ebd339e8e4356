"""fused_mc2: no routing brings a rank more rows than the planner expects, and steps and engines that do not fit are named."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import topologies
from vllm_npu.core.ascend_recipes import fused_mc2_rows, rows_of_recipe
from vllm_npu.core.limits import DEVICES, MoELayer, QuantMode
from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.errors import DeviceLimitError, HcclBufferError, UnsupportedConfigError, UnsupportedDeviceError
from vllm_npu.strategies.planning import plan_layer
from vllm_npu.strategies.prepare_finalize.mc2 import own_rows
from vllm_npu.strategies.select import Selection, select, select_for_all, why_not, why_not_fused_step
from vllm_npu.strategies.start_checks import PlannedShape, check_start, describe_capacity
from vllm_npu.strategies.table import AUTO

LAYER = MoELayer(num_experts=64, top_k=4, hidden_size=2048, dtype=torch.bfloat16)
INT8 = replace(LAYER, quant_mode=QuantMode.INT8_PER_TOKEN)
PLENTY = 1 << 20


def a3(rows: int | None = 65536):
    return replace(DEVICES["A3"], fused_mc2_rows=rows)


def plan(*counts: int, captured: bool = False, sharding: TokenSharding = TokenSharding.REPLICATED) -> StepPlan:
    return StepPlan(num_tokens_across_dp=counts, sharding=sharding, captured=captured)


def start(requested: str, topology: ParallelTopology, *, layer=LAYER, device=None, tokens=32, buffer_mb=PLENTY):
    shape = PlannedShape(decode_tokens=tokens)
    return check_start(requested, topology, layer, device or a3(), shape=shape, hccl_buffer_mb=buffer_mb)


@st.composite
def steps_with_routing(draw):
    """(topology, step, layer, rows that arrive at each rank)."""
    tp, dp, per_rank = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    ranks = topologies(tp, dp)
    experts = per_rank * tp * dp
    layer = replace(
        draw(st.sampled_from([LAYER, INT8])), num_experts=experts, top_k=draw(st.integers(1, min(6, experts)))
    )
    step = plan(
        *draw(st.lists(st.integers(0, 9), min_size=dp, max_size=dp)), sharding=draw(st.sampled_from(TokenSharding))
    )
    limits = a3().fused_limits(layer)
    arrived = [0] * len(ranks)
    for rank in ranks:
        rows = own_rows(step, rank, takes_uneven_ranks=False)
        for _ in range(rows.real_rows if limits.takes_mask else rows.rows):
            for expert in draw(st.permutations(range(experts)))[: layer.top_k]:
                arrived[expert // per_rank] += 1
    return ranks[0], step, layer, arrived


@given(steps_with_routing())
def test_no_routing_brings_more_rows_than_the_planner_expects(drawn):
    topology, step, layer, arrived = drawn
    if topology.ep_size == 1:
        return
    most = max(arrived)
    if most > 1:
        assert why_not_fused_step(topology, step, layer, a3(most - 1)) is not None
    tokens = max(1, step.padded_tokens(topology.tp_size)) * topology.dp_size
    assert why_not_fused_step(topology, step, layer, a3(tokens * layer.top_k)) is None


def test_the_bound_is_reached_where_all_tokens_choose_one_rank():
    topology = topologies(1, 4)[0]
    assert why_not_fused_step(topology, plan(3, 3, 3, 3), LAYER, a3(48)) is None
    reason = "fused_mc2 has room for 47 rows on a rank (mega_moe_max_tokens), and up to 48 may arrive in this step"
    assert why_not_fused_step(topology, plan(3, 3, 3, 3), LAYER, a3(47)) == reason
    few = replace(LAYER, num_experts=12)  # three experts a rank: a token cannot have four there
    assert why_not_fused_step(topology, plan(3, 3, 3, 3), few, a3(36)) is None


def test_padding_counts_where_the_operator_has_no_mask():
    topology, step = topologies(1, 2)[0], plan(1, 9)
    assert why_not_fused_step(topology, step, INT8, a3(40)) is None
    assert "up to 72 may arrive" in why_not_fused_step(topology, step, LAYER, a3(40))


@pytest.mark.parametrize("requested", ["fused_mc2", AUTO])
@pytest.mark.parametrize(
    ("step", "strategy"), [(plan(8, 8), "fused_mc2"), (plan(200, 200), "mc2"), (plan(600, 600), "all2all")]
)
def test_a_step_that_may_not_fit_takes_the_next_strategy_with_the_reason(requested, step, strategy):
    selection = select(requested, topologies(1, 2)[0], step, layer=LAYER, device=a3(1000))
    if strategy == "all2all" and requested == AUTO:
        assert selection.strategy in ("all2all", "allgather")  # by the share of ranks that a token needs
    else:
        assert selection.strategy == strategy
    assert ("up to" in selection.reason) == (strategy != "fused_mc2")


def test_a_captured_step_past_the_room_takes_mc2_or_allgather():
    topology, device = topologies(1, 2)[0], a3(1000)
    chosen = [
        select("fused_mc2", topology, plan(tokens, tokens, captured=True), layer=LAYER, device=device).strategy
        for tokens in (8, 200, 600)
    ]
    assert chosen == ["fused_mc2", "mc2", "allgather"]


def test_auto_takes_it_only_where_vllm_ascend_was_asked_for_it():
    topology = topologies(1, 2)[0]
    assert select(AUTO, topology, plan(8, 8), layer=LAYER, device=a3(None)).strategy == "mc2"
    assert select(AUTO, topology, plan(8, 8), layer=LAYER, device=a3()) == Selection(
        "fused_mc2", "auto: vllm-ascend's enable_fused_mc2 is 1"
    )


def test_a_layer_that_the_operator_cannot_run_takes_the_whole_step_another_way():
    layers = [LAYER, replace(LAYER, num_experts=4)]  # two experts a rank
    chosen = select_for_all(AUTO, topologies(1, 2)[0], plan(8, 8), layers=layers, device=a3())
    assert chosen.strategy == "mc2"
    assert "computes no activation with 2 experts a rank" in chosen.reason


@pytest.mark.parametrize(
    ("layer", "ranks", "what"),
    [
        (LAYER, 33, "at most 32 ranks, not 33"),
        (replace(LAYER, dtype=torch.float32), 2, "takes bfloat16 and float16, hidden_states are float32"),
        (replace(LAYER, hidden_size=1040), 2, "hidden_size in steps of 32, not 1040"),
        (replace(LAYER, num_experts=4), 2, "computes no activation with 2 experts a rank"),
        (replace(INT8, num_experts=4), 4, "computes no activation with 1 experts a rank"),
        (replace(LAYER, intermediate_size=4096), 2, "intermediate_size up to 3780 here, not 4096"),
        (replace(INT8, intermediate_size=1056), 2, "intermediate_size up to 1024 here, not 1056"),
        (replace(LAYER, activation="gelu"), 2, "computes the activation silu, not gelu"),
        (replace(LAYER, swiglu_limit=7.0), 2, "leaves out swiglu_limit, which is 7"),
        (replace(LAYER, has_bias=True), 2, "adds no bias"),
        (replace(LAYER, int4_weights=True), 2, "with 16-bit weights takes no int4 weights"),
        (replace(INT8, int4_weights=True), 2, "takes no int4 weights"),
    ],
    ids=str,
)
def test_a_layer_past_a_limit_is_named(layer, ranks, what):
    topology = ParallelTopology.of_rank(0, tp_size=1, dp_size=ranks)
    layer = replace(layer, num_experts=layer.num_experts if layer.num_experts % ranks == 0 else 3 * ranks)
    reason = why_not("fused_mc2", topology, layer, a3())
    assert what in reason
    assert reason.endswith("; use mc2")
    with pytest.raises(DeviceLimitError, match="use mc2"):
        start("fused_mc2", topology, layer=layer)
    assert f"; no fused_mc2: {reason}" in describe_capacity(
        start("auto", topology, layer=layer), topology, [layer]
    ) or (
        layer.dtype is torch.float32  # mc2 takes it as little
    )


def test_int8_layers_may_clamp_and_have_two_experts():
    topology = topologies(1, 2)[0]
    assert why_not("fused_mc2", topology, replace(INT8, num_experts=4, swiglu_limit=7.0), a3()) is None


def test_other_chips_and_weights_that_are_not_prepared_are_named():
    topology = topologies(1, 2)[0]
    with pytest.raises(UnsupportedDeviceError, match="A2 has no fused MC2; use mc2"):
        start("fused_mc2", topology, device=replace(DEVICES["A2"], fused_mc2_rows=65536))
    with pytest.raises(UnsupportedConfigError, match=r'"enable_fused_mc2": 1.*it is not set; use mc2'):
        start("fused_mc2", topology, device=a3(None))
    assert "A5 has no fused MC2" in why_not("fused_mc2", topology, LAYER, DEVICES["A5"])


def test_decode_steps_that_never_fit_are_refused_with_the_number_to_set():
    topology = ParallelTopology.of_rank(0, tp_size=2, dp_size=4)
    with pytest.raises(DeviceLimitError, match=r"up to 512 may arrive.*\"mega_moe_max_tokens\": 512\}"):
        start("fused_mc2", topology, device=a3(100))
    assert start("fused_mc2", topology, device=a3(512)).fused_mc2_rows == 512
    start("auto", topology, device=a3(100))  # decode steps take mc2
    with pytest.raises(HcclBufferError, match="needs HCCL_BUFFSIZE=5 for steps of 16 tokens a rank"):
        start("fused_mc2", topology, buffer_mb=4)


@pytest.mark.parametrize("layer", [LAYER, INT8])
def test_the_buffer_bounds_the_tokens_of_a_step(layer):
    topology = topologies(1, 2)[0]
    device = start("fused_mc2", topology, layer=layer, buffer_mb=200)
    limits = device.fused_limits(layer)
    most = limits.max_tokens_per_rank
    assert limits.buffer_mb(layer, 2, most) <= 200 < limits.buffer_mb(layer, 2, most + 1)
    reason = why_not_fused_step(topology, plan(most + 1, 1), layer, device)
    assert reason == f"fused_mc2 takes {most} tokens a rank, this step brings {most + 1}"
    assert f"; fused_mc2 takes up to {most} tokens a rank" in describe_capacity(device, topology, [layer])


def test_the_buffer_of_int8_is_at_least_what_the_tiling_checks():
    """3 * tokens * top_k * hidden_size bytes and 10 MiB (vllm-ascend, dispatch_ffn_combine_tiling.cpp)."""
    limits = a3().fused_limits(INT8)
    assert limits.buffer_mb(INT8, 8, 512) == 22 == (3 * 512 * 4 * 2048 + (10 << 20)) / (1 << 20)
    sixteen_bit = a3().fused_limits(LAYER)
    assert sixteen_bit.buffer_mb(LAYER, 8, 512) == 24  # three times the rows in 16 bits


def test_plan_shows_the_strategy_and_its_buffer_on_chips_that_have_it():
    topology = topologies(1, 2)[0]
    planned = plan_layer(LAYER, topology, a3(), 64)
    (row,) = [each for each in planned.strategies if each.strategy == "fused_mc2"]
    assert (row.reason, row.collectives) == (None, 1)
    assert planned.auto[0].strategy == "fused_mc2"
    assert [each.algorithm for each in planned.buffers][-1] == "dispatch_ffn_combine with 16-bit weights"
    without = plan_layer(LAYER, topology, a3(None), 64)
    (row,) = [each for each in without.strategies if each.strategy == "fused_mc2"]
    assert "it is not set" in row.reason
    assert all(each.strategy != "fused_mc2" for each in plan_layer(LAYER, topology, DEVICES["A2"], 64).strategies)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, None),
        ({"enable_fused_mc2": 0}, None),
        ({"enable_fused_mc2": 1}, 65536),
        ({"enable_fused_mc2": 1, "mega_moe_max_tokens": 100}, 100),
        ({"enable_fused_mc2": 2}, None),
    ],
    ids=str,
)
def test_the_recipe_says_whether_vllm_ascend_prepares_the_weights(options, rows):
    assert fused_mc2_rows(options) == rows
    refused = [row.option for row in rows_of_recipe(options) if row.is_refused]
    assert refused == (["enable_fused_mc2"] if options.get("enable_fused_mc2") == 2 else [])
