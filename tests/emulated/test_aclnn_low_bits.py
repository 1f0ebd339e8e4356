"""Products with int4 weights, or int8 weights of 16-bit rows, through op-plugin's own C++, against CANN's documents.

int4 values travel eight in an int32, and scales in the low half of an int64.
"""

from typing import Any

import pytest
import torch

from tests.cases import seeded
from tests.emulated.references import random_rows, refused
from tests.emulated.test_aclnn_grouped_matmul import GROUPS, ROWS, by_group, group_list, grouped_matmul, random_int8

pytestmark = pytest.mark.emulated

npu = torch.ops.npu

INNER, WIDTH, PARTS = 64, 24, 2
FLOATS = (torch.float16, torch.bfloat16)


def random_int4(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(-8, 8, shape, generator=seeded(seed), dtype=torch.int32)


def packed(values: torch.Tensor) -> torch.Tensor:
    """[..., n] to [..., n / 8] int32: the first of eight values has the lowest four bits."""
    numbers = []
    for eight in values.reshape(-1, 8).tolist():
        bits = sum((value & 15) << (4 * place) for place, value in enumerate(eight))
        numbers.append(bits - 2**32 if bits >= 2**31 else bits)
    return torch.tensor(numbers, dtype=torch.int32).view(*values.shape[:-1], -1)


def scale_in_int64(scale: torch.Tensor) -> torch.Tensor:
    return scale.view(torch.int32).long() & 0xFFFFFFFF


def positive(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (random_rows(*shape, seed=seed).abs() / 50 + 1e-3).to(dtype)


def test_packing_of_weights() -> None:
    values = random_int4(5, 16)
    assert torch.equal(npu.npu_convert_weight_to_int4pack(values.npu()).cpu(), packed(values))


# --- 16-bit rows ---


def for_each_row(factors: torch.Tensor) -> torch.Tensor:
    """[parts, width] to [INNER, width]."""
    return (
        factors.float()
        .view(-1, factors.shape[-1])
        .repeat_interleave(INNER // (factors.numel() // factors.shape[-1]), 0)
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("int4", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH), (PARTS, WIDTH)])
def test_weight_quant_batchmatmul(dtype: torch.dtype, int4: bool, transposed: bool, shape: tuple[int, ...]) -> None:
    x = random_rows(5, INNER, dtype=dtype)
    weight = random_int4(INNER, WIDTH) if int4 else random_int8(INNER, WIDTH)
    scale, offset = positive(*shape, seed=2, dtype=dtype), random_int4(*shape, seed=3).to(dtype)
    bias = random_rows(WIDTH, seed=4, dtype=torch.float16 if dtype is torch.float16 else torch.float32)
    stored = weight.t().contiguous() if transposed else weight
    device_weight = npu.npu_convert_weight_to_int4pack(stored.npu()) if int4 else stored.npu()
    out = npu.npu_weight_quant_batchmatmul(
        x.npu(),
        device_weight.t() if transposed else device_weight,
        scale.npu(),
        offset.npu(),
        bias=bias.npu(),
        antiquant_group_size=INNER // PARTS if shape[0] == PARTS else 0,
    )
    full = ((weight.float() + for_each_row(offset)) * for_each_row(scale)).to(dtype)
    wanted = x.double() @ full.double() + bias.double()
    assert out.dtype == dtype
    torch.testing.assert_close(out.cpu().double(), wanted, rtol=2e-2, atol=2e-2)
    assert (out.cpu().double() - wanted).abs().mean() < 5e-3 * wanted.abs().mean()


def test_weight_quant_batchmatmul_refuses_by_name() -> None:
    x, weight, scale = (
        random_rows(5, INNER, dtype=torch.float16).npu(),
        random_int8(INNER, WIDTH).npu(),
        positive(WIDTH, seed=2),
    )

    def call(**options: Any) -> Any:
        arguments = {"x": x, "weight": weight, "antiquant_scale": scale.half().npu()} | options
        return lambda: npu.npu_weight_quant_batchmatmul(**arguments)

    refused("161002.*antiquant_scale is Float", call(antiquant_scale=scale.npu()))
    refused("161002.*bias is Float", call(bias=scale.npu()))
    refused("561002.*antiquant_scale has the shape.*it must have 2 rows", call(antiquant_group_size=32))
    refused("561002.*antiquant_scale has the shape", call(antiquant_scale=scale[:7].half().npu()))
    refused("561002.*antiquant_offset has the shape", call(antiquant_offset=scale[:1].half().npu()))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("int4", [False, True])
@pytest.mark.parametrize("parts", [1, PARTS])
def test_groups_of_16_bit_rows(dtype: torch.dtype, int4: bool, parts: int) -> None:
    x = random_rows(ROWS + 1, INNER, dtype=dtype)
    weight = random_int4(GROUPS, INNER, WIDTH) if int4 else random_int8(GROUPS, INNER, WIDTH)
    shape = (GROUPS, WIDTH) if parts == 1 else (GROUPS, parts, WIDTH)
    scale, offset = positive(*shape, seed=2, dtype=dtype), random_int4(*shape, seed=3).to(dtype)
    [out] = grouped_matmul(
        [x],
        [packed(weight) if int4 else weight],
        antiquant_scale=[scale],
        antiquant_offset=[offset],
        group_list=group_list(1),
    )
    wanted = torch.cat(
        [
            rows.double() @ ((weight[g].float() + for_each_row(offset[g])) * for_each_row(scale[g])).to(dtype).double()
            for g, rows in enumerate(by_group(x))
        ]
    )
    torch.testing.assert_close(out[:ROWS].double(), wanted, rtol=1e-2, atol=1e-2)
    assert bool(out[ROWS:].isnan().all())


# --- int8 and int4 rows ---


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("transposed", [False, True])
def test_int4_product_with_a_scale_for_each_row(dtype: torch.dtype, transposed: bool) -> None:
    x, weight = random_int4(5, INNER), random_int4(INNER, WIDTH, seed=2)
    scale, rows = positive(WIDTH, seed=3), positive(5, seed=4)
    device_weight = packed(weight.t()).npu().t() if transposed else packed(weight).npu()
    out = npu.npu_quant_matmul(
        packed(x).npu(), device_weight, scale.npu(), pertoken_scale=rows.npu(), output_dtype=dtype
    )
    wanted = (x @ weight).float() * scale * rows[:, None]
    torch.testing.assert_close(out.cpu(), wanted.to(dtype))


def test_static_int8_product_with_a_packed_scale() -> None:
    """op-plugin packs a float scale for these outputs. Packing keeps 19 bits of it."""
    x, weight = random_int8(5, INNER), random_int8(INNER, WIDTH, seed=2)
    scale, offset = positive(WIDTH, seed=3) / 20, random_int4(WIDTH, seed=4).float()
    bias = random_int4(WIDTH, seed=5) * 100
    kept = (scale.view(torch.int32) & -0x2000).view(torch.float32)
    sums = (x.int() @ weight.int() + bias).float() * kept
    device = {"x1": x.npu(), "x2": weight.npu(), "bias": bias.npu()}
    half = npu.npu_quant_matmul(**device, scale=scale.npu(), output_dtype=torch.float16)
    torch.testing.assert_close(half.cpu(), sums.half())
    quantised = npu.npu_quant_matmul(**device, scale=scale.npu(), offset=offset.npu(), output_dtype=torch.int8)
    wanted = (sums + offset).round()
    assert int(wanted.abs().max()) > 127, "some values saturate"
    assert torch.equal(quantised.cpu(), wanted.clamp(-128, 127).to(torch.int8))
    by_hand = npu.npu_trans_quant_param(scale.npu(), offset.npu())
    assert torch.equal(by_hand.cpu() & 0xFFFFFFFF, scale_in_int64(kept))
    assert torch.equal(by_hand.cpu() >> 37, (1 << 9) | (offset.long() & 0x1FF))
    assert torch.equal(npu.npu_quant_matmul(**device, scale=by_hand, output_dtype=torch.int8).cpu(), quantised.cpu())


@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_rows_with_int4_weights(dtype: torch.dtype) -> None:
    x, weight = random_int8(5, INNER), random_int4(INNER, WIDTH, seed=2)
    scale, rows, offset = positive(PARTS, WIDTH, seed=3), positive(5, seed=4), random_rows(WIDTH, seed=5)
    arguments = (x.npu(), packed(weight).npu(), scale_in_int64(scale).npu())
    options = {"offset": offset.npu(), "pertoken_scale": rows.npu()[:, None], "output_dtype": dtype}
    out = npu.npu_quant_matmul(*arguments, **options, group_sizes=[0, 0, INNER // PARTS])
    wanted = (x.double() @ (weight * for_each_row(scale)).double() + offset.double()) * rows.double()[:, None]
    torch.testing.assert_close(out.cpu().double(), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("parts", [1, PARTS])
@pytest.mark.parametrize("stacked", [True, False])
def test_groups_of_int8_rows_with_int4_weights(dtype: torch.dtype, parts: int, stacked: bool) -> None:
    """With the bias that the document asks for, the result is that of the plain product."""
    x, weight = random_int8(ROWS + 2, INNER), random_int4(GROUPS, INNER, WIDTH, seed=2)
    scale, rows = positive(GROUPS, parts, WIDTH, seed=3), positive(ROWS + 2, seed=4)
    full = torch.stack([weight[g] * for_each_row(scale[g]) for g in range(GROUPS)])
    bias, scales = 8 * full.sum(1), scale_in_int64(scale)
    if parts == 1:
        scales = scales.squeeze(1)
    lists = [[packed(weight)], [bias], [scales]] if stacked else [list(packed(weight)), list(bias), list(scales)]
    weights, biases, scales_of_weights = lists
    [out] = grouped_matmul(
        [x],
        weights,
        bias=biases,
        scale=scales_of_weights,
        per_token_scale=[rows],
        group_list=group_list(1),
        output_dtype=dtype,
    )
    wanted = torch.cat([part.double() @ full[g].double() for g, part in enumerate(by_group(x))])
    wanted = wanted * rows[:ROWS, None].double()
    torch.testing.assert_close(out[:ROWS].double(), wanted, rtol=1e-2, atol=1e-2)
    assert bool(out[ROWS:].isnan().all())


@pytest.mark.parametrize("parts", [1, PARTS])
@pytest.mark.parametrize("per_token", [True, False])
def test_groups_of_int4_rows(parts: int, per_token: bool) -> None:
    x, weight = random_int4(ROWS, INNER), random_int4(GROUPS, INNER, WIDTH, seed=2)
    scale, rows = positive(GROUPS, parts, WIDTH, seed=3), positive(ROWS, seed=4)
    scales = scale_in_int64(scale) if parts > 1 else scale_in_int64(scale).squeeze(1)
    [out] = grouped_matmul(
        [packed(x)],
        [packed(weight)],
        scale=[scales],
        group_list=group_list(0),
        group_list_type=0,
        output_dtype=torch.bfloat16,
        **({"per_token_scale": [rows]} if per_token else {}),
    )
    wanted = torch.cat([part.float() @ (weight[g] * for_each_row(scale[g])) for g, part in enumerate(by_group(x))])
    torch.testing.assert_close(out, (wanted * rows[:, None] if per_token else wanted).bfloat16())


INT4 = {
    "x": [torch.ones(ROWS, INNER, dtype=torch.int8)],
    "weight": [torch.ones(GROUPS, INNER, WIDTH // 8, dtype=torch.int32)],
    "scale": [torch.ones(GROUPS, WIDTH, dtype=torch.int64)],
    "bias": [torch.ones(GROUPS, WIDTH)],
    "per_token_scale": [torch.ones(ROWS)],
    "group_list": group_list(1),
    "output_dtype": torch.float16,
}
HALF = {"x": [torch.ones(ROWS, INNER).half()], "weight": INT4["weight"], "group_list": group_list(1)}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (INT4 | {"scale": [torch.ones(GROUPS, WIDTH)]}, "161002.*scale is Float; it must be int64"),
        (INT4 | {"scale": [torch.ones(GROUPS, 3, WIDTH, dtype=torch.int64)]}, "561002.*cannot be divided into 3"),
        (INT4 | {"bias": None}, "161001.*need bias and per_token_scale"),
        (INT4 | {"act_type": 1}, "561002.*need group_type=0 and act_type=0"),
        (INT4 | {"x": [torch.ones(ROWS, INNER // 8, dtype=torch.int32)]}, "161002.*bias is given, but int4 rows"),
        (HALF, "161001.*antiquant_scale is missing"),
        (
            HALF | {"antiquant_scale": [torch.ones(GROUPS, WIDTH)]},
            "161002.*antiquant_scale and antiquant_offset is Float",
        ),
        (HALF | {"antiquant_scale": [torch.ones(GROUPS, 3).half()]}, "561002.*a group's antiquant_scale has the shape"),
    ],
)
def test_groups_with_int4_weights_are_refused_by_name(arguments: dict[str, Any], text: str) -> None:
    refused(text, lambda: grouped_matmul(**arguments))


# --- flat quantisation ---


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("clip_ratio", [1.0, 0.75])
def test_kronecker_quant(dtype: torch.dtype, clip_ratio: float) -> None:
    x, left, right = (
        random_rows(5, 6, 16, dtype=dtype),
        random_rows(6, 6, seed=2, dtype=dtype),
        random_rows(16, 16, seed=3),
    )
    right = right.to(dtype)
    values, scales = npu.npu_kronecker_quant(x.npu(), left.npu(), right.npu(), clip_ratio)
    product = (left.float() @ (x.float() @ right.float()).to(dtype).float()).to(dtype).float()
    wanted = product.abs().amax((1, 2)) / (7 / clip_ratio)
    torch.testing.assert_close(scales.cpu(), wanted, rtol=1e-2, atol=0)
    nibbles = (values.cpu()[..., None] >> (4 * torch.arange(8, dtype=torch.int32))) & 0xF
    got = torch.where(nibbles > 7, nibbles - 16, nibbles).view(5, 6, 16)
    exact = (product / scales.cpu()[:, None, None]).clamp(-8, 7)
    assert (got - exact).abs().max() < 0.51 + 8 * torch.finfo(dtype).eps * 8
    if clip_ratio < 1:
        assert (got == 7).any()
    refused("561002.*clip_ratio=2", lambda: npu.npu_kronecker_quant(x.npu(), left.npu(), right.npu(), 2.0))
