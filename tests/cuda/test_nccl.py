"""The nccl transport on CUDA tensors: the contract that all transports keep."""

import pytest

from tests.cuda.conftest import NUM_RANKS
from tests.ranks.test_transport_contract import CONTRACT, REFUSED, is_refused, ordered_sums, with_tensors_on_its_device

pytestmark = pytest.mark.cuda

GRIDS = [(1, NUM_RANKS), (NUM_RANKS, 1)]  # (tp_size, dp_size): groups of one rank and of all
# NCCL adds in an order of its own, rounding each time: with two ranks alone that cannot be told from rank order.
PROMISES = [promise for promise, check in CONTRACT.items() if NUM_RANKS == 2 or check is not ordered_sums]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("promise", PROMISES)
def test_contract(gpus, grid, promise):
    gpus.run(with_tensors_on_its_device, CONTRACT[promise], grid)


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_do_not_fit_are_refused_before_rows_move(gpus, name):
    gpus.run(with_tensors_on_its_device, is_refused, (NUM_RANKS, 1), name)
