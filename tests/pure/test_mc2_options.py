"""vllm-ascend's options for MC2's ops: which line has them, which chip takes them, and what a step or an engine then takes."""

from dataclasses import replace

import pytest
import torch

from tests.cases import topologies
from vllm_npu.core.ascend_recipes import MC2Asked, mc2_asked, rows_of_recipe
from vllm_npu.core.limits import DEVICES, PORTABLE, MoELayer
from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.errors import DeviceLimitError, HcclBufferError, UnsupportedConfigError
from vllm_npu.strategies.planning import plan_layer
from vllm_npu.strategies.select import select
from vllm_npu.strategies.start_checks import PlannedShape, check_start, describe_capacity
from vllm_npu.strategies.table import AUTO

LAYER = MoELayer(num_experts=256, top_k=8, hidden_size=7168, dtype=torch.bfloat16)
EP16 = topologies(1, 16)[0]
PLENTY = 1 << 20


@pytest.mark.parametrize(
    ("options", "line", "asked"),
    [
        ({}, "0.23", MC2Asked()),
        ({}, "0.30", MC2Asked()),
        ({"enable_mc2_hierarchy_comm": True}, "0.23", MC2Asked("hierarchy")),
        ({"enable_mc2_hierarchy_comm": True, "mc2_comm_alg": "fullmesh"}, "0.30", MC2Asked("hierarchy")),
        ({"mc2_comm_alg": "fullmesh_v2", "combine_quant_mode": 2}, "0.30", MC2Asked("fullmesh_v2", 2)),
        ({"mc2_comm_alg": "fullmesh_v2", "combine_quant_mode": 2}, "0.23", MC2Asked()),  # it ignores unknown keys
        ({"mc2_comm_alg": None, "combine_quant_mode": None}, "0.30", MC2Asked()),
        ({"mc2_comm_alg": ["fullmesh"], "combine_quant_mode": "true"}, "0.30", MC2Asked()),  # vllm-ascend refuses both
    ],
    ids=str,
)
def test_a_line_is_asked_by_the_options_that_it_has(options, line, asked):
    assert mc2_asked(options, line) == asked


@pytest.mark.parametrize(
    ("variables", "by_variables"),
    [
        ({"HCCL_INTRA_PCIE_ENABLE": "1", "HCCL_INTRA_ROCE_ENABLE": "0"}, True),
        ({"HCCL_INTRA_PCIE_ENABLE": "1"}, False),
        ({"HCCL_INTRA_PCIE_ENABLE": "0", "HCCL_INTRA_ROCE_ENABLE": "1"}, False),
    ],
    ids=str,
)
def test_hccls_two_variables_ask_for_the_hierarchy_on_a2_alone(monkeypatch, variables, by_variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    asked = mc2_asked({}, "0.30")
    assert asked == MC2Asked(hierarchy_by_variables=by_variables)
    assert DEVICES["A2"].with_mc2(asked).mc2.comm_alg == ("hierarchy" if by_variables else "")
    assert DEVICES["A3"].with_mc2(asked) == DEVICES["A3"]
    by_name = replace(asked, algorithm="fullmesh")
    assert DEVICES["A2"].with_mc2(by_name).mc2.comm_alg == "fullmesh", "a name counts more"


# The argument of the ops, as vllm-ascend 0.30's get_mc2_comm_alg gives it.
@pytest.mark.parametrize(
    ("family", "algorithm", "comm_alg"),
    [
        *(("A2", "", ""), ("A2", "fullmesh", "fullmesh"), ("A2", "hierarchy", "hierarchy")),
        *(("A3", "", ""), ("A3", "fullmesh", "fullmesh_v1"), ("A3", "fullmesh_v2", "fullmesh_v2")),
        ("A3", "hierarchy", "hierarchy"),
    ],
)
def test_an_algorithm_that_was_asked_for_is_the_only_one(family, algorithm, comm_alg):
    device = DEVICES[family].with_mc2(MC2Asked(algorithm))
    assert device.mc2.comm_alg == comm_alg
    assert device.of_version(2) is device
    if algorithm:
        assert device.mc2_hierarchy is None
        many = replace(LAYER, num_experts=512)  # 32 a rank: without an option, only the hierarchy of A2 takes it
        assert device.for_layer(many, 16) is device


@pytest.mark.parametrize(
    ("family", "asked", "reason"),
    [
        ("A2", MC2Asked("fullmesh_v2"), "mc2_comm_alg: MC2 on A2 was never run with fullmesh_v2"),
        ("A5", MC2Asked("fullmesh_v2"), "mc2_comm_alg: MC2 on A5 was never run with fullmesh_v2"),
        ("A5", MC2Asked("fullmesh"), "takes none by name"),
        (
            "A2",
            MC2Asked("", 2),
            "combine_quant_mode: mc2 on A2, full mesh takes 0, not 2 (it was run with mc2_comm_alg hierarchy",
        ),
        ("A2", MC2Asked("fullmesh", 2), "mc2 on A2, full mesh takes 0, not 2"),
        (
            "A3",
            MC2Asked("hierarchy", 2),
            "mc2 on A3, hierarchy takes 0, not 2 (it was run with mc2_comm_alg fullmesh or",
        ),
        ("A3", MC2Asked("", 4), "mc2 on A3, full mesh takes 0 or 2, not 4 (CANN's document names it for A5 alone"),
        ("A3", MC2Asked("", 3), "not 3 (CANN's document names it for A5 alone"),
        ("A5", MC2Asked("", 2), "mc2 on A5, full mesh takes 0, not 2 (it was never run there)"),
        ("A5", MC2Asked("", 4), "not 4 (CANN's document names it for A5 alone, where it was never run)"),
    ],
    ids=str,
)
def test_what_a_chip_does_not_take_is_refused_by_the_name_of_the_option(family, asked, reason):
    with pytest.raises(UnsupportedConfigError) as error:
        DEVICES[family].with_mc2(asked)
    assert reason in str(error.value)
    assert str(error.value).startswith("additional_config ")
    assert '"moe_comm": "off"' in str(error.value)


def test_version_1_of_the_ops_takes_no_algorithm():
    with pytest.raises(UnsupportedConfigError, match="as version 1 of its ops, it takes none by name"):
        DEVICES["A3"].of_version(1).with_mc2(MC2Asked("hierarchy"))
    with pytest.raises(UnsupportedConfigError, match="version 1 takes 0, not 2"):
        DEVICES["A3"].of_version(1).with_mc2(MC2Asked("", 2))


@pytest.mark.parametrize("device", [PORTABLE, DEVICES["310P"]], ids=lambda device: device.family)
def test_devices_without_the_ops_ignore_the_options(device):
    assert device.with_mc2(MC2Asked("fullmesh_v2", 4)) is device


def test_int8_rows_need_whole_groups():
    limits = DEVICES["A3"].with_mc2(MC2Asked("", 2)).mc2
    assert limits.why_not(LAYER, 16) is None
    reason = "mc2 on A3, full mesh with int8 rows takes hidden_size in steps of 8, not 1028"
    assert limits.why_not(replace(LAYER, hidden_size=1028), 16) == reason
    assert DEVICES["A3"].mc2.why_not(replace(LAYER, hidden_size=1028), 16) is None


def start(requested, asked, *, family="A3", layer=LAYER, topology=EP16, tokens=32, buffer_mb=PLENTY):
    shape = PlannedShape(decode_tokens=tokens)
    device = DEVICES[family].with_mc2(asked)
    return check_start(requested, topology, layer, device, shape=shape, hccl_buffer_mb=buffer_mb)


@pytest.mark.parametrize(
    ("family", "asked", "layer", "ranks", "what"),
    [
        ("A3", MC2Asked("hierarchy"), LAYER, 8, "mc2 on A3, hierarchy takes ep_size 16 to 256 in steps of 16, not 8"),
        ("A2", MC2Asked("hierarchy"), LAYER, 8, "mc2 on A2, hierarchy takes ep_size 16, 32, 64, not 8"),
        ("A2", MC2Asked("fullmesh"), replace(LAYER, num_experts=512), 16, "at most 24 experts a rank, not 32"),
        ("A3", MC2Asked("fullmesh_v2"), replace(LAYER, top_k=13), 16, "at most 12 experts a token, not 13"),
    ],
    ids=str,
)
def test_a_size_past_the_algorithms_limit_is_refused_for_mc2_and_goes_another_way_with_auto(
    family, asked, layer, ranks, what
):
    topology = topologies(1, ranks)[0]
    with pytest.raises(DeviceLimitError, match="use all2all") as error:
        start("mc2", asked, family=family, layer=layer, topology=topology)
    assert what in str(error.value)
    device = start(AUTO, asked, family=family, layer=layer, topology=topology, buffer_mb=1)
    assert what in describe_capacity(device, topology, [layer])
    step = StepPlan(num_tokens_across_dp=(4,) * ranks, sharding=TokenSharding.REPLICATED)
    assert select(AUTO, topology, step, layer=layer, device=device).strategy in ("all2all", "allgather")


def test_the_algorithms_buffer_is_checked_and_sets_the_capacity():
    # 2 * 32 tokens * (256 experts * 30 blocks of 512 bytes + 8 * 14336 bytes)
    with pytest.raises(HcclBufferError, match="mc2 on A3, fullmesh_v2 needs HCCL_BUFFSIZE=247 for steps of 32 tokens"):
        start("mc2", MC2Asked("fullmesh_v2"), buffer_mb=246)
    device = start("mc2", MC2Asked("fullmesh_v2", 2), buffer_mb=PLENTY)
    assert device.capacities["mc2"] == 256
    says = "mc2 (comm_alg=fullmesh_v2, comm_quant_mode=2) takes up to 256 tokens a rank"
    assert says in describe_capacity(device, EP16, [LAYER])
    plan = plan_layer(LAYER, EP16, device, 256)
    assert [buffer.algorithm for buffer in plan.buffers] == ["mc2 on A3, fullmesh_v2"]


def test_int8_rows_that_come_back_are_fewer_bytes():
    sent = {
        mode: plan_layer(LAYER, EP16, DEVICES["A3"].with_mc2(MC2Asked("", mode)), 16).strategies[0].bytes_sent
        for mode in (0, 2)
    }
    # 16 tokens of 8 experts, 15 of 16 elsewhere: 14336 bytes there, and back 14336, or 7168 and 896 scales of 2 bytes
    assert sent == {0: 120 * (14336 + 14336), 2: 120 * (14336 + 7168 + 896 * 2)}


@pytest.mark.parametrize(
    ("family", "counts", "strategy"),
    [
        ("A3", range(1, 17), "mc2"),  # padded to one size, with a mask
        ("A3", (0, *[4] * 15), "mc2"),
        ("A2", [4] * 16, "mc2"),
        ("A2", range(1, 17), "all2all"),
        ("A2", (0, *[4] * 15), "all2all"),
    ],
    ids=str,
)
def test_the_hierarchy_takes_as_many_rows_from_each_rank(family, counts, strategy):
    device = start(AUTO, MC2Asked("hierarchy"), family=family)
    step = StepPlan(num_tokens_across_dp=tuple(counts), sharding=TokenSharding.REPLICATED)
    for requested in (AUTO, "mc2"):
        assert select(requested, EP16, step, layer=LAYER, device=device).strategy == strategy


@pytest.mark.parametrize(
    ("options", "line", "row"),
    [
        ({"mc2_comm_alg": "fullmesh_v2"}, "0.30", (False, "mc2's ops take this algorithm")),
        ({"mc2_comm_alg": "fullmesh_v2"}, "0.23", (False, "vllm-ascend 0.23 has no such option")),
        ({"mc2_comm_alg": "ring"}, "0.30", (True, "vllm-ascend knows no value ring")),
        ({"mc2_comm_alg": "ring"}, "0.23", (False, "vllm-ascend 0.23 has no such option")),
        ({"combine_quant_mode": 1}, "0.30", (True, "vllm-ascend knows no value 1")),
        ({"combine_quant_mode": "2"}, "0.30", (True, "vllm-ascend knows no value 2")),
        ({"mc2_comm_alg": ["fullmesh"]}, "0.30", (True, "vllm-ascend knows no value ['fullmesh']")),
        ({"combine_quant_mode": 2}, "0.30", (False, "mc2's rows come back in this form")),
        ({"enable_mc2_hierarchy_comm": True}, "0.23", (False, "mc2's ops take the hierarchy")),
        (
            {"enable_fused_mc2": 1, "enable_mc2_hierarchy_comm": True},
            "0.23",
            (True, "vllm-ascend takes no fused MC2 beside MC2's hierarchy"),
        ),
    ],
    ids=str,
)
def test_a_recipes_row_says_what_happens_to_the_option(options, line, row):
    found = rows_of_recipe(options, line)[0]
    assert (found.is_refused, found.what.startswith(row[1])) == (row[0], True), found
