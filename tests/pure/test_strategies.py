"""strategies: all ranks choose alike, and no choice is one that the topology or the limits refuse."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import GRIDS, topologies
from vllm_npu.core.limits import (
    A2_FULL_MESH,
    A2_HIERARCHY,
    DEVICES,
    NVLINK,
    PORTABLE_MC2,
    DeviceLimits,
    MC2Limits,
    MoELayer,
    QuantMode,
)
from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.errors import InvalidInputError, UnsupportedConfigError
from vllm_npu.strategies.dispatch.all2allv import All2AllVDispatcher
from vllm_npu.strategies.dispatch.local_permute import LocalPermuteDispatcher
from vllm_npu.strategies.dispatch.mc2 import MC2Dispatcher
from vllm_npu.strategies.pipelines import Pipelines
from vllm_npu.strategies.prepare_finalize.all2all import All2AllPrepareAndFinalize
from vllm_npu.strategies.prepare_finalize.allgather import AllGatherPrepareAndFinalize
from vllm_npu.strategies.prepare_finalize.mc2 import MC2PrepareAndFinalize
from vllm_npu.strategies.prepare_finalize.naive_multicast import NaiveMulticastPrepareAndFinalize
from vllm_npu.strategies.select import Selection, build, check_strategy, select, select_for_all
from vllm_npu.strategies.table import AUTO, STRATEGIES
from vllm_npu.transport.base import Groups
from vllm_npu.transport.threaded import ThreadedGroup, ThreadedTransport

NAMES = [AUTO, *STRATEGIES]
LAYER = MoELayer(num_experts=64, top_k=4, hidden_size=1024, dtype=torch.bfloat16)
NATIVE = DeviceLimits(
    family="tests", mc2=MC2Limits(name="mc2 of tests", max_tokens_per_rank=16, native=True, source="made up for tests")
)


def plan(*counts: int, sharding: TokenSharding = TokenSharding.REPLICATED) -> StepPlan:
    return StepPlan(num_tokens_across_dp=counts, sharding=sharding)


def chosen(requested: str, topology: ParallelTopology, step: StepPlan, **facts) -> Selection:
    return select(requested, topology, step, **{"layer": LAYER, **facts})


def lone_groups(topology: ParallelTopology) -> Groups:
    """Groups whose other ranks never come. They are enough to build pipelines on."""

    def end(name: str, rank: int, size: int) -> ThreadedTransport:
        return ThreadedTransport(ThreadedGroup(name, size, timeout=1.0), rank)

    return Groups(
        topology,
        tp=end("tp", topology.tp_rank, topology.tp_size),
        dp=end("dp", topology.dp_rank, topology.dp_size),
        ep=end("ep", topology.rank, topology.world_size),
    )


@st.composite
def steps_on_grids(draw):
    """(topology of each rank, plan, facts for select)."""
    tp_size, dp_size = draw(st.sampled_from(GRIDS))
    counts = draw(st.lists(st.integers(0, 1100), min_size=dp_size, max_size=dp_size))
    ranks = topologies(tp_size, dp_size, expert_parallel=draw(st.booleans()))
    capacity, native = draw(st.sampled_from([1, 64, 512])), draw(st.booleans())
    mc2 = MC2Limits(name="drawn", max_tokens_per_rank=capacity, native=native, source="")
    num_experts = tp_size * dp_size * draw(st.integers(1, 4))
    top_k = draw(st.integers(1, min(8, num_experts)))
    facts = {
        "layer": replace(LAYER, num_experts=num_experts, top_k=top_k),
        "device": DeviceLimits(family="drawn", mc2=mc2),
    }
    return ranks, plan(*counts, sharding=draw(st.sampled_from(list(TokenSharding)))), facts


@given(steps_on_grids(), st.sampled_from(NAMES))
def test_all_ranks_choose_the_same_and_the_choice_can_be_built(grid, requested):
    ranks, step, facts = grid
    if requested != AUTO and STRATEGIES[requested].needs_expert_parallel and ranks[0].ep_size == 1:
        for each in ranks:
            with pytest.raises(UnsupportedConfigError):
                select(requested, each, step, **facts)
        return
    (selection,) = {select(requested, each, step, **facts) for each in ranks}
    for each in ranks:
        check_strategy(selection.strategy, each)
    build(selection.strategy, lone_groups(ranks[-1]), facts["layer"].num_experts)
    limits = facts["device"].mc2
    rows = step.padded_tokens(ranks[0].tp_size) // ranks[0].tp_size
    if selection.strategy == "mc2":
        assert rows <= limits.max_tokens_per_rank
        assert limits.native or requested == "mc2", "auto takes mc2 only where a fused kernel runs it"
    if requested != AUTO and selection.strategy != requested:
        assert (requested, selection.strategy) == ("mc2", "all2all")
        assert rows > limits.max_tokens_per_rank
    assert selection.reason


def test_mc2_is_taken_up_to_its_capacity_and_becomes_all2all_with_the_reason_above():
    capacity = PORTABLE_MC2.max_tokens_per_rank
    for tp_size in (1, 2, 4):
        for topology in topologies(tp_size, 2):
            assert chosen("mc2", topology, plan(1, tp_size * capacity)) == Selection("mc2", "requested")
            assert chosen("mc2", topology, plan(1, tp_size * capacity + 1)) == Selection(
                "all2all", f"mc2 takes {capacity} tokens a rank, this step brings {capacity + 1}"
            )


def test_a_request_that_fits_is_taken_as_it_is():
    for name in STRATEGIES:
        assert chosen(name, topologies(2, 2)[0], plan(4, 4)) == Selection(name, "requested")


def test_auto_takes_allgather_without_expert_parallelism():
    expected = Selection("allgather", "auto: no expert parallelism")
    for each in [*topologies(2, 2, expert_parallel=False), *topologies(1, 1)]:
        assert chosen(AUTO, each, plan(*[4] * each.dp_size), device=NATIVE) == expected


def test_auto_takes_a_native_mc2_while_the_tokens_fit():
    topology = topologies(2, 2)[0]
    expected = Selection("mc2", "auto: 16 tokens a rank fit 16")
    assert chosen(AUTO, topology, plan(32, 1), device=NATIVE) == expected
    assert chosen(AUTO, topology, plan(33, 1), device=NATIVE).strategy != "mc2"


def test_auto_skips_strategies_that_the_device_refuses():
    topology, step = topologies(1, 16)[0], plan(*[4] * 16)
    assert chosen(AUTO, topology, step, device=DEVICES["A3"]).strategy == "mc2"
    narrow = replace(LAYER, hidden_size=512)
    assert chosen(AUTO, topology, step, device=DEVICES["A3"], layer=narrow).strategy == "all2all"
    assert chosen(AUTO, topology, step, device=DEVICES["310P"]) == Selection(
        "allgather", "auto: 310P runs allgather and naive only"
    )


def test_auto_takes_shared_memory_where_the_gpus_have_it_and_the_step_fits():
    topology = topologies(1, 4)[0]
    expected = Selection("symmetric", "auto: 4096 tokens a rank fit 4096")
    assert chosen(AUTO, topology, plan(4096, 0, 0, 1), device=NVLINK) == expected
    assert chosen(AUTO, topology, plan(4097, 0, 0, 1), device=NVLINK).strategy == "all2all"
    assert chosen("symmetric", topology, plan(4097, 0, 0, 1), device=NVLINK) == Selection(
        "all2all", "symmetric takes 4096 tokens a rank, this step brings 4097"
    )
    odd = replace(LAYER, hidden_size=1023)
    assert chosen(AUTO, topology, plan(4, 0, 0, 1), device=NVLINK, layer=odd).strategy == "all2all"
    with pytest.raises(UnsupportedConfigError, match="symmetric moves rows of a multiple of 4 bytes, not 2046"):
        chosen("symmetric", topology, plan(4, 0, 0, 1), device=NVLINK, layer=odd)
    assert chosen(AUTO, topologies(1, 16)[0], plan(*[4] * 16), device=NVLINK).strategy == "all2all"
    with pytest.raises(UnsupportedConfigError, match="symmetric takes up to 8 ranks, not 16; use all2all"):
        chosen("symmetric", topologies(1, 16)[0], plan(*[4] * 16), device=NVLINK)
    with pytest.raises(
        UnsupportedConfigError, match="symmetric needs GPUs of one host that can write each other's memory"
    ):
        chosen("symmetric", topology, plan(4, 4, 4, 4))


@pytest.mark.parametrize(
    ("name", "family", "layer", "message"),
    [
        ("mc2", "310P", LAYER, "310P has no MC2; use allgather"),
        ("all2all", "310P", LAYER, "310P runs allgather and naive only; use allgather"),
        (
            "mc2",
            "A3",
            replace(LAYER, dtype=torch.float32),
            "mc2 on A3, full mesh takes bfloat16 and float16, hidden_states are float32; use all2all",
        ),
    ],
)
def test_a_request_that_the_device_refuses_says_why(name, family, layer, message):
    topology = topologies(1, 4)[0]
    for refused in (
        lambda: chosen(name, topology, plan(4, 4, 4, 4), layer=layer, device=DEVICES[family]),
        lambda: check_strategy(name, topology, layer, DEVICES[family]),
    ):
        with pytest.raises(UnsupportedConfigError) as error:
            refused()
        assert str(error.value) == message


@pytest.mark.parametrize(
    ("ranks", "top_k", "strategy", "share"),
    [
        (2, 1, "all2all", "50%"),  # one expert lies on one of two ranks
        (16, 8, "all2all", "42%"),
        (2, 8, "allgather", "100%"),
        (4, 8, "allgather", "91%"),
        (4, 4, "all2all", "69%"),
        (4, 5, "allgather", "78%"),
    ],
)
def test_auto_weighs_the_ranks_that_a_token_needs(ranks, top_k, strategy, share):
    selection = chosen(AUTO, topologies(1, ranks)[0], plan(*[4] * ranks), layer=replace(LAYER, top_k=top_k))
    assert selection == Selection(strategy, f"auto: a token needs {share} of the {ranks} ranks")


def test_mc2_takes_the_hierarchy_for_a_layer_that_only_it_takes_and_then_no_mask():
    topology, device = topologies(1, 16)[0], DEVICES["A2"]
    layer = replace(LAYER, num_experts=25 * 16, hidden_size=1024)
    assert device.for_layer(layer, 16).mc2 is A2_HIERARCHY
    assert device.for_layer(replace(layer, num_experts=24 * 16), 16).mc2 is A2_FULL_MESH
    assert device.for_layer(replace(layer, num_experts=520), 8).mc2 is A2_FULL_MESH, "neither takes it"
    even, uneven, idle = plan(*[300] * 16), plan(*range(1, 17)), plan(0, *[4] * 15)
    for requested in (AUTO, "mc2"):
        assert chosen(requested, topology, even, device=device, layer=layer).strategy == "mc2"
        assert chosen(requested, topology, uneven, device=device, layer=layer).strategy == "all2all"
        assert chosen(requested, topology, idle, device=device, layer=layer).strategy == "all2all"
    assert "takes no mask" in chosen("mc2", topology, idle, device=device, layer=layer).reason
    assert "as many rows from each rank" in chosen("mc2", topology, uneven, device=device, layer=layer).reason


@pytest.mark.parametrize("order", [1, -1])
def test_layers_of_different_sizes_take_one_strategy_that_suits_all_of_them(order):
    topology, device = topologies(1, 16)[0], DEVICES["A3"]
    small, wide, narrow = LAYER, replace(LAYER, num_experts=128, top_k=8), replace(LAYER, hidden_size=512)

    def taken(requested: str, step: StepPlan, *layers: MoELayer) -> str:
        return select_for_all(requested, topology, step, layers=layers[::order], device=device).strategy

    decode, prefill = plan(*[4] * 16), plan(*[600] * 16)
    assert taken(AUTO, decode, small, wide) == "mc2"
    assert taken(AUTO, decode, small, narrow) == "all2all", "mc2 takes no hidden size of 512"
    everywhere = replace(LAYER, top_k=40)
    assert [taken(AUTO, prefill, each) for each in (small, everywhere)] == ["all2all", "allgather"]
    assert taken(AUTO, prefill, small, everywhere) == "allgather"
    assert taken("naive", decode, small, narrow) == "naive"
    assert taken("all2all", replace(decode, captured=True), small, narrow) == "allgather"
    with pytest.raises(UnsupportedConfigError, match="hidden_size 1024 to 8192"):
        taken("mc2", decode, small, narrow)


def test_a_captured_step_takes_only_what_a_graph_can_hold():
    topology, device = topologies(1, 4)[0], DEVICES["A3"]
    small, large = (replace(plan(*[tokens] * 4), captured=True) for tokens in (16, 513))
    assert chosen(AUTO, topology, small, device=device).strategy == "mc2"
    assert chosen(AUTO, topology, large, device=device).strategy == "allgather"
    assert chosen("mc2", topology, large, device=device).strategy == "allgather"
    assert chosen("naive", topology, large, device=device) == Selection("naive", "requested")
    for step in (small, large):
        assert chosen("all2all", topology, step, device=device).strategy == "allgather"
    without = replace(device, captures=("mc2", "naive"))
    with pytest.raises(UnsupportedConfigError, match=r"all2all \(requested\) reads sizes .* use mc2 or naive"):
        chosen("all2all", topology, small, device=without)
    with pytest.raises(UnsupportedConfigError, match="no graph can hold it on 310P; start vLLM"):
        chosen(AUTO, topology, small, device=DEVICES["310P"])
    with pytest.raises(InvalidInputError, match="a graph freezes the counts"):
        replace(plan(4, 5, 4, 4), captured=True)


@pytest.mark.parametrize("name", ["mc3", "", "MC2", "auto "])
def test_an_unknown_name_lists_what_exists(name):
    topology = topologies(2, 1)[0]
    message = f"unknown moe_comm {name!r}; there are: auto, mc2, all2all, allgather, naive"
    for refuses in (
        lambda: check_strategy(name, topology),
        lambda: chosen(name, topology, plan(4)),
        lambda: build(name, lone_groups(topology), 8),
    ):
        with pytest.raises(UnsupportedConfigError, match=re.escape(message)):
            refuses()


@pytest.mark.parametrize("name", ["mc2", "all2all"])
@pytest.mark.parametrize(
    ("topology", "where"),
    [
        (ParallelTopology.of_rank(0, tp_size=2, dp_size=2, expert_parallel=False), "TP2xDP2"),
        (ParallelTopology.of_rank(0, tp_size=1, dp_size=1), "TP1xDP1xEP"),
    ],
    ids=["expert parallelism off", "one rank"],
)
def test_strategies_that_move_tokens_to_experts_need_expert_parallelism(name, topology, where):
    message = f"{name} needs ep_size > 1 (got 1 on {where}); use allgather, or start vLLM with --enable-expert-parallel"
    for refuses in (
        lambda: check_strategy(name, topology),
        lambda: chosen(name, topology, plan(*[4] * topology.dp_size)),
        lambda: build(name, lone_groups(topology), 8),
    ):
        with pytest.raises(UnsupportedConfigError, match=re.escape(message)):
            refuses()


@pytest.mark.parametrize("name", ["allgather", "naive", AUTO])
def test_other_strategies_run_without_expert_parallelism(name):
    check_strategy(name, ParallelTopology.of_rank(0, tp_size=2, dp_size=2, expert_parallel=False))


@pytest.mark.parametrize(
    ("name", "prepare_finalize", "dispatcher"),
    [
        ("mc2", MC2PrepareAndFinalize, MC2Dispatcher),
        ("all2all", All2AllPrepareAndFinalize, All2AllVDispatcher),
        ("allgather", AllGatherPrepareAndFinalize, LocalPermuteDispatcher),
        ("naive", NaiveMulticastPrepareAndFinalize, LocalPermuteDispatcher),
    ],
)
def test_a_row_of_the_table_is_built_from_the_classes_that_it_names(name, prepare_finalize, dispatcher):
    groups = lone_groups(topologies(2, 2)[3])
    pipeline = build(name, groups, 8)
    assert (type(pipeline.prepare_finalize), type(pipeline.dispatcher)) == (prepare_finalize, dispatcher)
    assert pipeline.prepare_finalize.groups is groups
    assert pipeline.dispatcher.placement.first_expert(groups.topology.ep_rank) == 6


def test_every_row_of_the_table_can_be_built_and_has_a_summary():
    for name, row in STRATEGIES.items():
        build(name, lone_groups(topologies(2, 1)[0]), 8)
        assert row.summary


def test_layers_of_one_process_share_a_pipeline_where_all_facts_are_equal():
    pipelines = Pipelines(lone_groups(topologies(2, 2)[3]))
    first = pipelines.get("mc2", 8, QuantMode.INT8_PER_TOKEN)
    assert pipelines.get("mc2", 8, quant_mode=QuantMode.INT8_PER_TOKEN) is first
    assert (first.dispatcher.groups, first.dispatcher.quant_mode) == (pipelines.groups, QuantMode.INT8_PER_TOKEN)
    assert first.dispatcher.placement.num_experts == 8
    others = [
        pipelines.get("mc2", 8, QuantMode.NONE),
        pipelines.get("mc2", 12, QuantMode.INT8_PER_TOKEN),
        pipelines.get("mc2", 12),
        pipelines.get("all2all", 12),
    ]
    assert len({id(each) for each in (first, *others)}) == 5
    assert pipelines.get("all2all", 12) is others[-1]
    with pytest.raises(UnsupportedConfigError, match="unknown moe_comm 'mc3'"):
        pipelines.get("mc3", 12)


@pytest.mark.parametrize("name", STRATEGIES)
def test_experts_that_do_not_divide_over_the_ranks_are_refused(name):
    with pytest.raises(UnsupportedConfigError, match="9 experts do not divide over ep_size=4"):
        build(name, lone_groups(topologies(2, 2)[0]), 9)
