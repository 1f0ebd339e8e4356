"""npu_moe_update_expert in portable_ops against op-plugin's arithmetic, one choice at a time."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import SEEDS, distinct_ids, seeded
from tests.pure.test_eplb_placement import drawn
from vllm_npu.core.limits import BalanceMode
from vllm_npu.device.portable_ops import npu_moe_update_expert
from vllm_npu.errors import InvalidInputError


@given(
    st.integers(1, 8),
    st.integers(1, 4),
    SEEDS,
    st.sampled_from(BalanceMode),
    st.sampled_from((torch.int32, torch.int64)),
)
def test_every_choice_goes_to_the_replica_that_the_rule_names(num_ranks, slots, seed, mode, dtype):
    num_experts = 1 + seed % (num_ranks * slots)
    placement = drawn(num_ranks, slots, num_experts, seed)
    ids = distinct_ids(7, min(3, num_experts), num_experts, seeded(seed)).to(dtype)
    rank = seed % num_ranks
    table = placement.eplb_table()
    before = ids.clone()
    physical = npu_moe_update_expert(ids, table, local_rank_id=rank, world_size=num_ranks, balance_mode=mode)
    assert physical.dtype == dtype
    assert torch.equal(ids, before)
    for token, (row, found) in enumerate(zip(ids.tolist(), physical.tolist(), strict=True)):
        for expert, place in zip(row, found, strict=True):
            assert placement.slots[place // slots][place % slots] == expert
            count, *places = table[expert].tolist()
            share = rank // math.ceil(num_ranks / count) if mode is BalanceMode.BY_RANK else token % count
            assert place == places[share]


IDS, TABLE = torch.tensor([[0, 1]]), torch.tensor([[1, 0], [1, 1]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"expert_ids": IDS[0]}, r"expert_ids is \(2,\)"),
        ({"eplb_table": TABLE.long()}, "eplb_table torch.int64"),
        ({"expert_ids": IDS + 1}, r"expert_ids lie in \[1, 2\]; the table has experts 0..1"),
        ({"expert_ids": IDS - 1}, r"expert_ids lie in \[-1, 0\]"),
        ({"eplb_table": TABLE + 1}, r"replica counts lie in \[2, 2\]; with 2 columns they must lie in \[1, 1\]"),
        ({"local_rank_id": 2}, "rank 2 is not one of 2"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, text):
    arguments = {"expert_ids": IDS, "eplb_table": TABLE, "local_rank_id": 0, "world_size": 2} | changes
    with pytest.raises(InvalidInputError, match=text):
        npu_moe_update_expert(**arguments)
