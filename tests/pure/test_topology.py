"""topology: the groups partition every grid, every expert has one owner."""

import dataclasses

import pytest

from tests.cases import GRIDS, topologies
from vllm_npu.core.topology import ExpertPlacement, ParallelTopology, expert_places, places_of_experts
from vllm_npu.errors import UnsupportedConfigError


@pytest.mark.parametrize("expert_parallel", [True, False])
@pytest.mark.parametrize(("tp_size", "dp_size"), GRIDS)
def test_groups_partition_the_world(tp_size, dp_size, expert_parallel):
    ranks = topologies(tp_size, dp_size, expert_parallel=expert_parallel)
    world = list(range(tp_size * dp_size))
    assert [each.rank for each in ranks] == world
    for group_of, size in (("tp_group", tp_size), ("dp_group", dp_size)):
        groups = {getattr(each, group_of) for each in ranks}
        assert sorted(rank for group in groups for rank in group) == world, "each rank is in one group"
        assert {len(group) for group in groups} == {size}
    for each in ranks:
        assert each.tp_group[each.tp_rank] == each.rank
        assert each.dp_group[each.dp_rank] == each.rank
        assert set(each.tp_group) & set(each.dp_group) == {each.rank}
        assert each.tp_group == tuple(range(each.tp_group[0], each.tp_group[0] + tp_size)), "tp ranks are neighbours"
        assert each.world_size == len(world)


@pytest.mark.parametrize(("tp_size", "dp_size"), GRIDS)
def test_every_expert_has_one_owner(tp_size, dp_size):
    ranks = topologies(tp_size, dp_size)
    placement = ExpertPlacement(3 * len(ranks), ranks[0].ep_size)
    owned = [placement.experts_of(each.ep_rank) for each in ranks]
    assert [expert for part in owned for expert in part] == list(range(3 * len(ranks)))


@pytest.mark.parametrize(("tp_size", "dp_size"), GRIDS)
def test_without_expert_parallelism_each_rank_has_a_part_of_every_expert(tp_size, dp_size):
    assert {(each.ep_rank, each.ep_size) for each in topologies(tp_size, dp_size, expert_parallel=False)} == {(0, 1)}


@pytest.mark.parametrize(
    ("num_experts", "ep_size", "sizes", "redundant"),
    [(1, 2, "1", 1), (7, 2, "1 or 7", 1), (8, 3, "2 or 4", 1), (15, 16, "15", 1), (257, 16, "1 or 257", 15)],
)
def test_experts_that_do_not_divide_over_the_ranks_are_refused_with_the_numbers_that_would_do(
    num_experts, ep_size, sizes, redundant
):
    with pytest.raises(UnsupportedConfigError) as error:
        ExpertPlacement(num_experts, ep_size)
    assert str(error.value) == (
        f"{num_experts} experts do not divide over ep_size={ep_size}; choose tp_size * dp_size = {sizes}, or add {redundant} "
        "redundant experts"
    )


@pytest.mark.parametrize(
    ("num_experts", "ep_size", "places"),
    [
        (4, 2, [0, 1, 2, 3]),
        (3, 2, [0, 1, 2]),
        (5, 3, [0, 1, 2, 3, 4]),
        (7, 3, [0, 1, 2, 3, 4, 6, 7]),
        (6, 4, [0, 1, 2, 3, 4, 6]),
    ],
)
def test_the_first_ranks_have_one_expert_more_and_the_others_an_empty_place(num_experts, ep_size, places):
    assert expert_places(num_experts, ep_size) == places
    assert places_of_experts(num_experts, ep_size) == -(-num_experts // ep_size) * ep_size > max(places)


@pytest.mark.parametrize("num_experts", [0, -8])
def test_a_layer_has_experts(num_experts):
    with pytest.raises(UnsupportedConfigError, match=f"num_experts={num_experts}: a layer has 1 or more"):
        ExpertPlacement(num_experts, 4)


@pytest.mark.parametrize("rank", [-1, 6, 100])
def test_a_rank_outside_the_grid_is_refused(rank):
    with pytest.raises(UnsupportedConfigError, match=r"dp_rank=-?\d+ of dp_size=3: not a rank"):
        ParallelTopology.of_rank(rank, tp_size=2, dp_size=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tp_rank": 2}, "tp_rank=2 of tp_size=2"),
        ({"tp_rank": -1}, "tp_rank=-1 of tp_size=2"),
        ({"tp_size": 0, "tp_rank": 0}, "tp_rank=0 of tp_size=0"),
        ({"dp_rank": 3}, "dp_rank=3 of dp_size=3"),
        ({"dp_size": -1, "dp_rank": 0}, "dp_rank=0 of dp_size=-1"),
    ],
)
def test_a_place_outside_its_group_is_refused(changes, message):
    inside = {"tp_rank": 0, "tp_size": 2, "dp_rank": 0, "dp_size": 3, "expert_parallel": True}
    ParallelTopology(**inside)
    with pytest.raises(UnsupportedConfigError, match=message):
        ParallelTopology(**inside | changes)


def test_a_topology_cannot_be_changed():
    topology = ParallelTopology.of_rank(0, tp_size=2, dp_size=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        topology.tp_rank = 1


def test_a_topology_reads_as_its_grid():
    assert str(ParallelTopology.of_rank(0, tp_size=2, dp_size=4)) == "TP2xDP4xEP"
    assert str(ParallelTopology.of_rank(0, tp_size=2, dp_size=4, expert_parallel=False)) == "TP2xDP4"
