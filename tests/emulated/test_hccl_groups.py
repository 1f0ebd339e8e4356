"""Groups of HCCL's calls (HcclGroupStart, HcclGroupEnd), and one process with several devices (HcclCommInitAll)."""

import ctypes
import itertools
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from torch_npu._C._distributed_c10d import ProcessGroupHCCL

pytestmark = pytest.mark.emulated

needs_groups = pytest.mark.skipif(
    not hasattr(ProcessGroupHCCL, "_group_start"), reason="needs torch_npu 2.13, whose process groups have _group_start"
)
LARGE = 300_001  # elements: more than the channel between two ranks holds


def group_of_all() -> object:
    return dist.group.WORLD._get_backend(torch.device("npu"))  # type: ignore[union-attr]


# --- What runs in the ranks ---


def connect_pairs(rank: int, size: int) -> None:
    """torch_npu ends a group where it makes a communicator, and each pair of ranks has one of its own."""
    x = torch.zeros(1, device="npu")
    dist.all_reduce(x)
    for first, second in itertools.combinations(range(size), 2):
        if rank == first:
            dist.send(x, second)
        elif rank == second:
            dist.recv(x, first)


def exchange_in_groups(rank: int, size: int) -> None:
    backend = group_of_all()
    connect_pairs(rank, size)
    # Everyone sends before it receives, two messages to each other rank.
    others = [other for other in range(size) if other != rank]
    sent = {other: [torch.full((LARGE,), 10.0 * rank + i, device="npu") for i in range(2)] for other in others}
    received = {other: [torch.full((LARGE,), torch.nan, device="npu") for _ in range(2)] for other in others}
    backend._group_start()
    works = [dist.isend(x, other) for other in others for x in sent[other]]
    works += [dist.irecv(x, other) for other in others for x in received[other]]
    backend._group_end()
    for work in works:
        work.wait()
    for other in others:
        for i in range(2):
            assert (received[other][i].cpu() == 10 * other + i).all(), (rank, other, i)
    # Collectives, in a group inside a group.
    x, y = torch.full((LARGE,), rank + 1.0, device="npu"), torch.full((3,), float(rank), device="npu")
    backend._group_start()
    backend._group_start()
    works = [dist.all_reduce(x, async_op=True)]
    backend._group_end()
    works.append(dist.broadcast(y, size - 1, async_op=True))
    backend._group_end()
    for work in works:
        work.wait()
    assert (x.cpu() == size * (size + 1) / 2).all()
    assert y.tolist() == [size - 1.0] * 3


def calls_wait_for_the_end_of_the_group(rank: int, size: int) -> None:
    """What is sent is read at the end of the group, as on a device."""
    backend = group_of_all()
    x = torch.zeros(5, device="npu")
    dist.all_reduce(x)  # so that the communicator exists
    backend._group_start()
    work = dist.all_reduce(x, async_op=True)
    x += rank + 1
    backend._group_end()
    work.wait()
    assert x.tolist() == [size * (size + 1) / 2] * 5


def mix_in_a_group(rank: int, size: int) -> str:
    backend = group_of_all()
    x = torch.zeros(5, device="npu")
    connect_pairs(rank, size)
    backend._group_start()
    dist.all_reduce(x, async_op=True)
    with pytest.raises(RuntimeError) as raised:
        dist.isend(x, 1 - rank) if rank == 0 else dist.irecv(x, 1 - rank)
    backend._group_end()
    return str(raised.value)


# --- Tests ---


@needs_groups
@pytest.mark.parametrize("queue", ["0", "1"])
def test_messages_and_collectives_in_groups(run_in_ranks, queue):
    run_in_ranks(exchange_in_groups, 3, env={"TASK_QUEUE_ENABLE": queue})


@needs_groups
def test_calls_wait_for_the_end_of_the_group(run_in_ranks):
    run_in_ranks(calls_wait_for_the_end_of_the_group, 2)


@needs_groups
def test_a_group_of_messages_and_collectives_is_refused(run_in_ranks):
    for text in run_in_ranks(mix_in_a_group, 2).returned:
        assert "HCCL's group has messages or collectives, not both" in text


def test_an_end_without_a_start_is_refused():
    hccl = ctypes.CDLL("libhcomm.so")
    acl = ctypes.CDLL("libascendcl.so")
    acl.aclGetRecentErrMsg.restype = ctypes.c_char_p
    assert hccl.HcclGroupEnd() != 0
    assert b"HcclGroupEnd: this thread has called no HcclGroupStart before" in acl.aclGetRecentErrMsg()


def train_on_all_devices(rank: int, num_ranks: int) -> None:
    """nn.DataParallel: one process, a replica of the module on each device, gradients added on the first one."""
    module = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.GELU(), torch.nn.Linear(5, 3)).double()
    given = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    wanted = module(given)
    wanted.square().sum().backward()
    copies = deepcopy(module).float().to("npu:0")
    copies.zero_grad()
    parallel = torch.nn.DataParallel(copies, device_ids=[0, 1, 2])
    for _ in range(2):  # the second time, the communicators are there
        copies.zero_grad()
        out = parallel(given.detach().float().to("npu:0"))
        out.square().sum().backward()
        torch.testing.assert_close(out.detach().cpu().double(), wanted.detach(), rtol=1e-5, atol=1e-5)
        for made, expected in zip(copies.parameters(), module.parameters(), strict=True):
            assert made.grad is not None
            torch.testing.assert_close(made.grad.cpu().double(), expected.grad, rtol=1e-5, atol=1e-5)


def broadcast_to_devices(rank: int, num_ranks: int) -> None:
    x = torch.arange(LARGE, dtype=torch.float32)
    copies = torch.nn.parallel.comm.broadcast(x.to("npu:0"), devices=[0, 1, 2, 3])
    assert [copy.device.index for copy in copies] == [0, 1, 2, 3]
    assert all(torch.equal(copy.cpu(), x) for copy in copies)


@pytest.mark.parametrize("seed", ["", "3"])
def test_one_process_with_several_devices(run_in_ranks, seed):
    run_in_ranks(broadcast_to_devices, 1, env={"VLLM_NPU_EMULATOR_ASYNC": seed} if seed else {})
    run_in_ranks(train_on_all_devices, 1, env={"VLLM_NPU_EMULATOR_ASYNC": seed} if seed else {})
