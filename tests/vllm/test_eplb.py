"""vLLM's own rearrangement of experts through our communicators, on real ranks, beside move_experts."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.cases import same_bits
from tests.pure.test_eplb_placement import drawn
from tests.ranks.test_eplb_movement import SLOTS, expert, held
from vllm_npu.eplb.movement import move_experts
from vllm_npu.eplb.placement import EMPTY
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.transport.launch import ProcessRankPool, Rank


def rearranges(rank: Rank, backends: list[str | None]) -> list[str]:
    from vllm.distributed.eplb.eplb_communicator import EplbCommunicator
    from vllm.distributed.eplb.rebalance_execute import rearrange_expert_weights_inplace

    from vllm_npu.plugin.eplb import create_eplb_communicator

    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    # What the function reads of a GroupCoordinator; a real one needs vLLM's whole start-up.
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
    with pytest.raises(
        UnsupportedConfigError, match=r"no EPLB communicator 'nixl' for weights on cpu; set .*: torch_gloo, torch_nccl"
    ):
        create_eplb_communicator(coordinator, "nixl", layers, layers[0])
    return kinds


def test_vllms_rearrangement_brings_every_slot_its_expert():
    with ProcessRankPool(2, timeout=60) as pool:
        names = pool.run(rearranges, [None, "torch_gloo", "torch_nccl"])
    assert names == [["TorchDistEplbCommunicator"] * 3] * 2
