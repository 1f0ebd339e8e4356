"""Groups of other sizes in one process: two at once, and one after another. Nothing of a group stays after its end."""

import gc
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from vllm_npu.strategies.table import STRATEGIES
from vllm_npu.tools.launch import Rank
from vllm_npu.tools.verification import Case, run_case
from vllm_npu.transport import gloo
from vllm_npu.transport.gloo import GlooTransport

MAPS, DESCRIPTORS = Path("/proc/self/maps"), Path("/proc/self/fd")
GRIDS = [(2, 2), (1, 4), (4, 1)]  # TP, DP


def run_one_in_the_other(rank: Rank, outer: Case, inner: Case) -> list[str | None]:
    """The inner case runs while the tokens of the outer one are with their experts."""
    faults = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gloo, "WINDOW_MIN_BYTES", 1024)
        faults.append(run_case(rank, outer, between=lambda: faults.append(run_case(rank, inner))))
    return faults


@pytest.mark.parametrize("kind", ["threaded", "gloo"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_grids_of_other_sizes_at_once(pools, kind, strategy):
    counts = (7, 0, 3, 5)
    for number, (tp_size, dp_size) in enumerate(GRIDS):
        outer = Case(strategy=strategy, tp_size=tp_size, dp_size=dp_size, num_tokens_across_dp=counts[:dp_size])
        tp_size, dp_size = GRIDS[(number + 1) % len(GRIDS)]
        inner = Case(
            strategy=strategy,
            tp_size=tp_size,
            dp_size=dp_size,
            num_tokens_across_dp=counts[:dp_size],
            experts_per_rank=3,
            hidden_size=128,
            width=128,
            seed=number,
        )
        assert pools(kind, 4).run(run_one_in_the_other, outer, inner) == [[None, None]] * 4


def descriptors_after_each_group(rank: Rank) -> list[int]:
    """Groups of 2 and of 4 ranks one after another, each with a shared window. Open descriptors after each."""
    found = []
    for size in (2, 4) * 4:
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, rank.num_ranks, size)]
        process_group = groups[rank.rank // size]
        transport = GlooTransport(process_group, "ep")
        gathered = transport.all_gather(torch.full((4096, 64), float(transport.rank), dtype=torch.float64))
        assert gathered[::4096, 0].tolist() == list(range(size))
        assert MAPS.read_text().count("memfd:vllm_npu_window") == size
        del transport
        gc.collect()
        assert "memfd:vllm_npu_window" not in MAPS.read_text()
        dist.destroy_process_group(process_group)
        del process_group, groups
        gc.collect()
        found.append(len(os.listdir(DESCRIPTORS)))
    return found


def test_a_group_leaves_no_window_and_no_descriptor(pools):
    for found in pools("gloo", 4).run(descriptors_after_each_group):
        assert found[2::2] == found[2:3] * 3, found
        assert found[3::2] == found[3:4] * 3, found
