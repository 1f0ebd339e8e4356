"""The contract of eplb/communicator.py for every communicator, over gloo.

tests/emulated/test_eplb.py runs it on NPU tensors, and tests/cuda/test_eplb.py on GPUs.
"""

import threading
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cases import same_bits, seeded
from vllm_npu.eplb import CHOICE, COMMUNICATORS, open_communicator
from vllm_npu.eplb.communicator import EplbCommunicator
from vllm_npu.eplb.gloo_staged import GlooStagedEplbCommunicator
from vllm_npu.eplb.hccl import HcclEplbCommunicator
from vllm_npu.eplb.pynccl import PyNcclEplbCommunicator
from vllm_npu.eplb.torch_dist import TorchDistEplbCommunicator
from vllm_npu.errors import InvalidInputError, TransportError, UnsupportedConfigError
from vllm_npu.tools.launch import ProcessRankPool, Rank
from vllm_npu.transport.base import SendRecv, Transport
from vllm_npu.transport.gloo import GlooTransport

STAGING = 1 << 16  # bytes: less than the large tensor of many_small_and_one_large
PIECE = 10_000
DTYPES = (torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn, torch.int64)


class GroupOverATransport:
    """pynccl.GroupedPointToPoint for processes without GPUs. Messages between group_start and group_end travel together."""

    def __init__(self, transport: Transport) -> None:
        self.rank, self.world_size = transport.rank, transport.size
        self._transport = transport
        self._open: list[SendRecv] | None = None

    def group_start(self) -> None:
        assert self._open is None, "a group within a group"
        self._open = []

    def group_end(self) -> None:
        assert self._open is not None, "no group is open"
        messages, self._open = self._open, None
        self._transport.send_recv(messages)

    def send(self, tensor: torch.Tensor, dst: int, stream: torch.Stream | None = None) -> None:
        assert self._open is not None, "outside of a group, sends of two ranks wait for each other"
        self._open.append(SendRecv(dst, tensor, is_send=True))

    def recv(self, tensor: torch.Tensor, src: int, stream: torch.Stream | None = None) -> None:
        assert self._open is not None, "outside of a group, receives of two ranks wait for each other"
        self._open.append(SendRecv(src, tensor, is_send=False))


MADE_OF_A_TRANSPORT: dict[str, Callable[[Transport], EplbCommunicator]] = {
    "torch_dist": TorchDistEplbCommunicator,
    "gloo_staged": lambda transport: GlooStagedEplbCommunicator(transport, STAGING),
    "hccl": lambda transport: HcclEplbCommunicator(transport, PIECE),
    "pynccl": lambda transport: PyNcclEplbCommunicator(GroupOverATransport(transport)),
}


def over_gloo(rank: Rank, kind: str) -> EplbCommunicator:
    return MADE_OF_A_TRANSPORT[kind](rank.groups(tp_size=1, dp_size=rank.num_ranks).ep)


def weights(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return random bytes on the default device. They are the same on every rank that gives the same seed."""
    size = torch.empty(shape, dtype=dtype, device="meta").nbytes
    return (
        torch.randint(256, (size,), generator=seeded(seed), device="cpu", dtype=torch.uint8)
        .view(dtype).view(shape).to(torch.get_default_device())
    )  # fmt: skip


def unfilled(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (
        torch.full((torch.empty(shape, dtype=dtype, device="meta").nbytes,), 0xFF, dtype=torch.uint8)
        .view(dtype)
        .view(shape)
    )


# --- promises: what runs on each rank ---


def nothing_to_do(c: EplbCommunicator) -> None:
    c.execute()
    if c.rank < 2:  # others have nothing, and do not wait
        x, y = weights((5,), torch.float32, c.rank), unfilled((5,), torch.float32)
        c.add_send(x, 1 - c.rank)
        c.add_recv(y, 1 - c.rank)
    c.execute()
    assert c.rank >= 2 or same_bits(y, weights((5,), torch.float32, 1 - c.rank))
    c.execute()


def to_itself(c: EplbCommunicator) -> None:
    sources = [weights((3, 4), dtype, 7 + i) for i, dtype in enumerate(DTYPES)]
    results = [unfilled((3, 4), dtype) for dtype in DTYPES]
    c.add_recv(results[:2], c.rank, 0)
    for source in sources:
        c.add_send(source, c.rank)
    c.add_recv(results[2:], c.rank, 1)
    c.execute()
    assert all(map(same_bits, results, sources))


def no_elements(c: EplbCommunicator) -> None:
    following, before = (c.rank + 1) % c.size, (c.rank - 1) % c.size
    filled = unfilled((2,), torch.float32)
    c.add_send([torch.empty(0), torch.empty(0, 7), weights((2,), torch.float32, c.rank)], following, 3)
    c.add_recv([torch.empty(0), torch.empty(0, 7), filled], before, 3)
    c.add_send(torch.empty(3, 0), following)
    c.add_recv(torch.empty(3, 0), before)
    c.execute()
    assert same_bits(filled, weights((2,), torch.float32, before))


def any_strides(c: EplbCommunicator) -> None:
    following, before = (c.rank + 1) % c.size, (c.rank - 1) % c.size

    def parts(seed: int) -> list[torch.Tensor]:
        whole = weights((6, 8), torch.float32, seed)
        return [whole[:, 1::2], whole[:4, :6].t(), whole[:1, :4].expand(3, 4), whole[5], whole[2, 3]]

    sent = parts(c.rank)
    room = unfilled((40, 40), torch.float32)
    results = [room[:6, 2:10:2], room[10:14, :6].t(), room[20:23, 4:8], room[30, :8], room[35, 5]]
    untouched = torch.ones(room.shape, dtype=torch.bool)
    for area in (
        untouched[:6, 2:10:2],
        untouched[10:14, :6],
        untouched[20:23, 4:8],
        untouched[30, :8],
        untouched[35, 5],
    ):
        area.fill_(value=False)
    c.add_send(sent, following)
    c.add_recv(results, before)
    c.execute()
    assert all(map(same_bits, results, parts(before)))
    assert all(map(same_bits, sent, parts(c.rank))), "what is sent was written"
    assert bool(room[untouched].isnan().all()), "written beside the receives"


def many_small_and_one_large(c: EplbCommunicator) -> None:
    generator = seeded(c.size)
    draw = torch.randint(0, 1 << 30, (250, 4), generator=generator, device="cpu").tolist()
    messages = [
        (a % c.size, b % c.size, (s % 60, 3), DTYPES[d % len(DTYPES)], i) for i, (a, b, s, d) in enumerate(draw)
    ]
    messages.insert(100, (0, 1, (1 << 20,), torch.bfloat16, 1000))
    messages += [(r, (r + 1) % c.size, (257, 131), torch.float32, 2000 + r) for r in range(c.size)]
    expected = []
    for source, destination, shape, dtype, seed in messages:
        if source == c.rank:
            c.add_send(weights(shape, dtype, seed), destination)
        if destination == c.rank:
            expected.append((unfilled(shape, dtype), seed))
            c.add_recv(expected[-1][0], source)
    c.execute()
    for filled, seed in expected:
        assert same_bits(filled, weights(tuple(filled.shape), filled.dtype, seed)), seed


def permuted_experts(c: EplbCommunicator) -> None:
    """Move all experts at once to new random slots, four times. An expert has three tensors."""
    slots, shapes = 3, (((4, 6), torch.bfloat16), ((6,), torch.float32), ((6, 2), torch.int8))
    num_experts = slots * c.size
    places = [list(range(num_experts))]
    for seed in range(4):
        places.append(torch.randperm(num_experts, generator=seeded(seed), device="cpu").tolist())

    def expert(e: int) -> list[torch.Tensor]:
        return [weights(shape, dtype, 10 * e + i) for i, (shape, dtype) in enumerate(shapes)]

    held = [expert(e) for e in places[0][c.rank * slots : (c.rank + 1) * slots]]
    for old, new in pairwise(places):
        received = [[unfilled(shape, dtype) for shape, dtype in shapes] for _ in range(slots)]
        for position, e in enumerate(new):  # one order on all ranks
            destination, source = position // slots, old.index(e) // slots
            if source == c.rank:
                c.add_send(held[old.index(e) % slots], destination, e)
            if destination == c.rank:
                c.add_recv(received[position % slots], source, e)
        c.execute()
        held = received
        for slot, e in enumerate(new[c.rank * slots : (c.rank + 1) * slots]):
            assert all(map(same_bits, held[slot], expert(e))), (slot, e)


def usable_after_errors(c: EplbCommunicator) -> None:
    x = torch.ones(6)
    for peer in (-1, c.size):
        with pytest.raises(
            InvalidInputError, match=rf"rank {c.rank} sends to rank {peer}, expert 4; it must be one of"
        ):
            c.add_send(x, peer, 4)
        with pytest.raises(InvalidInputError, match=rf"rank {c.rank} receives from rank {peer}; it must be one of"):
            c.add_recv(x, peer)
    c.execute()  # nothing of that was queued
    other = (c.rank + 1) % c.size
    for faults, text in (
        ([(c.add_send, x, c.rank)], rf"rank {c.rank} sends itself 1 tensors and receives 0 from itself"),
        ([(c.add_send, x, c.rank), (c.add_recv, x[:3], c.rank)], "sends itself torch.float32 \\(6,\\) to rank"),
        ([(c.add_send, x, other), (c.add_recv, x[2:4], other)], "may not write memory that it also sends"),
        ([(c.add_recv, x[2:4], other), (c.add_recv, x, other)], "or write it twice"),
    ):
        for add, tensor, peer in faults:
            add(tensor, peer)
        with pytest.raises(InvalidInputError, match=text):
            c.execute()
        assert x.tolist() == [1] * 6
    c.add_send(x, other)  # a fault of the caller's between add and execute
    c.clear()
    nothing_to_do(c)
    c.add_send([x[:3], x[:4]], other)  # sent twice over is no fault
    filled = [torch.zeros(3), torch.zeros(4)]
    c.add_recv(filled, (c.rank - 1) % c.size)
    c.prepare()
    # Each of these calls would lose what is prepared.
    for call in (c.prepare, lambda: c.add_send(x, other), lambda: c.add_recv(x, other)):
        with pytest.raises(InvalidInputError, match=f"on rank {c.rank} while .* have not moved; call execute"):
            call()
    c.execute()
    assert [each.tolist() for each in filled] == [[1] * 3, [1] * 4]


PROMISES: dict[str, Callable[[EplbCommunicator], None]] = {
    function.__name__: function
    for function in (
        nothing_to_do,
        to_itself,
        no_elements,
        any_strides,
        many_small_and_one_large,
        permuted_experts,
        usable_after_errors,
    )
}


def two_in_flight(first: EplbCommunicator, second: EplbCommunicator) -> None:
    """Filled alternately, executed in one order."""
    filled = []
    for seed in range(5):
        for number, c in enumerate((first, second)):
            for peer in range(c.size):
                c.add_send(weights((seed + 1,), torch.float32, 100 * c.rank + 10 * seed + number), peer)
                filled.append((unfilled((seed + 1,), torch.float32), 100 * peer + 10 * seed + number))
                c.add_recv(filled[-1][0], peer)
    second.execute()
    first.execute()
    for tensor, seed in filled:
        assert same_bits(tensor, weights(tuple(tensor.shape), torch.float32, seed))


def keeps(rank: Rank, make: Callable[[Rank, str], EplbCommunicator], kind: str, names: list[str]) -> None:
    with rank.device:
        for name in names:
            PROMISES[name](make(rank, kind))
        two_in_flight(make(rank, kind), make(rank, kind))


@pytest.mark.parametrize("kind", MADE_OF_A_TRANSPORT)
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_contract(pools, kind, num_ranks):
    pools("gloo", num_ranks).run(keeps, over_gloo, kind, list(PROMISES))


# --- memory, orders, faults of other ranks ---


class Allocations(TorchDispatchMode):
    """Counts the bytes of CPU memory that are allocated inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {each.untyped_storage().data_ptr() for each in _tensors(args)}
        result = func(*args, **(kwargs or {}))
        for each in _tensors([result]):
            if each.device.type == "cpu" and each.untyped_storage().data_ptr() not in known:
                self.total += each.untyped_storage().nbytes()
        return result


def _tensors(values) -> Iterator[torch.Tensor]:
    for each in values:
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, list | tuple):
            yield from _tensors(each)


def allocated(rank: Rank, staging: int) -> int:
    """Return the bytes that one execute allocates when each rank exchanges 8 MiB with each other rank."""
    c = GlooStagedEplbCommunicator(rank.groups(tp_size=1, dp_size=rank.num_ranks).ep, staging)
    sent = [torch.full((8, 1 << 20), peer, dtype=torch.uint8) for peer in range(c.size)]
    received = [torch.zeros(8, 1 << 20, dtype=torch.uint8) for _ in range(c.size)]
    for peer in range(c.size):
        if peer != c.rank:
            c.add_send(list(sent[peer]), peer)
            c.add_recv(list(received[peer]), peer)
    with Allocations() as allocations:
        c.execute()
    assert all(bool((received[peer] == c.rank).all()) for peer in range(c.size) if peer != c.rank)
    return allocations.total


def test_staging_memory_is_bounded_whatever_is_queued(pools):
    assert pools("gloo", 3).run(allocated, 1 << 20) == [1 << 20] * 3
    assert pools("gloo", 3).run(allocated, 1 << 30) == [2 * (16 << 20)] * 3  # both directions whole, no more


def opposite_orders(rank: Rank) -> None:
    groups = [dist.new_group(backend="gloo") for _ in range(2)]
    communicators = [GlooStagedEplbCommunicator(GlooTransport(group, "eplb"), STAGING) for group in groups]
    filled = []
    for number, c in enumerate(communicators):
        for peer in range(c.size):
            c.add_send(torch.full((50_000,), 10 * c.rank + number), peer)
            filled.append((torch.zeros(50_000, dtype=torch.int64), 10 * peer + number))
            c.add_recv(filled[-1][0], peer)
    threads = [threading.Thread(target=c.execute) for c in (communicators if rank.rank % 2 else communicators[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(bool((tensor == value).all()) for tensor, value in filled)
    for group in groups:
        dist.destroy_process_group(group)


def test_over_groups_of_their_own_two_may_run_in_any_order(pools):
    pools("gloo", 3).run(opposite_orders)


def one_sends_less(rank: Rank, kind: str) -> None:
    c = over_gloo(rank, kind)
    other = 1 - rank.rank
    c.add_send(torch.ones(4 + rank.rank), other)
    c.add_recv(torch.ones(4), other)
    c.execute()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["torch_dist", "gloo_staged"])
def test_bytes_that_do_not_match_are_an_error_in_time(kind):
    with ProcessRankPool(2, timeout=5, start_method="forkserver") as pool:
        outcomes = pool.outcomes(one_sends_less, kind)
    assert any(isinstance(each, TransportError) and "on group 'ep' failed on rank" in str(each) for each in outcomes)


class FailsOnce(GroupOverATransport):
    """Fails once inside a group, as NCCL does where it refuses a message."""

    failed = False

    def send(self, tensor: torch.Tensor, dst: int, stream: torch.Stream | None = None) -> None:
        if not self.failed:
            self.failed = True
            raise RuntimeError("NCCL error: invalid usage")
        super().send(tensor, dst, stream)


def fails_within_the_group(rank: Rank) -> None:
    c = PyNcclEplbCommunicator(FailsOnce(rank.groups(tp_size=1, dp_size=rank.num_ranks).ep))
    c.add_send(torch.ones(3), 1 - c.rank)
    with pytest.raises(
        TransportError, match=rf"execute on group 'ep' failed on rank {c.rank}: NCCL error: invalid usage"
    ):
        c.execute()
    nothing_to_do(c)


def test_a_failure_within_ncclgroup_closes_the_group(pools):
    pools("gloo", 2).run(fails_within_the_group)


# --- the factory ---


def opened(rank: Rank, device_type: str, name: str | None, arguments: list[str]) -> str:
    transport = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    groups = {each: GroupOverATransport(transport) if each == "pynccl" else transport for each in arguments}
    return type(open_communicator(device_type, name, **groups, unused=None)).__name__


@pytest.mark.parametrize(
    ("device_type", "arguments", "chosen", "reason"),
    [
        ("cpu", ["device_group", "cpu_group"], "TorchDistEplbCommunicator", "go over gloo as they are"),
        ("cuda", ["device_group", "cpu_group", "pynccl"], "GlooStagedEplbCommunicator", "can deadlock"),
        ("cuda", ["pynccl"], "PyNcclEplbCommunicator", "an elastic group"),
        ("npu", ["device_group", "cpu_group"], "HcclEplbCommunicator", "bounded pieces"),
        ("npu", ["cpu_group"], "GlooStagedEplbCommunicator", "the group has no HCCL"),
    ],
)
def test_the_device_chooses_and_the_log_says_why(pools, caplog, device_type, arguments, chosen, reason):
    caplog.set_level("INFO", logger="vllm.npu.eplb")
    assert pools("threaded", 1).run(opened, device_type, None, arguments) == [chosen]
    assert "EPLB communicator of rank 0 of 1: " in caplog.text
    assert reason in caplog.text


@pytest.mark.parametrize(
    ("device_type", "name", "arguments", "text"),
    [
        (
            "npu",
            None,
            [],
            "no EPLB communicator moves weights on npu with no group; give one of cpu_group, device_group",
        ),
        ("tpu", None, ["device_group"], "moves weights on tpu with device_group; supported: cpu, cuda, npu"),
        ("cpu", "nixl", [], "unknown EPLB communicator 'nixl'; there are: torch_dist, gloo_staged"),
        ("cpu", "pynccl", ["pynccl"], "pynccl moves weights on cuda, not on cpu"),
        ("cuda", "pynccl", ["cpu_group"], "pynccl needs pynccl, which does not exist"),
    ],
)
def test_what_cannot_be_had_is_refused_with_what_can(pools, device_type, name, arguments, text):
    with pytest.raises(UnsupportedConfigError) as error:
        pools("threaded", 1).run(opened, device_type, name, arguments)
    assert text in str(error.value)


def test_every_choice_can_move_its_devices_weights():
    for device_type, choices in CHOICE.items():
        assert all(device_type in COMMUNICATORS[name].device_types for name in choices)
