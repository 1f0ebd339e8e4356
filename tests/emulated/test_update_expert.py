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
        if seed % 4:
            weights = torch.rand(ids.shape, generator=seeded(seed))
            arguments |= {"expert_scales": weights, "pruning_threshold": torch.tensor([0.0, 0.3, 0.4])[: ids.shape[1]]}
        if seed % 4 > 1:
            arguments["active_mask"] = torch.arange(len(ids)) < seed % 5
        table = placement.eplb_table()
        wanted = portable_ops.npu_moe_update_expert(ids, table, **arguments)
        on_npu = {name: each.npu() if isinstance(each, torch.Tensor) else each for name, each in arguments.items()}
        found = npu_ops.npu_moe_update_expert(ids.npu(), table.npu(), **on_npu)
        assert (wanted[1] is None) == (found[1] is None)
        for one, other in zip(wanted, found, strict=True):
            assert one is None or torch.equal(one, other.cpu()), (seed, one, other)
        moved += int((wanted[0] != table[ids.long(), 1]).sum())
    return moved


@pytest.mark.parametrize(("soc", "native"), [("A3", True), ("A5", True), ("A2", False)])
def test_the_chips_op_equals_its_definition(run_in_ranks, soc, native):
    assert run_in_ranks(equals_its_definition, 1, native, soc=soc).returned[0] > 50
