"""Compares every strategy and the ops on real NPUs with portable torch, and checks the transport's contract.

Run on an Ascend machine with CANN and torch_npu: python -m pytest tests/npu
"""

import pytest
import torch

from tests.cases import distinct_ids, seeded
from tests.ranks.test_transport_contract import CONTRACT, with_tensors_on_its_device
from vllm_npu.device import ops_of, portable_ops
from vllm_npu.strategies.table import ALL_STRATEGIES
from vllm_npu.tools.launch import Rank
from vllm_npu.tools.verification import cases, limits_of_device, run_case

pytestmark = pytest.mark.npu
HIDDEN, EXPERTS, TOKENS, TOP_K = 2048, 8, 33, 4


@pytest.mark.parametrize("strategy", ALL_STRATEGIES)
def test_a_strategy_equals_the_reference(npus, strategy):
    limits = npus.run(limits_of_device)[0]
    to_run = list(cases(npus.num_ranks, strategies=(strategy,), quick=False, seed=0, device=limits))
    if not to_run:
        pytest.skip(f"{limits.family} does not run {strategy} on {npus.num_ranks} ranks")
    faults = {str(case): fault for case in to_run for fault in npus.run(run_case, case) if fault}
    assert faults == {}


@pytest.mark.parametrize("promise", CONTRACT)
def test_contract(npus, promise):
    npus.run(with_tensors_on_its_device, CONTRACT[promise], (1, npus.num_ranks))


def routing_ops(rank: Rank) -> None:
    """Compare rows, counts and sums with portable_ops. Undefined rows are not compared."""
    generator = seeded(rank.rank)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    ids = distinct_ids(TOKENS, TOP_K, 2 * EXPERTS, generator)
    own = range(EXPERTS // 2, EXPERTS // 2 + EXPERTS)
    weights = torch.rand(TOKENS, TOP_K, generator=generator)
    ops = ops_of(torch.empty(0, device=rank.device))
    wanted = portable_ops.init_routing(x, ids, 2 * EXPERTS, own)
    routed = ops.init_routing(x.to(rank.device), ids.to(rank.device), 2 * EXPERTS, own)
    valid = wanted.expanded_x.shape[0]
    assert torch.equal(routed.tokens_per_expert.cpu(), wanted.tokens_per_expert)
    assert torch.equal(routed.expanded_row_idx.cpu().long(), wanted.expanded_row_idx)
    assert torch.equal(routed.expanded_x[:valid].cpu(), wanted.expanded_x)
    rows = torch.full_like(routed.expanded_x, float("nan"))
    rows[:valid] = wanted.expanded_x.to(rank.device)
    summed = ops.finalize_routing(rows, routed.expanded_row_idx, weights.to(rank.device)).cpu()
    expected = portable_ops.finalize_routing(wanted.expanded_x, wanted.expanded_row_idx, weights)
    torch.testing.assert_close(summed, expected, rtol=2e-2, atol=2e-2)


def int8_ops(rank: Rank) -> None:
    """Compare quantised rows within one unit, and their grouped product within the rounding of its output."""
    generator = seeded(100 + rank.rank)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    ops = ops_of(torch.empty(0, device=rank.device))
    values, scales = portable_ops.npu_dynamic_quant(x)
    on_device, scales_on_device = ops.npu_dynamic_quant(x.to(rank.device))
    assert int((on_device.cpu().int() - values.int()).abs().max()) <= 1
    torch.testing.assert_close(scales_on_device.cpu(), scales, rtol=1e-6, atol=0)
    weight = torch.randint(-127, 128, (2, HIDDEN, 64), generator=generator, dtype=torch.int8)
    weight_scales = (torch.rand(2, 64, generator=generator) / HIDDEN).bfloat16()
    counts = torch.tensor([TOKENS // 3, TOKENS - TOKENS // 3 - 2])  # two rows belong to no group
    arguments = {"scale": weight_scales, "per_token_scale": scales.flatten()}
    wanted = portable_ops.npu_grouped_matmul(values, weight, counts, output_dtype=torch.bfloat16, **arguments)
    product = ops.npu_grouped_matmul(
        values.to(rank.device),
        weight.to(rank.device),
        counts.to(rank.device),
        output_dtype=torch.bfloat16,
        **{name: tensor.to(rank.device) for name, tensor in arguments.items()},
    )
    torch.testing.assert_close(product[:-2].cpu(), wanted[:-2], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("check", [routing_ops, int8_ops], ids=lambda check: check.__name__)
def test_ops(npus, check):
    npus.run(check)
