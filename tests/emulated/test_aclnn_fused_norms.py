"""Norms with a cast or a quantisation behind them, the sampler's choice of logits, and the gradient of experts' weights."""

import itertools

import pytest
import torch
import torch_npu

from tests.emulated.references import is_undefined, random_rows, refused
from tests.emulated.test_aclnn_training import same

pytestmark = pytest.mark.emulated

HALVES = (torch.float16, torch.bfloat16)
EPSILON = 1e-5


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """The int4 values of int32 numbers, the lowest bits first."""
    bits = (packed.cpu().unsqueeze(-1) >> (4 * torch.arange(8))) & 15
    return torch.where(bits > 7, bits - 16, bits).flatten(-2)


def normed(x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor | None = None) -> torch.Tensor:
    rows = x.double()
    out = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + EPSILON) * gamma.double()
    return out if beta is None else out + beta.double()


def within_one(made: torch.Tensor, exact: torch.Tensor, least: int = -128, most: int = 127) -> None:
    """`made` is the rounded `exact`. A value beside a half may go either way."""
    assert ((made.cpu().double() - exact.clamp(least, most)).abs() <= 0.5 + 1e-3).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_add_rms_norm_cast(dtype):
    x1, x2, gamma = (random_rows(*size, dtype=dtype, seed=i) for i, size in enumerate([(3, 4, 16), (3, 4, 16), (16,)]))
    y1, y2, rstd, total = torch_npu.npu_add_rms_norm_cast(x1.npu(), x2.npu(), gamma.npu(), EPSILON)
    wanted = normed(x1.double() + x2.double(), gamma)
    same(y2, wanted, dtype)
    assert y1.dtype == torch.float32
    assert torch.equal(y1.cpu(), y2.cpu().float())
    same(total, x1.double() + x2.double(), dtype)
    same(rstd, torch.rsqrt((x1.double() + x2.double()).square().mean(-1, keepdim=True) + EPSILON), torch.float32)


@pytest.mark.parametrize(("dtype", "divides", "twice"), list(itertools.product(HALVES, [True, False], [True, False])))
def test_add_rms_norm_quant(dtype, divides, twice):
    x1, x2 = (random_rows(5, 32, dtype=dtype, seed=seed) for seed in (1, 2))
    gamma, beta = (random_rows(32, dtype=dtype, seed=seed) for seed in (3, 4))
    scales = [random_rows(32, seed=seed).abs() + 0.02 for seed in (5, 6)]
    points = [torch.arange(-16, 16, dtype=torch.int32), torch.arange(16, -16, -1, dtype=torch.int32)]
    second = {"scales2": scales[1].npu(), "zero_points2": points[1].npu()} if twice else {}
    y1, y2, total = torch_npu.npu_add_rms_norm_quant(
        x1.npu(),
        x2.npu(),
        gamma.npu(),
        scales[0].npu(),
        points[0].npu(),
        beta=beta.npu(),
        epsilon=EPSILON,
        div_mode=divides,
        **second,
    )
    rows = normed(x1.double() + x2.double(), gamma, beta)
    for y, scale, point in zip((y1, y2), scales, points, strict=True):
        if y is y2 and not twice:
            assert is_undefined(y.cpu())
            continue
        assert y.dtype == torch.int8
        within_one(y, (rows / scale.double() if divides else rows * scale.double()) + point)
    same(total, x1.double() + x2.double(), dtype)


@pytest.mark.parametrize(("dtype", "int4"), list(itertools.product(HALVES, [False, True])))
def test_rms_norm_quant(dtype, int4):
    x, gamma, beta = (random_rows(*size, dtype=dtype, seed=i) for i, size in enumerate([(5, 32), (32,), (32,)]))
    scale, offset = torch.tensor([3.0 if int4 else 40.0], dtype=dtype), torch.tensor([2], dtype=torch.int8)
    options = {"dst_dtype": torch.quint4x2} if int4 else {}
    y = torch_npu.npu_rms_norm_quant(
        x.npu(), gamma.npu(), beta.npu(), scale.npu(), offset.npu(), epsilon=EPSILON, **options
    )
    exact = normed(x, gamma, beta) * scale.double() + 2
    if int4:
        within_one(unpacked(y), exact, -8, 7)
    else:
        within_one(y, exact)


@pytest.mark.parametrize(("dtype", "smooth", "int4"), list(itertools.product(HALVES, [0, 1, 2], [False, True])))
def test_add_rms_norm_dynamic_quant(dtype, smooth, int4):
    x1, x2 = (random_rows(2, 3, 32, dtype=dtype, seed=seed) for seed in (1, 2))
    gamma, beta = (random_rows(32, dtype=dtype, seed=seed) for seed in (3, 4))
    smooths = [random_rows(32, dtype=dtype, seed=seed).abs() + 0.1 for seed in range(5, 5 + smooth)]
    x1[1, 2], x2[1, 2], beta = 0, 0, beta * 0  # a row of zeros
    names = {f"smooth_scale{i + 1}": each.npu() for i, each in enumerate(smooths)}
    options = {"y_dtype": torch.quint4x2} if int4 else {}
    y1, y2, total, scale1, scale2 = torch_npu.npu_add_rms_norm_dynamic_quant(
        x1.npu(), x2.npu(), gamma.npu(), beta=beta.npu(), epsilon=EPSILON, **names, **options
    )
    rows = normed(x1.double() + x2.double(), gamma, beta)
    most = 7 if int4 else 127
    for i, (y, scale) in enumerate([(y1, scale1), (y2, scale2)][: max(1, smooth)]):
        smoothed = rows * smooths[i].double() if smooth else rows
        same(scale, smoothed.abs().amax(-1) / most, torch.float32)
        assert scale.cpu()[1, 2] == 0
        exact = smoothed / scale.cpu().double().unsqueeze(-1)
        within_one(unpacked(y) if int4 else y, exact.nan_to_num(0), -8 if int4 else -128, most)
    same(total, x1.double() + x2.double(), dtype)


def test_a_mask_chooses_the_outputs():
    x, gamma = random_rows(4, 32, dtype=torch.float16), torch.ones(32, dtype=torch.float16)
    arguments = (x.npu(), x.npu(), gamma.npu())
    both = torch_npu.npu_add_rms_norm_dynamic_quant(*arguments, epsilon=EPSILON, output_mask=[True, True])
    assert torch.equal(both[0].cpu(), both[1].cpu())
    second = torch_npu.npu_add_rms_norm_dynamic_quant(*arguments, epsilon=EPSILON, output_mask=[False, True])
    assert second[0].dim() == 0
    assert torch.equal(second[1].cpu(), both[0].cpu())
    refused(
        "output_mask leaves out an output whose smooth scale is given",
        lambda: torch_npu.npu_add_rms_norm_dynamic_quant(
            *arguments, smooth_scale1=gamma.npu(), epsilon=EPSILON, output_mask=[False, True]
        ),
    )


# --- the sampler's choice ---


@pytest.mark.parametrize(
    ("dtype", "with_p", "with_k"), list(itertools.product([*HALVES, torch.float32], [1, 0], [1, 0]))
)
def test_top_k_top_p(dtype, with_p, with_k):
    logits = random_rows(6, 40, dtype=dtype) * 3
    p, k = torch.tensor([0.0, 0.3, 0.5, 0.9, 0.95, 0.7], dtype=dtype), torch.tensor([1, 3, 40, 10, 7, 5]).int()
    made = torch_npu.npu_top_k_top_p(logits.npu(), p.npu() if with_p else None, k.npu() if with_k else None).cpu()
    for row, chosen in enumerate(made):
        values, order = (x.flip(0) for x in logits[row].double().sort(stable=True))  # as the document orders equal ones
        kept = values >= values[k[row] - 1] if with_k else torch.ones(40, dtype=torch.bool)
        if with_p:
            before = values.masked_fill(~kept, -torch.inf).softmax(-1).cumsum(-1).roll(1)
            before[0] = 0  # the probability of what is larger
            kept &= (before < p[row].double()) | (torch.arange(40) == 0)
        assert torch.equal(chosen[order].isfinite(), kept), row
        assert torch.equal(chosen[order][kept], logits[row][order][kept])


# --- the gradient of experts' weights ---


@pytest.mark.parametrize("dtype", HALVES)
def test_grouped_matmul_add(dtype):
    """Three experts; the second one has no rows."""
    x, weight, total = random_rows(9, 4, dtype=dtype), random_rows(9, 6, dtype=dtype, seed=2), random_rows(3, 4, 6)
    ends = torch.tensor([5, 5, 9])
    made = total.npu()
    torch_npu.npu_grouped_matmul_add_(made, x.npu(), weight.npu(), ends.npu())
    parts = zip(x.double().split([5, 0, 4]), weight.double().split([5, 0, 4]), strict=True)
    same(made, total.double() + torch.stack([a.T @ b for a, b in parts]), torch.float32)
