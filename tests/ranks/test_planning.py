"""planning: its bytes and collectives are those that the recording transport counts."""

from dataclasses import replace

import pytest
import torch

from tests.cases import seeded
from vllm_npu.core.limits import DEVICES, PORTABLE, MoELayer, QuantMode
from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.strategies.planning import auto_ranges, bytes_sent, collectives, plan_layer
from vllm_npu.strategies.select import build
from vllm_npu.strategies.table import STRATEGIES
from vllm_npu.tools.launch import Rank, ThreadRankPool
from vllm_npu.tools.reference import select_topk
from vllm_npu.trust.recording import CollectiveCounter

LAYER = MoELayer(num_experts=16, top_k=4, hidden_size=64, dtype=torch.bfloat16)
# Where a token needs all ranks, all2all's mean is what it sends.
LAYERS = {"mean": LAYER, "exact": replace(LAYER, top_k=16), "int8": replace(LAYER, quant_mode=QuantMode.INT8_PER_TOKEN)}
TOKENS = 512
GRIDS = [(1, 4), (2, 2), (4, 1)]  # (tp_size, dp_size)


def count(rank: Rank, layer: MoELayer, strategy: str, tp_size: int, dp_size: int) -> tuple[int, int]:
    """Calls and bytes of one rank for one layer with uniform routing."""
    counter = CollectiveCounter()
    groups = rank.groups(tp_size=tp_size, dp_size=dp_size, counter=counter)
    pipeline = build(strategy, groups, layer.num_experts, layer.quant_mode)
    generator = seeded(groups.topology.dp_rank)
    hidden_states = torch.randn(TOKENS, layer.hidden_size, generator=generator).to(layer.dtype)
    weights, ids = select_topk(torch.randn(TOKENS, layer.num_experts, generator=generator), layer.top_k)
    step = StepPlan(num_tokens_across_dp=(TOKENS,) * dp_size, sharding=TokenSharding.REPLICATED)
    pipeline.run(hidden_states, weights, ids, lambda rows, *_: rows.to(layer.dtype), step)
    return counter.calls.total(), counter.bytes_sent.total()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_planned_is_what_is_sent(strategy, grid):
    topology = ParallelTopology.of_rank(0, tp_size=grid[0], dp_size=grid[1])
    for name, layer in LAYERS.items():
        with ThreadRankPool(4, timeout=30) as pool:
            counted = pool.run(count, layer, strategy, *grid)
        assert {calls for calls, _ in counted} == {collectives(strategy, topology)}
        sent = sum(sent for _, sent in counted) / 4
        planned = bytes_sent(strategy, layer, topology, TOKENS, native_mc2=False)
        assert sent == pytest.approx(planned, rel=0.02 if strategy == "all2all" and name != "exact" else 0), name


def test_a_native_mc2_sends_a_row_an_expert_there_and_back():
    topology = ParallelTopology.of_rank(0, tp_size=2, dp_size=2)
    rows = TOKENS // 2
    there_and_back = rows * 4 * (128 + 128) * 3 // 4
    assert bytes_sent("mc2", LAYER, topology, TOKENS, native_mc2=True) == there_and_back + rows * 128


def test_auto_ranges_meet_and_cover_all_steps():
    topology = ParallelTopology.of_rank(0, tp_size=2, dp_size=8)
    layer = MoELayer(num_experts=256, top_k=8, hidden_size=7168, dtype=torch.bfloat16)
    ranges = auto_ranges(layer, topology, DEVICES["A2"], 2000)
    assert [(each.first_tokens, each.last_tokens, each.strategy) for each in ranges] == [
        (1, 512, "mc2"),  # 256 tokens on each of two TP ranks
        (513, 2000, "all2all"),
    ]


def test_a_refused_strategy_has_its_reason_and_an_algorithm_that_fits_its_buffer():
    topology = ParallelTopology.of_rank(0, tp_size=1, dp_size=2)
    layer = MoELayer(num_experts=128, top_k=8, hidden_size=2048, dtype=torch.bfloat16)
    planned = plan_layer(layer, topology, DEVICES["A3"], 4096)
    full_mesh, hierarchy = planned.buffers
    assert (full_mesh.tokens_per_rank, full_mesh.needed_mb, full_mesh.reason) == (512, 608, None)
    assert hierarchy.needed_mb is None
    assert "ep_size" in hierarchy.reason
    reasons = {each.strategy: each.reason for each in plan_layer(layer, topology, DEVICES["310P"], 8).strategies}
    assert reasons["allgather"] is reasons["naive"] is None
    assert reasons["mc2"] == "310P has no MC2; use allgather"
    assert plan_layer(layer, topology, PORTABLE, 8).buffers == ()
