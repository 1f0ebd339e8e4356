"""Buffer sizes, handle cache and rules of the generic managers. The libraries of the managers are not needed."""

import pytest
import torch

from vllm_npu.all2all import HandleCache
from vllm_npu.all2all.deepep import DeepEPBuffer, high_throughput_buffer, low_latency_buffer, low_latency_bytes
from vllm_npu.all2all.flashinfer import MIB, one_sided_workspace_bytes, why_not_all_reduce
from vllm_npu.all2all.pplx import PPLXSizes, ids_of_slots
from vllm_npu.errors import UnsupportedConfigError


def test_handles_are_made_once_for_each_arguments_and_live_until_cleared():
    made, released = [], []
    cache: HandleCache[list[int]] = HandleCache()

    def create(**kwargs: int) -> list[int]:
        made.append(kwargs)
        return [kwargs["hidden"]]

    first = cache.get_or_create({"hidden": 1, "experts": 2}, create)
    assert cache.get_or_create({"experts": 2, "hidden": 1}, create) is first
    assert cache.get_or_create({"hidden": 2, "experts": 2}, create) == [2]
    assert made == [{"hidden": 1, "experts": 2}, {"hidden": 2, "experts": 2}]
    del first
    assert cache.get_or_create({"hidden": 1, "experts": 2}, create) == [1]
    assert len(made) == len(cache) == 2
    cache.clear(released.append)
    cache.clear(released.append)
    assert sorted(released) == [[1], [2]]
    assert len(cache) == 0


def test_a_handle_that_cannot_be_made_is_not_remembered():
    cache: HandleCache[int] = HandleCache()
    with pytest.raises(ZeroDivisionError):
        cache.get_or_create({"a": 1}, lambda a: a // 0)
    assert cache.get_or_create({"a": 1}, lambda a: a) == 1


def test_high_throughput_buffers_take_rdma_between_hosts_only():
    assert high_throughput_buffer(buffer_mb=1024, internode=False) == DeepEPBuffer(1 << 30, 0, 1, False)
    assert high_throughput_buffer(buffer_mb=1024, internode=True) == DeepEPBuffer(1 << 30, 1 << 30, 10, False)


def test_low_latency_bytes_of_deepseek_v3():
    # 128 tokens, hidden 7168, 256 experts: rows of 14352 bytes out, and of 14560 back, the larger of which counts
    expected = 2 * (2 * 256 * 128 * 14560 + 1024)
    assert low_latency_bytes(128, 7168, 256) == expected + 128
    buffer = low_latency_buffer(buffer_mb=1024, max_tokens_per_rank=128, hidden_size=7168, ep_size=8, num_experts=256)
    assert (buffer.num_rdma_bytes, buffer.num_qps_per_rank, buffer.low_latency_mode) == (expected + 128, 32, True)


def test_low_latency_refuses_what_its_kernels_cannot_lay_out():
    sizes = {"buffer_mb": 1, "max_tokens_per_rank": 1, "ep_size": 2}
    with pytest.raises(UnsupportedConfigError, match="multiples of 128, not 200"):
        low_latency_buffer(**sizes, hidden_size=200, num_experts=4)
    with pytest.raises(UnsupportedConfigError, match="5 experts do not divide"):
        low_latency_buffer(**sizes, hidden_size=256, num_experts=5)


def test_one_sided_workspace_has_room_for_every_ranks_rows_both_ways():
    # 2 ranks, 1 token: counters 24 -> 128, two flags -> 256, two tables of 88 -> 256, slots 128 -> 128 and 64 -> 128
    assert one_sided_workspace_bytes(ep_size=2, max_tokens=1, dispatched_row_bytes=64, returned_row_bytes=32) == 896
    large = one_sided_workspace_bytes(ep_size=8, max_tokens=4096, dispatched_row_bytes=14400, returned_row_bytes=14336)
    assert 0 < large - 8 * 4096 * (14400 + 14336) < MIB


@pytest.mark.parametrize("element_size", [2, 4])
def test_pplx_sizes(element_size):
    sizes = PPLXSizes.of(max_num_tokens=64, num_experts=8, top_k=2, hidden_size=1024, element_size=element_size)
    assert sizes.hidden_dim_bytes == 1024 * element_size
    assert sizes.slots_per_expert(4) == 256


def test_pplx_refuses_rows_that_are_no_multiple_of_what_it_copies():
    with pytest.raises(UnsupportedConfigError, match="a multiple of 16 bytes, not 2004"):
        PPLXSizes.of(max_num_tokens=1, num_experts=2, top_k=1, hidden_size=1002, element_size=2)


def test_empty_slots_have_an_expert_of_another_rank():
    counts = torch.tensor([2, 0, 3], dtype=torch.int32)
    ids = ids_of_slots(counts, 3, rank=1, world_size=2)
    assert ids.flatten().tolist() == [3, 3, 0, 0, 0, 0, 5, 5, 5]
    assert ids.dtype is torch.int32
    assert ids_of_slots(counts, 1, rank=0, world_size=2).flatten().tolist() == [0, 3, 2]


class OnGPU(torch.Tensor):
    """A CPU tensor whose is_cuda is True, so that the rule can be tested without a GPU."""

    is_cuda = True


def rows(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype).as_subclass(OnGPU)


@pytest.mark.parametrize(
    ("x", "world_size", "max_bytes", "reason"),
    [
        (rows(4, 1024), 2, 8192, None),
        (rows(4, 1024), 1, 8192, "one rank only"),
        (rows(4, 1024), 5, None, "5 ranks on this chip"),
        (rows(5, 1024), 2, 8192, "10240 bytes are more than 8192"),
        (rows(4096), 2, 8192, "a contiguous"),
        (rows(1024, 4).t(), 2, 8192, "a contiguous"),
        (rows(0, 1024), 2, 8192, "no tokens"),
        (rows(4, 8, dtype=torch.int32), 2, 8192, "torch.int32 is not one of"),
        (torch.zeros(4, 4), 2, 8192, "the tensor is on cpu"),
    ],
)
def test_when_flashinfers_all_reduce_is_taken(x, world_size, max_bytes, reason):
    found = why_not_all_reduce(x, world_size, max_bytes)
    assert (found is None) if reason is None else reason in found
