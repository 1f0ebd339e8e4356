"""torch.distributed on the real ProcessGroupHCCL, over the emulated HCCL."""

import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.emulated

LARGE = 1_000_003  # elements: several pieces of the shared memory, and no multiple of anything
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64)
REDUCTIONS = (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.PRODUCT)


def npu(values, dtype=torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype).npu()


def nan(*shape: int) -> torch.Tensor:
    return torch.full(shape, float("nan")).npu()


# --- What runs in the ranks; `rank` of `size` ---


def reductions(rank: int, size: int) -> None:
    x = npu([rank + 1.0] * 5)
    dist.all_reduce(x)
    assert x.tolist() == [size * (size + 1) / 2] * 5
    x = torch.full((LARGE,), rank + 1, dtype=torch.bfloat16).npu()
    dist.all_reduce(x)
    assert (x.cpu() == size * (size + 1) / 2).all()
    x = npu([rank, -rank], torch.int64)
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    assert x.tolist() == [size - 1, 0]
    x = npu([float(rank)] * 4)
    dist.all_reduce(x, op=dist.ReduceOp.AVG)
    assert x.tolist() == [(size - 1) / 2] * 4
    x = npu([-7, 7 + rank], torch.int32)
    dist.all_reduce(x, op=dist.ReduceOp.AVG)
    assert x.tolist() == [-7, 7 + (size - 1) // 2]  # truncated
    x = npu([rank + 1.0, 2.0])
    dist.reduce(x, dst=size - 1)
    if rank == size - 1:
        assert x.tolist() == [size * (size + 1) / 2, 2.0 * size]


def every_type_and_reduction(rank: int, size: int) -> None:
    by_rank = [torch.tensor([each + 1, 3 - each, 2]) for each in range(size)]
    stacked = torch.stack(by_rank)
    wanted = {
        dist.ReduceOp.SUM: stacked.sum(0),
        dist.ReduceOp.MAX: stacked.amax(0),
        dist.ReduceOp.MIN: stacked.amin(0),
        dist.ReduceOp.PRODUCT: stacked.prod(0),
    }
    for dtype in DTYPES:
        for reduction in REDUCTIONS:
            x = by_rank[rank].to(dtype).npu()
            dist.all_reduce(x, op=reduction)
            assert torch.equal(x.cpu(), wanted[reduction].to(dtype)), (dtype, reduction, x)


def sixteen_bit_rounding(rank: int, size: int) -> None:
    every_pattern = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        patterns = every_pattern.view(dtype)
        x = patterns.npu()
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
        assert torch.equal(x.cpu().nan_to_num(7.0), patterns.nan_to_num(7.0))
        scale = 2.0 ** torch.arange(-30, 20).repeat_interleave(100)
        by_rank = [
            (torch.randn(5000, generator=torch.Generator().manual_seed(each)) * scale).to(dtype) for each in (0, 1)
        ]
        x = by_rank[rank].npu()
        dist.all_reduce(x)
        wanted = (by_rank[0].float() + by_rank[1].float()).to(dtype)
        assert torch.equal(x.cpu().nan_to_num(7.0), wanted.nan_to_num(7.0))


def gathers(rank: int, size: int) -> None:
    out = torch.empty(size * 2, dtype=torch.int32).npu()
    dist.all_gather_into_tensor(out, npu([rank, 10 * rank], torch.int32))
    assert out.tolist() == [value for each in range(size) for value in (each, 10 * each)]
    uneven = [nan(each + 1) for each in range(size)]
    dist.all_gather(uneven, npu([float(rank)] * (rank + 1)))
    assert [x.tolist() for x in uneven] == [[float(each)] * (each + 1) for each in range(size)]
    objects: list[object] = [None] * size
    dist.all_gather_object(objects, {"rank": rank, "text": "x" * 1000 * rank})
    assert objects == [{"rank": each, "text": "x" * 1000 * each} for each in range(size)]
    large = torch.empty(size * LARGE, dtype=torch.int32).npu()
    mine = (torch.arange(LARGE, dtype=torch.int32) + rank).npu()
    dist.all_gather_into_tensor(large, mine)
    for each in range(size):
        assert torch.equal(
            large.cpu()[each * LARGE : (each + 1) * LARGE], torch.arange(LARGE, dtype=torch.int32) + each
        )


def even_all_gather(rank: int, size: int) -> None:
    out = [nan(2) for _ in range(size)]
    dist.all_gather(out, npu([float(rank)] * 2))
    assert [x.tolist() for x in out] == [[float(each)] * 2 for each in range(size)]


def scatters(rank: int, size: int) -> None:
    out = nan(3)
    dist.reduce_scatter_tensor(out, (torch.arange(3.0 * size) + rank).npu())
    wanted = torch.arange(3.0 * size)[3 * rank : 3 * rank + 3] * size + size * (size - 1) / 2
    assert torch.equal(out.cpu(), wanted)
    out = nan(LARGE)
    dist.reduce_scatter_tensor(out, torch.full((size * LARGE,), 1.0 + rank).npu())
    assert (out.cpu() == size * (size + 1) / 2).all()
    out = nan(rank + 1)
    dist.reduce_scatter(out, [torch.full((each + 1,), 1.0 + rank).npu() for each in range(size)])
    assert out.tolist() == [size * (size + 1) / 2] * (rank + 1)
    out = nan(2)
    dist.scatter(out, [torch.full((2,), float(each)).npu() for each in range(size)] if rank == 0 else None, src=0)
    assert out.tolist() == [float(rank)] * 2
    x = npu([float(rank)] * 4)
    dist.broadcast(x, src=size - 1)
    assert x.tolist() == [size - 1.0] * 4


def all_to_alls(rank: int, size: int) -> None:
    sent = [(rank + peer) % 3 for peer in range(size)]
    received = [(peer + rank) % 3 for peer in range(size)]
    parts = [torch.full((count, 2), 100.0 * rank + peer) for peer, count in enumerate(sent)]
    out = nan(sum(received), 2)
    dist.all_to_all_single(out, torch.cat(parts).npu(), received, sent)
    wanted = torch.cat([torch.full((count, 2), 100.0 * peer + rank) for peer, count in enumerate(received)])
    assert torch.equal(out.cpu(), wanted)
    out = nan(size)
    dist.all_to_all_single(out, (torch.arange(float(size)) + 10 * rank).npu())
    assert out.tolist() == [10.0 * peer + rank for peer in range(size)]
    outs = [nan(rank + 1) for _ in range(size)]
    dist.all_to_all(outs, [torch.full((peer + 1,), float(rank)).npu() for peer in range(size)])
    assert [x.tolist() for x in outs] == [[float(peer)] * (rank + 1) for peer in range(size)]


def messages(rank: int, size: int) -> None:
    if rank == 0:
        dist.send(torch.arange(8.0).npu(), dst=1)
    if rank == 1:
        out = nan(8)
        dist.recv(out, src=0)
        assert out.tolist() == list(range(8))
    mine, out = torch.full((200_000,), float(rank)).npu(), nan(200_000)
    right, left = (rank + 1) % size, (rank - 1) % size
    works = dist.batch_isend_irecv([dist.P2POp(dist.isend, mine, right), dist.P2POp(dist.irecv, out, left)])
    for work in works:
        work.wait()
    assert (out.cpu() == left).all()
    dist.barrier()


def groups_and_async_work(rank: int, size: int) -> None:
    ends = dist.new_group([0, size - 1])
    if rank in (0, size - 1):
        x = npu([1.0])
        dist.all_reduce(x, group=ends)
        assert x.item() == 2
    works, tensors = [], []
    for step in range(5):
        tensors.append(npu([float(rank + step)] * 3))
        works.append(dist.all_reduce(tensors[-1], async_op=True))
    for step, (work, x) in enumerate(zip(works, tensors, strict=True)):
        work.wait()
        assert x.tolist() == [size * (size - 1) / 2 + step * size] * 3
        assert work.is_completed()
    assert type(dist.group.WORLD._get_backend(torch.device("npu"))).__name__ == "ProcessGroupHCCL"


def everything(rank: int, size: int) -> None:
    for check in (reductions, gathers, scatters, all_to_alls, messages, groups_and_async_work):
        check(rank, size)


# --- The tests ---


@pytest.mark.parametrize("size", [2, 4])
def test_every_collective(run_in_ranks, size):
    run_in_ranks(everything, size)


@pytest.mark.parametrize("queue", ["1", "2"])
def test_with_torch_npus_own_task_queue(run_in_ranks, queue):
    run_in_ranks(everything, 2, env={"TASK_QUEUE_ENABLE": queue})


def test_every_type_and_reduction(run_in_ranks):
    run_in_ranks(every_type_and_reduction, 3)


def test_sixteen_bit_floats_are_rounded_once_to_nearest_even(run_in_ranks):
    run_in_ranks(sixteen_bit_rounding, 2)


def test_even_all_gather(run_in_ranks):
    run_in_ranks(even_all_gather, 2)  # pads by an aclnn operator, past the dispatcher


@pytest.mark.parametrize("seed", ["1", "2"])
def test_every_collective_on_asynchronous_streams(run_in_ranks, seed):
    run_in_ranks(everything, 2, env={"VLLM_NPU_EMULATOR_ASYNC": seed})


WITHOUT_TORCH = """
import ctypes, os, sys, time
rank, size, path = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), sys.argv[0] + ".root"
hccl = ctypes.CDLL(os.path.join(os.environ["VLLM_NPU_EMULATOR_LIBRARIES"], "libhccl.so"))
acl = ctypes.CDLL(os.path.join(os.environ["VLLM_NPU_EMULATOR_LIBRARIES"], "libascendcl.so"))
assert acl.aclrtSetDevice(rank) == 0
root = ctypes.create_string_buffer(4108)
if rank == 0:
    assert hccl.HcclGetRootInfo(root) == 0
    open(path + "~", "wb").write(root.raw)
    os.rename(path + "~", path)
while not os.path.exists(path):
    time.sleep(0.01)
root.raw = open(path, "rb").read()
group, stream = ctypes.c_void_p(), ctypes.c_void_p()
assert hccl.HcclCommInitRootInfo(size, root, rank, ctypes.byref(group)) == 0
assert acl.aclrtCreateStream(ctypes.byref(stream)) == 0
FLOAT, SUM, count = 4, 0, 100_000
for step in range(5):
    x = (ctypes.c_float * count)(*[rank + step] * count)
    assert hccl.HcclAllReduce(x, x, ctypes.c_uint64(count), FLOAT, SUM, group, stream) == 0
    assert acl.aclrtSynchronizeStream(stream) == 0
    assert set(x) == {size * (size - 1) / 2 + size * step}
assert hccl.HcclBarrier(group, stream) == 0 and hccl.HcclCommDestroy(group) == 0
"""


def test_sixteen_ranks(launch_script):
    outcome = launch_script(WITHOUT_TORCH, 16)
    assert outcome.code == 0, outcome.output
