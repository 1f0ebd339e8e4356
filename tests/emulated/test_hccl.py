"""The hccl transport and every strategy on NPU tensors: real torch_npu, real ProcessGroupHCCL, emulated device."""

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from tests.ranks.test_transport_contract import CONTRACT, with_tensors_on_its_device
from vllm_npu.emulator import launcher
from vllm_npu.transport.launch import ProcessRankPool, Rank, RankPool

GRIDS = [(2, 1), (2, 2)]  # (tp_size, dp_size): groups of 1, 2 and 4 ranks


@pytest.fixture(scope="module", params=GRIDS, ids=str)
def grid(request) -> tuple[int, int]:
    return request.param


@pytest.fixture(scope="module")
def pool(grid) -> Iterator[RankPool]:
    num_ranks = grid[0] * grid[1]
    with launcher.emulated_devices(num_ranks), ProcessRankPool(num_ranks, transport="hccl") as opened:
        yield opened


def where(rank: Rank) -> str:
    return f"{dist.get_backend(rank.groups(tp_size=rank.num_ranks, dp_size=1).ep.process_group)} on {rank.device}"


def test_ranks_are_npus_under_hccl(pool, grid):
    assert pool.run(where) == [f"hccl on npu:{rank}" for rank in range(grid[0] * grid[1])]


@pytest.mark.parametrize("promise", CONTRACT)
def test_contract(pool, grid, promise):
    pool.run(with_tensors_on_its_device, CONTRACT[promise], grid)


@pytest.mark.parametrize("ranks", [2, 4])
def test_verify_runs_every_strategy_on_emulated_npus(ranks, tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "vllm_npu.cli", "verify", "--transport", "hccl", "--quick", "--json", str(report)]
    done = subprocess.run([*command, "--ranks", str(ranks)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(report.read_text())
    assert result["device"].startswith("emulated Ascend910B")
    assert result["failed"] == {}
    assert result["cases"] >= 100
    assert done.stdout.endswith(f"verify: {result['cases']} cases, 0 failed\n")
