"""Placements and transfers: every expert arrives, sources share the load, and an error names what is wrong in a table."""

from collections import Counter

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.cases import GRIDS, SEEDS, seeded, topologies
from vllm_npu.core.limits import BalanceMode
from vllm_npu.core.step_plan import TokenSharding
from vllm_npu.core.token_layout import TokenSlice, pad_rows
from vllm_npu.eplb.placement import EMPTY, ReplicaPlacement, mapping_rank, plan_transfers, transfers_of
from vllm_npu.eplb.replicas import own_load, to_physical
from vllm_npu.errors import InvalidInputError


def drawn(num_ranks: int, slots: int, num_experts: int, seed: int, *, empty: bool = True) -> ReplicaPlacement:
    """Draw a placement with every expert once. The other slots are replicas or empty. No expert is twice on a rank."""
    generator = seeded(seed)
    order = torch.randperm(num_ranks * slots, generator=generator).tolist()
    table = [[EMPTY] * slots for _ in range(num_ranks)]
    experts = torch.randperm(num_experts, generator=generator).tolist()
    extra = torch.randint(-1 if empty else 0, num_experts, (len(order) - num_experts,), generator=generator).tolist()
    for place, expert in zip(order, experts + extra, strict=True):
        row = table[place // slots]
        if expert not in row:
            row[place % slots] = expert
    return ReplicaPlacement.of(table, num_experts)


@given(st.integers(1, 6), st.integers(1, 5), SEEDS)
def test_a_simulated_move_brings_every_slot_its_expert(num_ranks, slots, seed):
    num_experts = 1 + seed % (num_ranks * slots)
    old, new = (drawn(num_ranks, slots, num_experts, seed + each) for each in (0, 1))
    plan = plan_transfers(old, new)
    held = [list(row) for row in old.slots]
    by_rank = [transfers_of(plan, rank) for rank in range(num_ranks)]
    for rank, own in enumerate(by_rank):
        for other in range(num_ranks):
            sent = [each for each in own.sends if each.rank == other]
            assert sent == [each for each in by_rank[other].receives if each.source_rank == rank], "one order on both"
        for each in own.sends + own.copies:
            assert old.slots[rank][each.source_slot] == each.expert
        for each in own.receives + own.copies + own.duplicates:
            held[rank][each.slot] = each.expert
        assert not {each.expert for each in own.receives} & set(old.slots[rank]), "fetched what it has"
    assert all(has == want for row, wanted in zip(held, new.slots, strict=True)
               for has, want in zip(row, wanted, strict=True) if want != EMPTY)  # fmt: skip


@given(st.integers(2, 8), SEEDS)
def test_no_source_sends_much_more_than_its_share(num_ranks, seed):
    """The loads of ranks that all have the same experts differ by one at most."""
    slots = 4
    old = ReplicaPlacement.of([[0, 1, 2, 3]] * (num_ranks - 1) + [[EMPTY] * slots], 4)
    order = torch.randperm(slots, generator=seeded(seed)).tolist()
    new = ReplicaPlacement.of([[0, 1, 2, 3]] * (num_ranks - 1) + [order], 4)
    loads = Counter(each.source_rank for each in plan_transfers(old, new))
    assert max(loads.values()) - min(loads[rank] for rank in range(num_ranks - 1)) <= 1
    assert plan_transfers(old, old) == ()


def test_the_own_node_is_nearer_than_an_idle_rank():
    old = ReplicaPlacement.of([[0, 1], [EMPTY, 2], [0, 1], [EMPTY, EMPTY]], 3)
    new = ReplicaPlacement.of([[0, 1], [EMPTY, 2], [0, 1], [0, 1]], 3)
    assert {each.source_rank for each in plan_transfers(old, new, ranks_per_node=2)} == {2}
    assert {each.source_rank for each in plan_transfers(old, new)} == {0, 2}


def test_one_expert_for_two_slots_of_a_rank_travels_once():
    old = ReplicaPlacement.of([[0, 1], [2, 3]], 4)
    new = ReplicaPlacement.of([[0, 1], [0, 0]], 2, allow_same_rank=True)
    with pytest.raises(
        InvalidInputError, match="the old one has 2 ranks, 2 slots a rank and 4 experts, the new one 2, 2 and 2"
    ):
        plan_transfers(old, new)
    old = ReplicaPlacement.of([[0, 1], [1, EMPTY]], 2)
    own = transfers_of(plan_transfers(old, new), 1)
    assert ([each.slot for each in own.receives], [each.slot for each in own.duplicates]) == ([0], [1])


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ([[0, 1], [2]], r"ranks have \[2, 1\] slots"),
        ([], r"ranks have \[\] slots"),
        ([[0, 1], [2, 4]], "slot 1 of rank 1 has expert 4; with 4 experts ids are 0..3"),
        ([[0, 1], [-2, 3]], "slot 0 of rank 1 has expert -2"),
        ([[0, 1], [2, 2]], "expert 2 is on slots 0 and 1 of rank 1"),
        ([[0, 1], [2, 0]], "no rank of 0..1 has expert 3"),
        (torch.zeros(4), r"the table is \[4\]; it must be \[ranks, slots of a rank\]"),
    ],
)
def test_a_table_that_cannot_be_names_expert_and_rank(table, text):
    with pytest.raises(InvalidInputError, match=text):
        ReplicaPlacement.of(table, 4)


def test_the_table_of_replicas_counts_and_lists_physical_experts():
    table = ReplicaPlacement.of([[0, 2], [1, 0], [EMPTY, 0]], 3).eplb_table()
    assert table.tolist() == [[3, 0, 3, 5], [1, 2, -1, -1], [1, 1, -1, -1]]
    assert table.dtype == torch.int32


def test_ranks_with_the_same_tokens_map_them_alike():
    grid = topologies(2, 2)
    assert [mapping_rank(each, TokenSharding.REPLICATED) for each in grid] == [0, 0, 2, 2]
    assert [mapping_rank(each, TokenSharding.SLICED_OVER_TP) for each in grid] == [0, 1, 2, 3]


def test_replicas_are_taken_by_rank_or_in_turns():
    table = ReplicaPlacement.of([[0, 1], [0, 2], [0, 3], [0, 4]], 5).eplb_table()
    ids, grid = torch.tensor([[0, 4]] * 5, dtype=torch.int32), topologies(2, 2)

    def first_choices(sharding: TokenSharding, *mode: BalanceMode) -> list[list[int]]:
        return [to_physical(ids, table, topology, sharding, *mode)[:, 0].tolist() for topology in grid]

    assert first_choices(TokenSharding.REPLICATED) == [[0, 2, 4, 6, 0]] * 4
    assert first_choices(TokenSharding.REPLICATED, BalanceMode.BY_RANK) == [[0] * 5, [0] * 5, [4] * 5, [4] * 5]
    assert first_choices(TokenSharding.SLICED_OVER_TP, BalanceMode.BY_RANK) == [[0] * 5, [2] * 5, [4] * 5, [6] * 5]


@given(st.sampled_from([grid for grid in GRIDS if grid[0] * grid[1] <= 8]), st.sampled_from(list(TokenSharding)), SEEDS)
@example((4, 1), TokenSharding.SLICED_OVER_TP, 0)
def test_the_loads_of_all_ranks_count_each_choice_of_a_real_token_once(grid, sharding, seed):
    (tp_size, dp_size), generator = grid, seeded(seed)
    counts = [5, *torch.randint(0, 9, (dp_size - 1,), generator=generator).tolist()]  # 5 over 4 is 2, 2, 1, 0
    ids = [torch.randint(0, 6, (count, 2), generator=generator) for count in counts]
    total = torch.zeros(6, dtype=torch.int64)
    for topology in topologies(tp_size, dp_size):
        num_tokens, own = counts[topology.dp_rank], ids[topology.dp_rank]
        if sharding is TokenSharding.SLICED_OVER_TP:
            rows = TokenSlice.chunk(num_tokens, rank=0, size=tp_size).length
            own = pad_rows(TokenSlice.chunk(num_tokens, rank=topology.tp_rank, size=tp_size).take(own), rows)
        else:
            own = pad_rows(own, num_tokens + 3)
        total += own_load(own, 6, topology, sharding, num_tokens)
    assert total.tolist() == torch.cat(ids).flatten().bincount(minlength=6).tolist()
