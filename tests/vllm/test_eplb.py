"""vLLM rearranges experts through our communicators on real ranks. move_experts must bring the same result."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.cases import same_bits
from tests.pure.test_eplb_placement import drawn
from tests.ranks.test_eplb_movement import FULL, SLOTS, TURNED, expert, held, large, without_memory
from tests.vllm.test_moe_runner import Layout, Tokens, check_output, counts_of, dense_moe, quantisation
from tests.vllm.vllm_ranks import (
    DP2,
    NUM_EXPERTS,
    NUM_RANKS,
    TOP_K,
    TP2,
    TP2_DP2,
    Grid,
    VllmRanks,
    Weights,
    build_layer,
    make_config,
    ranks,  # noqa: F401 - fixture
    vllm_step,
)
from vllm_npu.eplb.movement import move_experts
from vllm_npu.eplb.placement import EMPTY
from vllm_npu.errors import PlanDisagreementError, UnsupportedConfigError
from vllm_npu.tools.launch import Rank


def rearranges(rank: Rank, backends: list[str | None]) -> list[str]:
    from vllm.distributed.eplb.eplb_communicator import EplbCommunicator
    from vllm.distributed.eplb.rebalance_execute import rearrange_expert_weights_inplace

    from vllm_npu.plugin import eplb_communicators
    from vllm_npu.plugin.eplb_communicators import create_eplb_communicator

    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    # The attributes of a GroupCoordinator that the function reads. A real one needs vLLM's whole start-up.
    coordinator = SimpleNamespace(
        cpu_group=dist.group.WORLD, device_group=None, device_communicator=None, unique_name="ep"
    )
    num_experts = SLOTS * rank.num_ranks - 2
    kinds = []
    for seed, backend in enumerate(backends):
        old, new = (drawn(rank.num_ranks, SLOTS, num_experts, 2 * seed + each) for each in (0, 1))
        layers = [held(old.slots[rank.rank]), held(new.slots[rank.rank])]
        communicator = create_eplb_communicator(coordinator, backend, layers, layers[0])
        assert isinstance(communicator, EplbCommunicator)
        there, back = ([e for row in each.slots for e in row] for each in (old, new))
        rearrange_expert_weights_inplace(
            torch.tensor([there, back]), torch.tensor([back, there]), layers, [torch.empty_like(w) for w in layers[0]],
            dist.group.WORLD, communicator,
        )  # fmt: skip
        own = held(old.slots[rank.rank])
        move_experts(own, old.slots, new.slots, num_experts, communicator.communicator, ep)
        for slot, e in enumerate(new.slots[rank.rank]):
            if e != EMPTY:
                for theirs, ours, wanted in zip(layers[0], own, expert(e), strict=True):
                    assert same_bits(theirs[slot], wanted)
                    assert same_bits(ours[slot], wanted)
        for slot, e in enumerate(old.slots[rank.rank]):
            assert e == EMPTY or all(map(same_bits, [w[slot] for w in layers[1]], expert(e)))
        # the original design's calls, one tensor each
        x, y = torch.full((3,), float(rank.rank)), torch.empty(3)
        communicator.add_send(x, (rank.rank + 1) % rank.num_ranks)
        communicator.add_recv(y, (rank.rank - 1) % rank.num_ranks)
        communicator.set_stream(None)
        communicator.execute()
        assert y.tolist() == [(rank.rank - 1) % rank.num_ranks] * 3
        kinds.append(type(communicator.communicator).__name__)
    for original in (
        eplb_communicators.TorchDistNcclEplbCommunicator(ep_group=dist.group.WORLD),
        eplb_communicators.TorchDistGlooStagedEplbCommunicator(dist.group.WORLD, cuda_stream=None),
    ):
        y = torch.empty(3)
        original.add_send(torch.full((3,), float(rank.rank)), (rank.rank + 1) % rank.num_ranks)
        original.add_recv(y, (rank.rank - 1) % rank.num_ranks)
        original.execute()
        assert y.tolist() == [(rank.rank - 1) % rank.num_ranks] * 3
    with pytest.raises(
        UnsupportedConfigError, match=r"no EPLB communicator 'nixl' for weights on cpu; set .*: torch_gloo, torch_nccl"
    ):
        create_eplb_communicator(coordinator, "nixl", layers, layers[0])
    return kinds


def test_vllms_rearrangement_brings_every_slot_its_expert(ranks: VllmRanks):  # noqa: F811
    names = ranks.run_on_pool(rearranges, [None, "torch_gloo", "torch_nccl"])
    assert names == [["TorchDistEplbCommunicator"] * 3] * NUM_RANKS


def rearranges_without_memory(rank: Rank, starved: int) -> str:
    """vLLM's rearrangement through CPU memory, of which one rank has too little for the staging. Then again, with enough."""
    from vllm.distributed.eplb.rebalance_execute import rearrange_expert_weights_inplace

    from vllm_npu.plugin.eplb_communicators import TorchDistGlooStagedEplbCommunicator

    own = large(FULL[rank.rank])
    buffer = [torch.empty_like(w) for w in own]
    communicator = TorchDistGlooStagedEplbCommunicator(dist.group.WORLD)
    there, back = (torch.tensor([[e for row in table for e in row]]) for table in (FULL, TURNED))
    with without_memory(rank.rank == starved), pytest.raises(PlanDisagreementError) as error:
        rearrange_expert_weights_inplace(there, back, [own], buffer, dist.group.WORLD, communicator)
    assert all(map(same_bits, own, large(FULL[rank.rank]))), "weights were changed"
    rearrange_expert_weights_inplace(there, back, [own], buffer, dist.group.WORLD, communicator)
    assert all(map(same_bits, own, large(TURNED[rank.rank])))
    return str(error.value)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS: Linux")
def test_a_rank_without_memory_for_vllms_rearrangement_is_named_on_all_ranks(ranks: VllmRanks):  # noqa: F811
    for said in ranks.run_on_pool(rearranges_without_memory, 1):
        assert said.startswith(
            "some ranks cannot move the experts of this layer, and none was moved; free memory on them"
        )
        assert "  ranks [0, 2, 3]: ready\n  ranks [1]: rank 1 cannot prepare: " in said
        assert "tried to allocate" in said


# ------------------------------------------------------------------------------------ replicas in vLLM's MoE layer


LAYOUTS = [Layout(TP2), Layout(DP2), Layout(TP2_DP2), Layout(TP2_DP2, sequence_parallel=True)]


def run_replicas(grid: Grid, layout: Layout) -> None:
    """vLLM moves experts to random places, several to most ranks. Then the layer's output and its counted load are checked."""
    from vllm.distributed import get_ep_group
    from vllm.distributed.eplb.rebalance_execute import rearrange_expert_weights_inplace

    from vllm_npu.plugin.eplb_communicators import create_eplb_communicator
    from vllm_npu.plugin.step_planner import planner_of

    redundant = 2 * grid.size
    config = make_config(grid, redundant_experts=redundant)
    layer = build_layer(
        grid,
        config,
        shared=True,
        sequence_parallel=layout.sequence_parallel,
        enable_eplb=True,
        num_redundant_experts=redundant,
    )
    ep = get_ep_group()
    weights = list(layer.get_expert_weights())
    slots = (NUM_EXPERTS + redundant) // grid.size
    placement = torch.arange(grid.size * slots)[None] % NUM_EXPERTS
    state = SlotState(layer, NUM_EXPERTS, grid.size * slots)
    communicator = create_eplb_communicator(ep, "torch_gloo", [weights], weights)
    for seed, strategy in enumerate(layout.strategies):
        planner_of(config).propose(strategy)
        drawn_slots = [e for row in drawn(grid.size, slots, NUM_EXPERTS, seed, empty=False).slots for e in row]
        moved = torch.tensor([drawn_slots])
        rearrange_expert_weights_inplace(
            placement, moved, [weights], [torch.empty_like(w) for w in weights], ep.device_group, communicator
        )
        placement = moved
        state.place(drawn_slots)
        for counts in counts_of(grid):
            tokens = Tokens.random(layout, grid, counts, torch.float32)
            state.begin(counts[grid.dp_rank])
            with vllm_step(grid, config, counts):
                output = layer(hidden_states=tokens.hidden_states, router_logits=tokens.router_logits)
            expected = dense_moe(tokens, Weights.random(torch.float32), shared=True)
            check_output(output, tokens, expected, (strategy, counts))
            choices = tokens.own.take(tokens.whole[1]).topk(TOP_K, dim=-1).indices.tolist()
            counts_here = layout.sequence_parallel or grid.tp_rank == 0
            own = [0] * len(drawn_slots)
            for row, experts in enumerate(choices if counts_here else []):
                for e in experts:
                    places = [place for place, there in enumerate(drawn_slots) if there == e]
                    own[places[row % len(places)]] += 1
            assert state.load.tolist() == own, (strategy, counts)
            everywhere = state.load.clone()
            dist.all_reduce(everywhere, group=ep.cpu_group)
            assert int(everywhere.sum()) == sum(counts) * TOP_K

    counts = counts_of(grid)[0]
    tokens = Tokens.random(layout, grid, counts, torch.float32)
    for recorded, real in (
        (False, counts[grid.dp_rank]),
        (True, 0),
    ):  # a step that is not recorded; one of padding alone
        state.begin(real, recorded=recorded)
        with vllm_step(grid, config, counts):
            layer(hidden_states=tokens.hidden_states, router_logits=tokens.router_logits)
        assert state.load.sum() == 0


class SlotState:
    """The tensors that vLLM's EplbState gives a layer and changes in place."""

    def __init__(self, layer: Any, num_experts: int, num_slots: int) -> None:
        self.load = torch.zeros(num_slots, dtype=torch.int32)
        self.maps = torch.full((1, num_experts, 1024), EMPTY)
        self.replicas = torch.zeros((1, num_experts), dtype=torch.int64)
        layer.set_eplb_state(0, self.load[None], self.maps, self.replicas)
        self.recorded, self.real = torch.tensor(True), torch.tensor(0, dtype=torch.int32)
        layer.eplb_state.should_record_tensor = self.recorded
        layer.eplb_state.num_unpadded_tokens_tensors = [self.real]

    def place(self, slots: list[int]) -> None:
        from vllm.distributed.eplb.eplb_state import compute_logical_maps

        maps, replicas = compute_logical_maps(torch.tensor([slots]), self.maps.shape[1])
        self.maps.fill_(EMPTY)
        self.maps[..., : maps.shape[-1]] = maps
        self.replicas.copy_(replicas)

    def begin(self, num_tokens: int, *, recorded: bool = True) -> None:
        self.load.zero_()
        self.recorded.fill_(recorded)
        self.real.fill_(num_tokens)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_strategy_finds_replicas_and_counts_them(ranks: VllmRanks, layout):  # noqa: F811
    ranks.run(run_replicas, layout.grid, layout)


# ------------------------------------------------------------------------------------- what vLLM cannot balance


def run_quantised(grid: Grid) -> None:
    from vllm_npu.plugin import compat

    unmovable = quantisation(supports_eplb=False)  # as of every method that does not say otherwise
    config = make_config(grid, redundant_experts=grid.size)
    with (
        pytest.raises(
            UnsupportedConfigError,
            match=r"EPLB is not supported QuantisedMoEMethod\..* serve an unquantised checkpoint",
        ),
        compat.current().unmovable_experts_explained(),
    ):
        build_layer(grid, config, quant_config=unmovable, enable_eplb=True, num_redundant_experts=grid.size)


def test_quantised_experts_that_cannot_move_are_refused_with_the_remedy(ranks: VllmRanks):  # noqa: F811
    ranks.run(run_quantised, DP2)


def test_models_that_vllm_cannot_balance_are_refused_by_name():
    from vllm_npu.plugin import compat

    runner = SimpleNamespace(model=torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedConfigError, match=r"Linear is no MixtureOfExperts of vLLM.*leave out --enable-eplb"):
        compat.current().start_eplb(runner)
