"""The nccl transport on CUDA tensors keeps the contract of all transports."""

import pytest

from tests.cuda.conftest import NUM_RANKS
from tests.ranks.test_transport_contract import CONTRACT, REFUSED, is_refused, ordered_sums, with_tensors_on_its_device

pytestmark = pytest.mark.cuda

GRIDS = [(1, NUM_RANKS), (NUM_RANKS, 1)]  # (tp_size, dp_size): each has a group of one rank and a group of all
# NCCL adds in its own order and rounds each sum. Two ranks give the same sum in any order, so only then ordered_sums holds.
PROMISES = [promise for promise, check in CONTRACT.items() if NUM_RANKS == 2 or check is not ordered_sums]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("promise", PROMISES)
def test_contract(gpus, grid, promise):
    gpus.run(with_tensors_on_its_device, CONTRACT[promise], grid)


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_do_not_fit_are_refused_before_rows_move(gpus, name):
    gpus.run(with_tensors_on_its_device, is_refused, (NUM_RANKS, 1), name)
