"""npu_moe_update_expert of each chip beside its portable definition."""

import pytest
import torch

from tests.cases import distinct_ids, seeded
from tests.pure.test_eplb_placement import drawn
from vllm_npu.core.limits import BalanceMode

pytestmark = pytest.mark.emulated


def equals_its_definition(rank: int, num_ranks: int, native: bool) -> int:
    """Returns how many choices went to another replica than the first."""
    from vllm_npu.device import npu_ops, portable_ops

    assert npu_ops.device_limits().update_expert is native
    moved = 0
    for seed in range(40):
        size = 2 + seed % 7
        placement = drawn(size, 3, size, seed, empty=False)
        ids = distinct_ids(seed % 12, min(3, size), size, seeded(seed)).to(torch.int32 if seed % 3 else torch.int64)
        arguments = {
            "local_rank_id": seed % size,
            "world_size": size,
            "balance_mode": BalanceMode(seed % 2),
        }
        table = placement.eplb_table()
        wanted = portable_ops.npu_moe_update_expert(ids, table, **arguments)
        found = npu_ops.npu_moe_update_expert(ids.npu(), table.npu(), **arguments)
        assert torch.equal(wanted, found.cpu()), (seed, wanted, found)
        moved += int((wanted != table[ids.long(), 1]).sum())
    return moved


@pytest.mark.parametrize(("soc", "native"), [("A3", True), ("A5", True), ("A2", False)])
def test_the_chips_op_equals_its_definition(run_in_ranks, soc, native):
    assert run_in_ranks(equals_its_definition, 1, native, soc=soc).returned[0] > 50
