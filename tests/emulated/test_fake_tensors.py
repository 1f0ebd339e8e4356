"""FakeTensor: shapes and dtypes of npu ops, worked out without running anything."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

pytestmark = pytest.mark.emulated

TOKENS, HIDDEN, TOP_K, EXPERTS, RANKS = 16, 64, 4, 16, 4

Signature = tuple[tuple[int, ...], torch.dtype]


@pytest.fixture(autouse=True)
def fake_mode() -> Iterator[None]:
    with FakeTensorMode():
        yield


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="npu")


def signatures(results: Any) -> list[Signature]:
    tensors = [results] if isinstance(results, torch.Tensor) else list(results)
    assert all(isinstance(tensor, FakeTensor) and tensor.device.type == "npu" for tensor in tensors)
    return [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]


def test_aten_ops() -> None:
    x = empty(TOKENS, HIDDEN)
    assert signatures(x @ x.t()) == [((TOKENS, TOKENS), torch.bfloat16)]
    assert signatures(x.float().topk(TOP_K)) == [
        ((TOKENS, TOP_K), torch.float32),
        ((TOKENS, TOP_K), torch.int64),
    ]
    assert signatures(torch.cat([x, x])[1:].softmax(-1, dtype=torch.float32)) == [
        ((2 * TOKENS - 1, HIDDEN), torch.float32)
    ]
    assert signatures(torch.zeros(3, device="npu:0")) == [((3,), torch.float32)]


def test_dispatch_and_combine() -> None:
    ids = empty(TOKENS, TOP_K, dtype=torch.int32)
    group = {"group_ep": "group", "ep_world_size": RANKS, "ep_rank_id": 0, "moe_expert_num": EXPERTS}
    dispatched = torch.ops.npu.npu_moe_distribute_dispatch_v2(
        empty(TOKENS, HIDDEN), ids, **group, global_bs=TOKENS * RANKS, expert_token_nums_type=1
    )
    local_experts = EXPERTS // RANKS
    received = TOKENS * RANKS * min(local_experts, TOP_K)
    expanded, _, assist, expert_token_nums, receive_counts = dispatched[:5]
    assert signatures(expanded) == [((received, HIDDEN), torch.bfloat16)]
    assert signatures(expert_token_nums) == [((local_experts,), torch.int64)]
    combined = torch.ops.npu.npu_moe_distribute_combine_v2(
        expanded, ids, assist, receive_counts, empty(TOKENS, TOP_K, dtype=torch.float32), **group,
        global_bs=TOKENS * RANKS,
    )  # fmt: skip
    assert signatures(combined) == [((TOKENS, HIDDEN), torch.bfloat16)]


def test_init_routing() -> None:
    rows, source, counts, _ = torch.ops.npu.npu_moe_init_routing_v2(
        empty(TOKENS, HIDDEN),
        empty(TOKENS, TOP_K, dtype=torch.int32),
        active_num=TOKENS * TOP_K,
        expert_num=EXPERTS,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        active_expert_range=[0, EXPERTS],
        row_idx_type=0,
        quant_mode=-1,
    )
    assert signatures([rows, source, counts]) == [
        ((TOKENS * TOP_K, HIDDEN), torch.bfloat16),
        ((TOKENS * TOP_K,), torch.int32),
        ((EXPERTS,), torch.int64),
    ]


def test_permute_and_unpermute() -> None:
    ids = empty(TOKENS, TOP_K, dtype=torch.int32)
    permuted, order = torch.ops.npu.npu_moe_token_permute(empty(TOKENS, HIDDEN), ids)
    assert signatures([permuted, order]) == [
        ((TOKENS * TOP_K, HIDDEN), torch.bfloat16),
        ((TOKENS * TOP_K,), torch.int32),
    ]
    back = torch.ops.npu.npu_moe_token_unpermute(permuted, order, empty(TOKENS, TOP_K))
    assert signatures(back) == [((TOKENS, HIDDEN), torch.bfloat16)]


def test_grouped_matmul() -> None:
    results = torch.ops.npu.npu_grouped_matmul(
        [empty(TOKENS, HIDDEN)],
        [empty(EXPERTS, HIDDEN, 128)],
        group_list=empty(EXPERTS, dtype=torch.int64),
        split_item=2,
        group_type=0,
        group_list_type=1,
    )
    assert signatures(results) == [((TOKENS, 128), torch.bfloat16)]


def test_small_ops() -> None:
    assert signatures(torch.ops.npu.npu_swiglu(empty(TOKENS, HIDDEN))) == [((TOKENS, HIDDEN // 2), torch.bfloat16)]
    assert signatures(torch.ops.npu.npu_dynamic_quant(empty(TOKENS, HIDDEN))) == [
        ((TOKENS, HIDDEN), torch.int8),
        ((TOKENS,), torch.float32),
    ]
    weights, ids, rows = torch.ops.npu.npu_moe_gating_top_k_softmax(empty(TOKENS, EXPERTS), None, TOP_K)
    assert signatures([weights, ids, rows]) == [
        ((TOKENS, TOP_K), torch.bfloat16),
        ((TOKENS, TOP_K), torch.int32),
        ((TOKENS, TOP_K), torch.int32),
    ]


def test_copies_to_the_host() -> None:
    assert empty(3).cpu().device.type == "cpu"
    assert torch.empty(3).to("npu:1").device == torch.device("npu:1")
