"""Chips that are neither A2 nor A3: 310P and A5 run what their ops' documents list, and refuse the rest by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.emulated.references import Layer, flat, group_name, is_undefined, random_rows, refused, sorted_pairs

pytestmark = pytest.mark.emulated

npu = torch.ops.npu

TOKENS, TOP_K, EXPERTS, WIDTH = 7, 2, 4, 64
IDS = Layer(1, [TOKENS], top_k=TOP_K, experts_per_rank=EXPERTS, width=WIDTH).ids[0]


def collectives(rank: int, size: int) -> None:
    x = torch.full((5,), rank + 1.0, dtype=torch.float16).npu()
    dist.all_reduce(x)
    assert x.tolist() == [size * (size + 1) / 2] * 5
    out = torch.empty(size * 2, dtype=torch.float16).npu()
    dist.all_gather_into_tensor(out, x[:2].contiguous())
    assert out.tolist() == x.tolist()[:2] * size
    received = torch.empty(size).npu()
    dist.all_to_all_single(received, (torch.arange(float(size)) + 10 * rank).npu())
    assert received.tolist() == [10.0 * peer + rank for peer in range(size)]


def init_routing(x: torch.Tensor, **changes: Any) -> tuple[torch.Tensor, ...]:
    arguments = {
        "active_num": TOKENS * TOP_K,
        "expert_num": EXPERTS,
        "expert_tokens_num_type": 0,
        "expert_tokens_num_flag": True,
        "active_expert_range": [0, EXPERTS],
        "quant_mode": -1,
    }
    return tuple(out.cpu() for out in npu.npu_moe_init_routing_v2(x.npu(), IDS.npu(), **(arguments | changes)))


def experts_on_this_rank(x: torch.Tensor, **changes: Any) -> torch.Tensor:
    """init_routing, grouped_matmul, and the sum by hand: [TOKENS, WIDTH]. Checks what comes on the way."""
    weight = random_rows(EXPERTS, WIDTH, WIDTH, seed=2, dtype=x.dtype) / 8
    rows, index, cumsum, _ = init_routing(x, **changes)
    pairs = sorted_pairs(IDS, 0, EXPERTS)
    assert torch.equal(rows, x[[pair // TOP_K for pair in pairs]])
    assert index.tolist() == [pairs.index(pair) for pair in range(TOKENS * TOP_K)]
    ends = torch.tensor([int(IDS.le(expert).sum()) for expert in range(EXPERTS)])
    assert torch.equal(cumsum.long(), ends)
    [out] = npu.npu_grouped_matmul(
        [rows.npu()], [weight.npu()], group_list=ends.npu(), split_item=2, group_type=0, group_list_type=0
    )
    back = out.cpu()[index.long()].view(TOKENS, TOP_K, WIDTH)
    wanted = torch.stack([torch.stack([x[t].float() @ weight[e].float() for e in IDS[t]]) for t in range(TOKENS)])
    torch.testing.assert_close(back, wanted.to(x.dtype))
    return back


def on_310p(rank: int, size: int) -> None:
    collectives(rank, size)
    x = random_rows(TOKENS, WIDTH, dtype=torch.float16)
    experts_on_this_rank(x)
    # op-plugin passes no expert_tokens_num_type on: its counts are cumulative on this chip whatever is asked.
    assert torch.equal(init_routing(x, expert_tokens_num_type=1)[2], init_routing(x)[2])
    assert is_undefined(init_routing(x)[3]), "tokens before the capacity, which nothing here drops"
    refused("161002.*x on Ascend310P is Float", lambda: init_routing(x.float()))
    refused(r"161002.*its dtype follows quant_mode\) is Char", lambda: init_routing(x, quant_mode=1))
    text = r"561002.*its size follows active_expert_range\) has the shape"
    refused(text, lambda: init_routing(x, active_expert_range=[0, 2]))
    # Nor a range: as vllm-ascend 0.30 calls it, the second of two ranks gets the rows of the first one's experts.
    first, second = (init_routing(x, expert_num=2, active_expert_range=own) for own in ([0, 2], [2, 4]))
    assert all(torch.equal(first[output], second[output]) for output in (1, 2))
    device = x.npu()
    refused("561002.*Ascend310P3 has no npu_moe_gating_top_k", lambda: npu.npu_moe_gating_top_k(device, 2))
    refused("561002.*Ascend310P3 has no npu_moe_gating", lambda: npu.npu_moe_gating_top_k_softmax(device, None, 2))
    refused("561002.*Ascend310P3 has no npu_dynamic_quant", lambda: npu.npu_dynamic_quant(device))
    counts = torch.ones(1, TOKENS, dtype=torch.int64).npu()
    refused("561002.*Ascend310P3 has no npu_moe_re_routing", lambda: npu.npu_moe_re_routing(device, counts))
    table = torch.ones(EXPERTS, 2, dtype=torch.int32).npu()
    refused(
        "561002.*Ascend310P3 has no npu_moe_update_expert",
        lambda: npu.npu_moe_update_expert(IDS.npu(), table, balance_mode=1),
    )
    refused(
        "561002.*Ascend310P3 has no MoE dispatch and combine; use all-gather",
        lambda: npu.npu_moe_distribute_dispatch_v2(device, IDS.npu(), group_name(), size, rank, EXPERTS),
    )
    refused(
        "561002.*Ascend310P3 has no _npu_distribute_barrier",
        lambda: npu._npu_distribute_barrier(device, group_name(), size),
    )
    collectives(rank, size)


def on_a5(rank: int, size: int) -> None:
    collectives(rank, size)
    experts_on_this_rank(random_rows(TOKENS, WIDTH, dtype=torch.bfloat16))
    layer = Layer(size, [5] * size)
    x, ids = layer.x[rank].npu(), layer.ids[rank].npu()
    members = (group_name(), size, rank, layer.experts)
    rows, _, assist, _, recv_counts, _, _ = npu.npu_moe_distribute_dispatch_v2(x, ids, *members)
    triples = flat(layer.arrivals(rank))
    assert torch.equal(rows[: len(triples)].cpu(), torch.stack([layer.x[s][t] for s, t, _ in triples]))
    assert is_undefined(rows[len(triples) :].cpu())
    weights = layer.weights[rank]
    out = npu.npu_moe_distribute_combine_v2(rows, ids, assist, recv_counts, weights.npu(), *members).cpu()
    total = torch.zeros(5, layer.width)
    for k in range(layer.top_k):
        total = total + layer.x[rank].float() * weights[:, k, None]
    assert torch.equal(out, total.bfloat16())
    refused("561002.*quant_mode=4", lambda: npu.npu_moe_distribute_dispatch_v2(x, ids, *members, quant_mode=4))
    refused("561002.*H=64", lambda: npu.npu_moe_distribute_dispatch_v2(x[:, :64].contiguous(), ids, *members))
    refused("561002.*quant_mode=2", lambda: init_routing(layer.x[rank][:, :WIDTH].repeat(2, 1)[:TOKENS], quant_mode=2))
    refused(
        "561002.*Ascend950PR_9599 has no _npu_distribute_barrier",
        lambda: npu._npu_distribute_barrier(x, group_name(), size),
    )
    collectives(rank, size)


@pytest.mark.parametrize(("soc", "check"), [("310P", on_310p), ("A5", on_a5)])
def test_chip(soc: str, check: Callable[[int, int], None], run_in_ranks) -> None:
    run_in_ranks(check, 2, soc=soc)


def test_a2_has_neither_the_barrier_nor_combine_with_a_norm() -> None:
    x = torch.zeros(2, WIDTH, dtype=torch.bfloat16).npu()
    ids, index = torch.zeros(2, 1, dtype=torch.int32).npu(), torch.zeros(9, dtype=torch.int32).npu()
    refused("561002.*Ascend910B1 has no _npu_distribute_barrier", lambda: npu._npu_distribute_barrier(x, "nowhere", 2))
    refused(
        "561002.*Ascend910B1 has no npu_moe_distribute_combine_add_rms_norm",
        lambda: npu.npu_moe_distribute_combine_add_rms_norm(
            x, ids, index, index, torch.ones(2, 1).npu(), x[:, None], x[0], "nowhere", 2, 0, 4
        ),
    )
