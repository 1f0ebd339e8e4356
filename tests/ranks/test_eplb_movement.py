"""move_experts on real ranks: every slot gets its expert, and an error on one rank leaves the weights of all unchanged."""

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.cases import same_bits
from tests.pure.test_eplb_placement import drawn
from tests.ranks.test_eplb_contract import MADE_OF_A_TRANSPORT, unfilled, weights
from tests.time_limits import on_this_machine
from vllm_npu.eplb.communicator import EplbCommunicator
from vllm_npu.eplb.movement import move_experts
from vllm_npu.eplb.placement import EMPTY
from vllm_npu.eplb.torch_dist import TorchDistEplbCommunicator
from vllm_npu.errors import InvalidInputError, PlanDisagreementError, TransportError, VllmNpuError
from vllm_npu.tools.launch import ProcessRankPool, Rank
from vllm_npu.transport.base import SendRecv

SHAPES = (((4, 6), torch.bfloat16), ((6, 3), torch.int8), ((), torch.float32))
SLOTS = 3


def expert(e: int) -> list[torch.Tensor]:
    return [weights(shape, dtype, 10 * e + i) for i, (shape, dtype) in enumerate(SHAPES)]


def held(row) -> list[torch.Tensor]:
    """Return the weights of a rank that has these experts, each [SLOTS, ...]."""
    rows = [[unfilled(shape, dtype) for shape, dtype in SHAPES] if e == EMPTY else expert(e) for e in row]
    return [torch.stack(list(each)) for each in zip(*rows, strict=True)]


def moves(rank: Rank, communicator: EplbCommunicator, voters) -> None:
    num_experts = SLOTS * rank.num_ranks - 2
    placements = [drawn(rank.num_ranks, SLOTS, num_experts, seed) for seed in range(6)]
    with rank.device:
        own = held(placements[0].slots[rank.rank])
        addresses = [w.data_ptr() for w in own]
        for seed, (old, new) in enumerate(pairwise(placements)):
            slots = new.slots if seed % 2 else torch.tensor(new.slots, device="cpu")
            move_experts(own, old.slots, slots, num_experts, communicator, voters, ranks_per_node=1 + seed % 2)
            for slot, e in enumerate(new.slots[rank.rank]):
                if e != EMPTY:
                    assert all(same_bits(w[slot], want) for w, want in zip(own, expert(e), strict=True)), (
                        seed,
                        slot,
                        e,
                    )
        assert [w.data_ptr() for w in own] == addresses, "graphs hold the addresses"


def moves_over_gloo(rank: Rank, kind: str) -> None:
    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    moves(rank, MADE_OF_A_TRANSPORT[kind](ep), ep)


@pytest.mark.parametrize("kind", MADE_OF_A_TRANSPORT)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_slot_gets_its_expert(pools, kind, num_ranks):
    pools("gloo", num_ranks).run(moves_over_gloo, kind)


OLD = [[0, 1, 2], [3, 4, 5]]
NEW = [[0, 3, 2], [1, 4, 5]]
TWICE, FEWER_RANKS = [[0, 3, 2], [1, 1, 5]], [[0, 1, 2]]
# Each fault: the new placement of each rank that does not get NEW, the error, and parts of its text.
FAULTS = {
    "twice on a rank, for one": (
        {0: [[0, 3, 3], [1, 4, 5]]},
        PlanDisagreementError,
        ["ranks [0]: placement: expert 3 is on slots 1 and 2 of rank 0", "ranks [1]: 2 transfers of"],
    ),
    "twice on a rank": ({0: TWICE, 1: TWICE}, InvalidInputError, ["expert 1 is on slots 0 and 1 of rank 1"]),
    "a rank too few": ({0: FEWER_RANKS, 1: FEWER_RANKS}, InvalidInputError, ["no rank of 0..0 has expert 3, 4, 5"]),
    "a rank too many": (
        {1: [*NEW, [0, 1, 2]]},
        PlanDisagreementError,
        ["the new one 3, 3 and 6", "ranks [0]: 2 transfers"],
    ),
    "fewer slots": (
        {1: [[0, 1], [2, 3]]},
        PlanDisagreementError,
        ["ranks [1]: placement: no rank of 0..1 has expert 4, 5"],
    ),
    "other tables on ranks": (
        {1: [[0, 4, 2], [3, 1, 5]]},
        PlanDisagreementError,
        [
            "ranks want to move experts differently",
            "ranks [0]: 2 transfers of torch.bfloat16 [4, 6]; torch.int8 [6, 3]; torch.float32 [], placements",
        ],
    ),
}


class FailsOnRank1(TorchDistEplbCommunicator):
    """Raises on rank 1 after its messages have arrived, as a transport does that cannot send."""

    def _exchange(self, messages: list[SendRecv], buffers: Sequence[torch.Tensor]) -> None:
        super()._exchange(messages, buffers)
        if self.rank == 1:
            raise TransportError("execute", self.group, self.rank, "the cable is out")


def stays_as_it_was(rank: Rank, news: dict[int, list[list[int]]], failing: bool) -> str:
    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    communicator = (FailsOnRank1 if failing else TorchDistEplbCommunicator)(ep)
    own, before = held(OLD[rank.rank]), held(OLD[rank.rank])
    with pytest.raises((InvalidInputError, PlanDisagreementError, TransportError)) as error:
        move_experts(own, OLD, news.get(rank.rank, NEW), 6, communicator, ep)
    assert all(map(same_bits, own, before)), "weights were changed"
    assert move_experts(own, OLD, NEW, 6, TorchDistEplbCommunicator(ep), ep) == 1, (
        "the group is in step, and all works again"
    )
    assert all(map(same_bits, own, held(NEW[rank.rank])))
    return f"{type(error.value).__name__} {error.value}"


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_anywhere_is_an_error_everywhere_and_changes_nothing(pools, fault):
    news, error, texts = FAULTS[fault]
    for said in pools("gloo", 2).run(stays_as_it_was, news, False):
        assert said.startswith(error.__name__)
        assert all(text in said for text in texts), said


def brings_what_does_not_fit(rank: Rank) -> list[str]:
    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    own, communicator = held(OLD[rank.rank]), TorchDistEplbCommunicator(ep)
    said = []
    for brought, table in ((own, [*OLD, OLD[0]]), ([w[:2] for w in own], OLD), ([], OLD)):
        with pytest.raises((InvalidInputError, PlanDisagreementError)) as error:
            move_experts(brought, table, table, 6, communicator, ep)
        said.append(str(error.value))
    return said


def test_tables_of_another_group_and_weights_of_other_slots_are_refused(pools):
    for table, slots, none in pools("gloo", 2).run(brings_what_does_not_fit):
        assert "the table has 3 ranks, group 'ep' has 2; give one row a rank" in table
        for rank in range(2):
            assert f"weights are [(2, 4, 6), (2, 6, 3), (2,)]; each needs 3 experts, the slots of rank {rank}" in slots
            assert f"weights are []; each needs 3 experts, the slots of rank {rank}" in none


def test_a_failure_on_one_rank_is_a_failure_on_all_and_changes_nothing(pools):
    said = pools("gloo", 2).run(stays_as_it_was, {}, True)
    assert said[1] == "TransportError execute on group 'ep' failed on rank 1: the cable is out"
    assert said[0].startswith(
        "TransportError move_experts on group 'ep' failed on rank 0: experts did not arrive on all ranks"
    )
    assert "ranks [1]: failed: execute on group 'ep' failed on rank 1: the cable is out" in said[0]


def comes_alone(rank: Rank) -> str:
    own = held(OLD[rank.rank])
    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    if rank.rank == 1:
        return "stays away"
    with pytest.raises(TransportError) as error:
        move_experts(own, OLD, NEW, 6, TorchDistEplbCommunicator(ep), ep)
    assert all(map(same_bits, own, held(OLD[rank.rank])))
    return str(error.value)


@pytest.mark.timeout(120)
def test_a_rank_that_stays_away_is_an_error_in_time():
    with ProcessRankPool(2, timeout=5, start_method="forkserver") as pool:
        assert "failed on rank 0" in pool.run(comes_alone)[0]


MANY_BYTES = 40 << 20  # of an expert; glibc gives so many back at once, so no freed memory is used again
SLACK_BYTES = 12 << 20  # left to the rank that lacks memory: less than an expert
FULL = [[0, 1], [2, 3], [4, 5], [6, 7]]
TURNED = [[7, 1], [0, 3], [2, 5], [4, 6]]  # each rank receives one, and rank 3 also copies one


@contextmanager
def without_memory(starved: bool) -> Iterator[None]:
    """Let this process take SLACK_BYTES more address space at most: a larger allocation fails, as when memory has run out."""
    if not starved:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + SLACK_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def large(row: list[int]) -> list[torch.Tensor]:
    return [torch.stack([torch.full((MANY_BYTES,), 10 + e, dtype=torch.uint8) for e in row])]


def lacks_memory(rank: Rank, starved: list[int]) -> tuple[str, float]:
    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    own, communicator = large(FULL[rank.rank]), TorchDistEplbCommunicator(ep)
    ep.barrier()
    began = time.monotonic()
    with without_memory(rank.rank in starved), pytest.raises(VllmNpuError) as error:
        move_experts(own, FULL, TURNED, 8, communicator, ep)
    seconds = time.monotonic() - began
    assert all(map(same_bits, own, large(FULL[rank.rank]))), "weights were changed"
    assert move_experts(own, FULL, TURNED, 8, communicator, ep) == 1
    assert all(map(same_bits, own, large(TURNED[rank.rank])))
    return f"{type(error.value).__name__} {error.value}", seconds


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS: Linux")
@pytest.mark.parametrize("starved", [[2], [0, 3], [0, 1, 2, 3]], ids=str)
def test_a_rank_without_memory_is_named_on_all_ranks_and_nothing_moves(pools, starved):
    outcomes = pools("gloo", 4).run(lacks_memory, starved)
    for said, seconds in outcomes:
        assert said.startswith(
            "PlanDisagreementError ranks want to move experts differently, or some cannot; no weight"
        )
        assert seconds < on_this_machine(5)
        for rank in starved:
            assert f"  ranks [{rank}]: rank {rank} cannot prepare: " in said
            assert f"tried to allocate {MANY_BYTES} bytes" in said
        if len(starved) < 4:
            others = [rank for rank in range(4) if rank not in starved]
            assert f"  ranks {others}: 5 transfers of torch.uint8 [{MANY_BYTES}]" in said
