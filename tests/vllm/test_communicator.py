"""vLLM's groups on CPUs use our communicator, which has the uneven gather and scatter that vLLM's own class lacks."""

import pytest
import torch
import torch.distributed as dist

from tests.vllm.vllm_ranks import (
    TP4,
    Grid,
    VllmRanks,
    integers,
    ranks,  # noqa: F401 - fixture
)
from vllm_npu.tools.engines.process_tree import SHARED_MEMORY_FOLDER

pytest.importorskip("vllm")

SIZES = [3, 0, 1, 4]
SAME_NAME = "tp:77"


def rows_of(rank: int, rows: int) -> torch.Tensor:
    return integers(rank, rows, 4)


def gather_and_scatter(grid: Grid) -> str:
    """Call the group's three methods on this rank. Returns the name of the communicator's class."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    whole = torch.cat([rows_of(rank, size) for rank, size in enumerate(SIZES)])
    own = rows_of(grid.rank, SIZES[grid.rank])
    torch.testing.assert_close(group.all_gatherv(own, dim=0, sizes=SIZES), whole, rtol=0, atol=0)
    both = group.all_gatherv([own, own.to(torch.bfloat16)], dim=0, sizes=SIZES)
    torch.testing.assert_close(both, [whole, whole.to(torch.bfloat16)], rtol=0, atol=0)

    summands = [rows_of(10 + rank, sum(SIZES)) for rank in range(grid.size)]
    start = sum(SIZES[: grid.rank])
    scattered = group.reduce_scatterv(summands[grid.rank], dim=0, sizes=SIZES)
    torch.testing.assert_close(scattered, sum(summands)[start : start + SIZES[grid.rank]], rtol=0, atol=0)
    for dim in (0, 1, -1):
        part = group.reduce_scatter(summands[grid.rank], dim)
        torch.testing.assert_close(part, sum(summands).chunk(grid.size, dim)[grid.rank], rtol=0, atol=0)
        assert part.is_contiguous()
    return type(group.device_communicator).__name__


def refuse_other_dimensions(grid: Grid) -> list[str]:
    """The errors for a dimension that the communicator cannot cut unevenly. No rank is left waiting."""
    from vllm.distributed import get_tp_group

    from vllm_npu.errors import InvalidInputError

    communicator = get_tp_group().device_communicator
    with pytest.raises(InvalidInputError) as gathering:
        communicator.all_gatherv(torch.zeros(2, 4), dim=1, sizes=SIZES)
    with pytest.raises(InvalidInputError) as scattering:
        communicator.reduce_scatterv(torch.zeros(8, 4), dim=1, sizes=SIZES)
    return [str(gathering.value), str(scattering.value)]


def sum_in_two_jobs(grid: Grid) -> list[float] | None:
    """Sums over the group by two communicators of one name, as two jobs of an external launcher have them. None: vLLM's
    libraries for this processor have no shared memory."""
    import os

    from vllm.distributed import get_tp_group

    from vllm_npu.plugin.cpu.communicator import NAME_OF_JOB, NO_NAME, CpuMoECommunicator

    if not hasattr(torch.ops._C, "init_shm_manager"):
        return None
    group = get_tp_group()
    name = os.environ[NAME_OF_JOB]
    os.environ[NAME_OF_JOB] = NO_NAME
    try:
        jobs = [
            CpuMoECommunicator(group.cpu_group, group.device, group.device_group, unique_name=SAME_NAME)
            for _ in range(2)
        ]
        assert os.environ[NAME_OF_JOB] == NO_NAME
        assert all(job.supports_tensor_dict for job in jobs)  # vLLM's sign that the group has shared memory
        sums = []
        for scale, job in enumerate(jobs, 1):
            values = torch.full((4,), float(scale * (grid.rank + 1)))
            job.dist_module.all_reduce(values, group=group.device_group)
            sums.append(values[0].item())
        dist.barrier(group.cpu_group)
        return sums
    finally:
        os.environ[NAME_OF_JOB] = name


def test_two_jobs_of_an_external_launcher_share_no_memory(ranks: VllmRanks) -> None:  # noqa: F811 - fixture
    try:
        sums = ranks.run(sum_in_two_jobs, TP4)
        if sums == [None] * 4:
            pytest.skip("needs a processor with AVX-512: vLLM's library for others has no shared memory between ranks")
        assert sums == [[10.0, 20.0]] * 4
    finally:
        for file in SHARED_MEMORY_FOLDER.glob(f"*-{SAME_NAME}-*"):
            file.unlink()


def test_rows_of_any_sizes_are_gathered_and_scattered(ranks: VllmRanks) -> None:  # noqa: F811 - fixture
    assert ranks.run(gather_and_scatter, TP4) == ["CpuMoECommunicator"] * 4


def test_another_dimension_is_refused(ranks: VllmRanks) -> None:  # noqa: F811 - fixture
    for gathering, scattering in ranks.run(refuse_other_dimensions, TP4):
        assert gathering == "all_gatherv along dimension 1 is not supported; move that dimension to the front"
        assert scattering == "reduce_scatterv along dimension 1 is not supported; move that dimension to the front"
