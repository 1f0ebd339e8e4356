"""vLLM's generic all2all managers on GPUs: naive and AgRs over NCCL, and each manager whose library is installed."""

from importlib.util import find_spec

import pytest
import torch

from tests.cuda import library_ranks
from tests.managers import exchanges

pytestmark = pytest.mark.cuda


def needs(module: str):
    return pytest.mark.skipif(find_spec(module) is None, reason=f"needs the Python module {module}")


@pytest.mark.parametrize("name", ["naive", "agrs"])
def test_gathering_managers_over_nccl(gpus, name):
    assert [fault for found in gpus.run(exchanges, name) for fault in found] == []


@needs("pplx_kernels")
def test_pplx_brings_rows_to_their_experts_and_back(gpus):
    assert gpus.run(library_ranks.pplx_round_trip) == [None] * gpus.num_ranks


@needs("deep_ep")
def test_low_latency_bytes_are_deep_eps(gpus):
    assert all(gpus.run(library_ranks.low_latency_bytes_agree))


@needs("flashinfer")
def test_one_sided_workspace_bytes_are_flashinfers(gpus):
    assert all(gpus.run(library_ranks.one_sided_bytes_agree))


@needs("flashinfer")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flashinfers_all_reduce_adds_up_and_refuses_other_tensors(gpus, dtype):
    assert gpus.run(library_ranks.all_reduces, dtype) == [[]] * gpus.num_ranks
