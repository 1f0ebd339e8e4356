"""check_start: faults that stop an engine on an NPU before its first token, and limits that only lower MC2's capacity."""

from dataclasses import replace

import pytest
import torch

from vllm_npu.core.limits import DEVICES, MoELayer
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.errors import DeviceLimitError, HcclBufferError, UnsupportedConfigError, UnsupportedDeviceError
from vllm_npu.strategies.start_checks import PlannedShape, check_start, describe_capacity

LAYER = MoELayer(num_experts=256, top_k=8, hidden_size=7168, dtype=torch.bfloat16)
EP16 = ParallelTopology.of_rank(0, tp_size=1, dp_size=16)
TP3_DP3 = ParallelTopology.of_rank(0, tp_size=3, dp_size=3)
TP2_EP16 = ParallelTopology.of_rank(0, tp_size=2, dp_size=8)
DECODE_32 = PlannedShape(decode_tokens=32)
PLENTY = 1 << 20


def check(
    requested="auto", *, topology=EP16, layer=LAYER, family="A3", shape=DECODE_32, buffer_mb=PLENTY, captures=None
):
    device = DEVICES[family] if captures is None else replace(DEVICES[family], captures=captures)
    return check_start(requested, topology, layer, device, shape=shape, hccl_buffer_mb=buffer_mb)


def test_a_chip_without_the_op_is_named():
    with pytest.raises(UnsupportedDeviceError, match="310P has no MC2; use allgather"):
        check("mc2", family="310P")
    assert check("auto", family="310P") == DEVICES["310P"]


@pytest.mark.parametrize(
    ("family", "layer", "topology", "what"),
    [
        ("A3", replace(LAYER, hidden_size=512), EP16, "hidden_size 1024 to 8192"),
        ("A3", replace(LAYER, dtype=torch.float32), EP16, "hidden_states are float32"),
        ("A3", replace(LAYER, dtype=torch.float16, top_k=17), EP16, "at most 16 experts a token"),
        ("A3", replace(LAYER, dtype=torch.float16, num_experts=1040), EP16, "at most 1024 experts"),
        ("A2", replace(LAYER, num_experts=288), TP3_DP3, "ep_size 2 to 8, 16, 32, 64, 128, 256, not 9"),
        ("A2", LAYER, ParallelTopology.of_rank(0, tp_size=2, dp_size=2), "at most 24 experts a rank, not 64"),
    ],
)
def test_a_layer_past_a_limit_of_the_op_is_named_where_mc2_was_asked_for(family, layer, topology, what):
    with pytest.raises(DeviceLimitError) as error:
        check("mc2", family=family, layer=layer, topology=topology)
    assert what in str(error.value)
    assert "use all2all" in str(error.value)
    device = check("auto", family=family, layer=layer, topology=topology, buffer_mb=1)  # auto takes another strategy
    assert what in describe_capacity(device, topology, [layer])


@pytest.mark.parametrize("requested", ["auto", "allgather"])
def test_experts_that_do_not_divide_over_the_ranks_are_refused_with_the_sizes_that_do(requested):
    with pytest.raises(
        UnsupportedConfigError, match="over ep_size=24; choose tp_size \\* dp_size = 16 or 32, or add 8 redundant"
    ):
        check(requested, topology=ParallelTopology.of_rank(0, tp_size=2, dp_size=12))


@pytest.mark.parametrize("requested", ["auto", "mc2"])
def test_a_buffer_that_does_not_take_the_decode_steps_names_the_number(requested):
    with pytest.raises(HcclBufferError) as error:
        check(requested, buffer_mb=200)
    # 2 * 32 tokens * (256 experts * 14848 + 8 * 14336 bytes)
    assert "export HCCL_BUFFSIZE=239 on every rank" in str(error.value)
    assert check(requested, buffer_mb=239).capacities["mc2"] == 32


def test_tokens_are_shared_by_the_tp_ranks():
    with pytest.raises(HcclBufferError, match="HCCL_BUFFSIZE=120 for steps of 16 tokens a rank"):
        check(topology=TP2_EP16, buffer_mb=100)


@pytest.mark.parametrize("family", ["A2", "A3"])
@pytest.mark.parametrize("requested", ["all2all", "allgather", "naive"])
def test_strategies_without_mc2_need_no_buffer(requested, family):
    limits = check(requested, family=family, buffer_mb=1)
    assert limits.capacities["mc2"] == 0, "if the running engine is switched to mc2, its steps take all2all"
    assert replace(limits, mc2=None) == replace(DEVICES[family], mc2=None)


def test_a_layer_that_only_the_hierarchy_takes_is_checked_against_its_buffer():
    layer = replace(LAYER, num_experts=512)  # 32 a rank
    assert check(family="A2", layer=layer) == DEVICES["A2"]
    # (512 experts + 16 / 4) * 32 tokens * 14464 bytes + 8 MiB
    with pytest.raises(HcclBufferError, match="mc2 on A2, hierarchy needs HCCL_BUFFSIZE=236"):
        check(family="A2", layer=layer, buffer_mb=200)


@pytest.mark.parametrize("experts", [(512, 256), (256, 512)], ids=str)
def test_layers_of_a_model_keep_their_own_algorithm_and_its_own_capacity(experts):
    device = DEVICES["A2"]
    for each in experts:
        device = check_start(
            "auto", EP16, replace(LAYER, num_experts=each), device, shape=DECODE_32, hccl_buffer_mb=250
        )
    capacities = {
        each: device.for_layer(replace(LAYER, num_experts=each), 16).capacities["mc2"] for each in sorted(experts)
    }
    alone = {each: check(family="A2", layer=replace(LAYER, num_experts=each), buffer_mb=250) for each in experts}
    assert capacities == {
        each: alone[each].for_layer(replace(LAYER, num_experts=each), 16).capacities["mc2"] for each in sorted(experts)
    }
    assert capacities[256] != capacities[512]
    layers = [replace(LAYER, num_experts=each) for each in experts]
    assert f"up to {min(capacities.values())} tokens" in describe_capacity(device, EP16, layers)


def test_capacity_is_what_the_buffer_takes_and_never_more_than_the_op_takes():
    assert check(buffer_mb=1000).capacities["mc2"] == 133
    assert check(buffer_mb=PLENTY).capacities["mc2"] == 512
    assert check("allgather", buffer_mb=1000).capacities["mc2"] == 133
    assert describe_capacity(check(buffer_mb=1000), EP16, [LAYER]) == "mc2 takes up to 133 tokens a rank"


def test_a_captured_step_that_would_read_counts_on_the_host_is_refused():
    shape = PlannedShape(decode_tokens=32, graph_tokens=(1, 32, 256))
    with pytest.raises(UnsupportedConfigError, match=r"all2all \(requested\) reads sizes on the host"):
        check("all2all", shape=shape, captures=("naive",))
    assert check("all2all", shape=shape) == DEVICES["A3"], "captured steps take allgather"
    assert check(shape=shape, buffer_mb=1000).capacities["mc2"] == 133, "steps of 256 tokens take allgather"
    assert check(shape=shape).capacities["mc2"] == 512
    assert check("allgather", shape=shape) == DEVICES["A3"]
