"""fused_mc2: no routing brings a rank more rows than the planner expects, and steps and engines that do not fit are named."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import topologies
from vllm_npu.core.ascend_recipes import FusedMC2Asked, FusedOperator, fused_mc2_asked, rows_of_recipe
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
FOR_DECODE = replace(INT8, num_experts=32)  # at most 24 experts a rank, on two ranks and more
PLENTY = 1 << 20


FFN, DECODE = FusedOperator.FFN_COMBINE, FusedOperator.GMM_COMBINE_DECODE


def a3(rows: int | None = 65536):
    """An A3 of which dispatch_ffn_combine was asked, with room for so many rows. None: no operator was asked for."""
    return replace(DEVICES["A3"], fused_mc2_asked=None if rows is None else FusedMC2Asked(FFN, rows))


def a3_decode():
    """An A3 of which dispatch_gmm_combine_decode was asked."""
    return replace(DEVICES["A3"], fused_mc2_asked=FusedMC2Asked(DECODE, None))


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
        "fused_mc2", "auto: vllm-ascend's enable_fused_mc2 asks for dispatch_ffn_combine"
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
        start("fused_mc2", topology, device=replace(DEVICES["A2"], fused_mc2_asked=FusedMC2Asked(FFN, 65536)))
    with pytest.raises(UnsupportedConfigError, match=r'"enable_fused_mc2": 1.*it is not set; use mc2'):
        start("fused_mc2", topology, device=a3(None))
    assert "A5 has no fused MC2" in why_not("fused_mc2", topology, LAYER, DEVICES["A5"])


def test_decode_steps_that_never_fit_are_refused_with_the_number_to_set():
    topology = ParallelTopology.of_rank(0, tp_size=2, dp_size=4)
    with pytest.raises(DeviceLimitError, match=r"up to 512 may arrive.*\"mega_moe_max_tokens\": 512\}"):
        start("fused_mc2", topology, device=a3(100))
    assert start("fused_mc2", topology, device=a3(512)).fused_mc2_asked == FusedMC2Asked(FFN, 512)
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
    ("options", "line", "asked"),
    [
        ({}, "0.23", None),
        ({"enable_fused_mc2": 0}, "0.23", None),
        ({"enable_fused_mc2": 1}, "0.23", FusedMC2Asked(FFN, 65536)),
        ({"enable_fused_mc2": True}, "0.23", FusedMC2Asked(FFN, 65536)),  # as a tutorial has it
        ({"enable_fused_mc2": 1, "mega_moe_max_tokens": 100}, "0.30", FusedMC2Asked(FFN, 100)),
        ({"enable_fused_mc2": 2, "mega_moe_max_tokens": 100}, "0.23", FusedMC2Asked(DECODE, None)),
        ({"enable_fused_mc2": 2}, "0.30", FusedMC2Asked(FFN, 65536)),
        ({"enable_fused_mc2": 3}, "0.23", None),
    ],
    ids=str,
)
def test_the_recipe_says_which_operator_vllm_ascend_prepares_the_weights_for(options, line, asked):
    assert fused_mc2_asked(options, line) == asked
    refused = [row.option for row in rows_of_recipe(options, line) if row.is_refused]
    assert refused == (["enable_fused_mc2"] if options.get("enable_fused_mc2") == 3 else [])


@pytest.mark.parametrize("rows", ["100", None, [1]])
def test_rows_that_are_no_number_are_refused_by_name(rows):
    with pytest.raises(UnsupportedConfigError, match=r"mega_moe_max_tokens is .* no number of rows"):
        fused_mc2_asked({"enable_fused_mc2": 1, "mega_moe_max_tokens": rows})
    assert fused_mc2_asked({"enable_fused_mc2": [1]}) is None


# --- dispatch_gmm_combine_decode ---


@pytest.mark.parametrize("requested", ["fused_mc2", AUTO])
def test_decode_steps_take_the_operator_for_them_and_longer_steps_go_another_way(requested):
    topology = topologies(1, 2)[0]
    chosen = [
        select(requested, topology, plan(*counts), layer=FOR_DECODE, device=a3_decode())
        for counts in ((8, 8), (0, 3), (256, 1), (257, 1))
    ]
    assert [each.strategy for each in chosen] == ["fused_mc2", "fused_mc2", "fused_mc2", "mc2"]
    assert "fused_mc2 takes 256 tokens a rank, this step brings 257" in chosen[-1].reason


def test_a_step_without_agreed_counts_takes_only_the_operator_that_ranks_may_bring_uneven_rows_to():
    topology = topologies(1, 2)[0]
    step = StepPlan(num_tokens_across_dp=(32, 32), sharding=TokenSharding.REPLICATED, own_tokens=3)
    assert select("fused_mc2", topology, step, layer=FOR_DECODE, device=a3_decode()).strategy == "fused_mc2"
    other = select("fused_mc2", topology, step, layer=FOR_DECODE, device=a3())
    assert other.strategy == "mc2"
    assert "needs the token counts of all ranks" in other.reason


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        (LAYER, "dispatch_gmm_combine_decode takes no layers of quantisation none"),
        (replace(INT8, hidden_size=480), "takes hidden_size 512 to 7168 in steps of 32, not 480"),
        (replace(INT8, hidden_size=7200), "takes hidden_size 512 to 7168 in steps of 32, not 7200"),
        (replace(INT8, hidden_size=1040), "takes hidden_size in steps of 32, not 1040"),
        (replace(INT8, intermediate_size=384), "takes intermediate_size 512, 640, 768, "),
        (replace(INT8, intermediate_size=1408), "2048, 2560, 3072, not 1408"),  # GLM-4.5-Air
        (replace(INT8, num_experts=50), "takes at most 24 experts a rank, not 25"),
        (replace(INT8, top_k=13), "takes at most 12 experts a token, not 13"),
        (replace(INT8, swiglu_limit=7.0), "leaves out swiglu_limit, which is 7"),
        (replace(INT8, activation="gelu"), "computes the activation silu, not gelu"),
        (replace(INT8, has_bias=True), "adds no bias"),
        (replace(INT8, int4_weights=True), "takes no int4 weights"),
    ],
    ids=str,
)
def test_a_layer_past_a_limit_of_the_operator_for_decode_steps_is_named(layer, what):
    topology = topologies(1, 2)[0]
    few = replace(layer, num_experts=min(layer.num_experts, 8)) if layer.num_experts == 64 else layer
    reason = why_not("fused_mc2", topology, few, a3_decode())
    assert what in reason
    with pytest.raises(DeviceLimitError, match="use mc2"):
        start("fused_mc2", topology, layer=few, device=a3_decode())


@pytest.mark.parametrize("size", [512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072])
def test_the_sizes_of_the_operator_for_decode_steps_find_the_largest_number_of_a_row(size):
    """The kernel's steps on a row of columns, each a set of the columns that it has seen (BlockQuant)."""
    seen = [{column, column + size // 2} for column in range(size // 2)]
    width = size // 2
    while width > 64:
        width //= 2
        assert width % 8 == 0, "an address that is no multiple of 32 bytes"
        for column in range(width // 8 * 8):
            seen[column] = seen[column] | seen[column + width]
    assert set().union(*seen[:64]) == set(range(size))
    layer = replace(INT8, num_experts=8, intermediate_size=size)
    assert why_not("fused_mc2", topologies(1, 2)[0], layer, a3_decode()) is None


def test_the_buffer_of_the_operator_for_decode_steps_has_two_halves_of_places_for_every_expert():
    topology = topologies(1, 4)[0]
    layer = replace(INT8, hidden_size=7168)
    limits = a3_decode().fused_limits(layer)
    assert limits.buffer_bytes(layer, 4, 100) == 2 * (64 * 100 * 7168 * 2) + 4 * 512
    device = start("fused_mc2", topology, layer=layer, device=a3_decode(), tokens=100, buffer_mb=200)
    assert device.fused_limits(layer).max_tokens_per_rank == 114
    with pytest.raises(HcclBufferError, match="dispatch_gmm_combine_decode needs HCCL_BUFFSIZE=211 for steps of 120"):
        start("fused_mc2", topology, layer=layer, device=a3_decode(), tokens=120, buffer_mb=200)
    assert (
        start(AUTO, topology, layer=layer, device=a3_decode(), tokens=120, buffer_mb=2000).fused_mc2_asked is not None
    )


def test_decode_steps_past_the_operators_tokens_are_refused_without_a_number_of_rows():
    topology = ParallelTopology.of_rank(0, tp_size=2, dp_size=4)
    with pytest.raises(
        DeviceLimitError, match=r"takes 256 tokens a rank, this step brings 300.*; lower --max-num-seqs"
    ):
        start("fused_mc2", topology, layer=INT8, device=a3_decode(), tokens=600)
    capacity = describe_capacity(start(AUTO, topology, layer=INT8, device=a3_decode()), topology, [INT8])
    assert capacity.endswith("; fused_mc2 takes up to 256 tokens a rank")
