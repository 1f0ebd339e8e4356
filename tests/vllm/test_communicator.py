"""vLLM's groups on CPUs use our communicator, which has the uneven gather and scatter that vLLM's own class lacks."""

import pytest
import torch

from tests.vllm.vllm_ranks import (
    TP4,
    Grid,
    VllmRanks,
    integers,
    ranks,  # noqa: F401 - fixture
)

pytest.importorskip("vllm")

SIZES = [3, 0, 1, 4]


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


def test_rows_of_any_sizes_are_gathered_and_scattered(ranks: VllmRanks) -> None:  # noqa: F811 - fixture
    assert ranks.run(gather_and_scatter, TP4) == ["CpuMoECommunicator"] * 4


def test_another_dimension_is_refused(ranks: VllmRanks) -> None:  # noqa: F811 - fixture
    for gathering, scattering in ranks.run(refuse_other_dimensions, TP4):
        assert gathering == "all_gatherv along dimension 1 is not supported; move that dimension to the front"
        assert scattering == "reduce_scatterv along dimension 1 is not supported; move that dimension to the front"
