"""PyHCCL and the EPLB communicators on NPU tensors: ranks of their own, real torch_npu, emulated HCCL."""

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.cases import same_bits
from tests.ranks.test_eplb_contract import PIECE, PROMISES, STAGING, keeps, two_in_flight, weights
from tests.ranks.test_eplb_movement import moves
from tests.ranks.test_transport_contract import CONTRACT, is_refused
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.emulator import launcher
from vllm_npu.eplb.communicator import EplbCommunicator
from vllm_npu.eplb.gloo_staged import GlooStagedEplbCommunicator
from vllm_npu.eplb.hccl import HcclEplbCommunicator
from vllm_npu.eplb.torch_dist import TorchDistEplbCommunicator
from vllm_npu.errors import InvalidInputError, TransportError
from vllm_npu.tools.launch import ProcessRankPool, Rank
from vllm_npu.transport.base import Groups
from vllm_npu.transport.gloo import GlooTransport
from vllm_npu.transport.hccl_direct import library
from vllm_npu.transport.hccl_direct.communicator import PyHcclTransport

pytestmark = pytest.mark.emulated

# Chip, ranks, environment: V collectives and exchanges, random delays of the device, torch_npu's task queue.
WAYS = {
    "A3-4": ("A3", 4, {"VLLM_NPU_EMULATOR_ASYNC": "5"}),
    "A2-2": ("A2", 2, {"VLLM_NPU_EMULATOR_ASYNC": "6", "TASK_QUEUE_ENABLE": "1"}),
}


@pytest.fixture(scope="module", params=WAYS)
def pool(request, warm) -> Iterator[ProcessRankPool]:
    family, num_ranks, env = WAYS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"VLLM_NPU_EMULATOR_SOC": family, **env}.items():
            patch.setenv(name, value)
        with (
            launcher.emulated_devices(num_ranks),
            ProcessRankPool(num_ranks, transport="hccl", start_method=warm) as opened,
        ):
            yield opened


# --- in the ranks ---

OPENED: dict[Any, Any] = {}  # groups of a rank's process


class PyHcclRank:
    """A rank whose groups are PyHCCL's, each bootstrapped by the process group of the same ranks."""

    def __init__(self, rank: Rank) -> None:
        self.rank, self.num_ranks, self.device = rank.rank, rank.num_ranks, rank.device
        self._rank = rank

    def groups(self, *, tp_size: int, dp_size: int) -> Groups:
        topology = ParallelTopology.of_rank(self.rank, tp_size=tp_size, dp_size=dp_size)
        if topology not in OPENED:
            groups = self._rank.groups(tp_size=tp_size, dp_size=dp_size)
            with self.device:
                made = [PyHcclTransport(each.process_group, each.group) for each in (groups.tp, groups.dp, groups.ep)]
            OPENED[topology] = Groups(topology, *made)
        return OPENED[topology]


def on_pyhccl(rank: Rank, function: Callable[..., Any], *arguments: Any) -> Any:
    with rank.device:
        return function(PyHcclRank(rank), *arguments)


def cpu_group() -> dist.ProcessGroup:
    if "cpu" not in OPENED:
        OPENED["cpu"] = dist.new_group(backend="gloo")
    return OPENED["cpu"]


def communicator(rank: Rank, kind: str) -> EplbCommunicator:
    own = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    if kind == "pyhccl":
        return HcclEplbCommunicator(PyHcclRank(rank).groups(tp_size=1, dp_size=rank.num_ranks).ep, PIECE)
    if kind == "gloo_staged":
        return GlooStagedEplbCommunicator(GlooTransport(cpu_group(), "ep"), STAGING)
    return HcclEplbCommunicator(own, PIECE) if kind == "hccl" else TorchDistEplbCommunicator(own)


def on_a_stream(rank: Rank, kind: str) -> None:
    """What is queued waits for the stream's own work, and the caller's stream is current again afterwards."""
    with rank.device:
        stream, current = torch.npu.Stream(), torch.accelerator.current_stream()
        c = communicator(rank, kind)
        c.set_stream(stream)
        sent, filled = torch.zeros(40_000), torch.zeros(40_000)
        torch.npu.synchronize()
        with torch.npu.stream(stream):
            for _ in range(20):
                sent += 1
        c.add_send(sent, (c.rank + 1) % c.size)
        c.add_recv(filled, (c.rank - 1) % c.size)
        c.execute()
        assert torch.accelerator.current_stream() == current
        with torch.npu.stream(stream):
            filled += 1
        stream.synchronize()
        assert bool((filled == 21).all())
        c.set_stream(None)
        two_in_flight(c, communicator(rank, kind))


def single_messages(rank: PyHcclRank) -> bool:
    t = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    following, before = (t.rank + 1) % t.size, (t.rank - 1) % t.size
    for dtype in (torch.bfloat16, torch.int64, torch.bool):
        filled = torch.zeros(5, 3, dtype=dtype)
        message = weights((3, 5), torch.uint8, t.rank).bool().to(dtype).t()
        wanted = weights((3, 5), torch.uint8, before).bool().to(dtype).t()
        steps = [lambda m=message: t.send(m, following), lambda f=filled: t.recv(f, before)]
        for step in steps if t.rank % 2 else steps[::-1]:
            step()
        assert same_bits(filled, wanted.contiguous())
    t.check()
    t.barrier()
    for call, peer in ((t.send, t.rank), (t.recv, t.size), (t.send, -1)):
        with pytest.raises(InvalidInputError, match=rf"peer {peer} of rank {t.rank} is not another rank"):
            call(torch.zeros(1), peer)
    with pytest.raises(InvalidInputError, match="a receive needs a contiguous tensor"):
        t.recv(torch.zeros(3, 2).t(), following)
    with pytest.raises(InvalidInputError, match=r"HCCL adds int8, .*, not torch.bool"):
        t.all_reduce(torch.zeros(2, dtype=torch.bool))
    return t._has_v


def stateless(rank: Rank, store: str) -> list[int]:
    """As vLLM's elastic groups: no torch.distributed at all."""
    distributed_utils = pytest.importorskip("vllm.distributed.utils", reason="needs vLLM: StatelessProcessGroup")
    group = distributed_utils.StatelessProcessGroup(
        rank=rank.rank, world_size=rank.num_ranks, store=dist.FileStore(store, rank.num_ranks)
    )
    t = PyHcclTransport(group)
    with rank.device:
        total = t.all_reduce(torch.tensor([rank.rank + 1])).tolist()
        t.close()
        t.close()
        with pytest.raises(
            TransportError, match=r"all_reduce on group 'pyhccl' failed on rank \d: .*closed; open another"
        ):
            t.all_reduce(torch.ones(1))
    return total


def a_rank_stays_away(rank: Rank) -> None:
    def add_up(t: PyHcclTransport) -> None:
        t.all_reduce(torch.ones(2))
        torch.npu.synchronize()  # where the device is late

    os.environ["HCCL_EXEC_TIMEOUT"] = "2"  # read when a communicator opens
    with rank.device:
        opened = PyHcclTransport(cpu_group(), "lost")
        if rank.rank == 1:
            time.sleep(4)
        else:
            with pytest.raises(RuntimeError, match=r"rank 1 did not .* within 2 s"):
                add_up(opened)
        opened.check()


def a_call_fails(rank: Rank) -> None:
    library.load().call("HcclCommDestroy", ctypes.c_void_p(64), operation="close", group="lost", rank=rank.rank)


def moves_experts(rank: Rank, kind: str) -> None:
    moves(rank, communicator(rank, kind), GlooTransport(cpu_group(), "voters"))


# --- tests ---


@pytest.mark.parametrize("promise", CONTRACT)
def test_the_transports_contract(pool, promise):
    grid = (2, pool.num_ranks // 2)
    pool.run(on_pyhccl, CONTRACT[promise], grid)


def test_bad_arguments_single_messages_and_which_chip_has_v_collectives(pool):
    assert pool.run(on_pyhccl, single_messages) == [pool.num_ranks == 4] * pool.num_ranks
    for name in ("all_gather, rows", "reduce_scatter, sum", "all_to_all, self", "exchange_tokens, sum"):
        pool.run(on_pyhccl, is_refused, (pool.num_ranks, 1), name)


@pytest.mark.parametrize("kind", ["pyhccl", "hccl", "gloo_staged", "torch_dist"])
def test_eplb_contract(pool, kind):
    pool.run(keeps, communicator, kind, list(PROMISES))
    pool.run(on_a_stream, kind)
    pool.run(moves_experts, kind)


@pytest.mark.parametrize("pool", ["A2-2"], indirect=True)
def test_a_group_without_torch_distributed(pool, tmp_path):
    size = pool.num_ranks
    assert pool.run(stateless, str(tmp_path / "store")) == [[size * (size + 1) // 2]] * size


@pytest.mark.parametrize("pool", ["A2-2"], indirect=True)
def test_what_hccl_returns_and_what_it_finds_later_come_with_a_remedy(pool):
    for rank, error in enumerate(pool.outcomes(a_call_fails)):
        assert isinstance(error, TransportError)
        assert str(error).startswith(
            f"close on group 'lost' failed on rank {rank}: HcclCommDestroy returned 1 (parameter"
        )
        assert "); compare what each rank passed: counts and types must match between them. HCCL says: 0x40" in str(
            error
        )
    for rank, error in enumerate(pool.outcomes(a_rank_stays_away)):
        assert isinstance(error, TransportError)
        assert str(error).startswith(
            f"check on group 'lost' failed on rank {rank}: HCCL has error 9 (time-out); look for the"
        )
