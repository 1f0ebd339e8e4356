"""The managers naive and agrs over gloo: their dispatch and combine, in data-parallel and in sequence-parallel steps."""

import pytest
import torch

from tests.managers import exchanges
from vllm_npu.all2all import MANAGERS, manager_class, manager_row
from vllm_npu.errors import InvalidInputError, UnsupportedConfigError
from vllm_npu.tools.launch import Rank, ThreadRankPool

GATHERING = ("naive", "agrs")


@pytest.mark.parametrize("name", GATHERING)
def test_all_ranks_see_all_rows_and_get_back_the_sum_of_the_shares(pools, name):
    assert [fault for found in pools("gloo", 4).run(exchanges, name) for fault in found] == []


def test_a_rank_that_brings_other_rows_than_the_step_says_is_told_so():
    def wrong(rank: Rank):
        manager = manager_class("agrs")(rank.groups(tp_size=1, dp_size=2), lambda: [3, 3])
        x = torch.zeros(2, 4)
        with pytest.raises(InvalidInputError, match="brings 2 rows"):
            manager.dispatch(x, x, x)

    with ThreadRankPool(2, timeout=5) as pool:
        pool.run(wrong)


def test_an_unknown_manager_and_an_absent_library_are_named():
    with pytest.raises(UnsupportedConfigError, match=r"unknown all2all 'fast'; there are: naive, agrs, pplx"):
        manager_row("fast")
    with pytest.raises(
        UnsupportedConfigError, match=r"pplx_kernels, which is not installed; build pplx-kernels.*naive, agrs"
    ):
        manager_row("pplx")
    with pytest.raises(UnsupportedConfigError, match="needs the Python module deep_ep"):
        manager_row("deepep_low_latency")


def notes_what_it_took(rank: Rank):
    manager = manager_class("naive")(rank.groups(tp_size=1, dp_size=2), lambda: [2, 2])
    assert manager.end_step() is None
    x = torch.zeros(2, 4)
    manager.combine(manager.dispatch(x, x, x)[0])
    assert [manager.end_step(), manager.end_step()] == [
        ("naive", "naive")
    ] * 2  # the second replays a graph of the first


def test_a_step_tells_how_its_tokens_travelled():
    with ThreadRankPool(2, timeout=5) as pool:
        pool.run(notes_what_it_took)
    assert all(manager_class(name).name == name for name, row in MANAGERS.items() if row.manager and not row.library)
