"""npu_grouped_matmul and npu_dynamic_quant, through op-plugin's own C++, against their documents in plain torch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.cases import seeded
from tests.emulated.references import random_rows

pytestmark = pytest.mark.emulated

npu = torch.ops.npu

GROUPS, INNER, WIDTH = 4, 32, 24
SIZES = [3, 0, 5, 2]
ROWS = sum(SIZES)


def random_int8(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(-128, 128, shape, generator=seeded(seed), dtype=torch.int8)


def to_npu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.npu()
    return [to_npu(each) for each in value] if isinstance(value, list) else value


def grouped_matmul(x: list[torch.Tensor], weight: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    arguments = {"split_item": 2, "group_type": 0, "group_list_type": 1} | options
    out = npu.npu_grouped_matmul(to_npu(x), to_npu(weight), **{name: to_npu(each) for name, each in arguments.items()})
    return [each.cpu() for each in out]


def group_list(kind: int, sizes: list[int] = SIZES) -> torch.Tensor:
    counts = torch.tensor(sizes, dtype=torch.int64)
    if kind == 2:
        return torch.stack([torch.arange(len(sizes)), counts], 1)
    return counts if kind == 1 else counts.cumsum(0)


def by_group(x: torch.Tensor, sizes: list[int] = SIZES) -> list[torch.Tensor]:
    return list(x[: sum(sizes)].split(sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("stacked", [True, False])
def test_rows_of_each_group_meet_their_weight(dtype: torch.dtype, kind: int, stacked: bool) -> None:
    x, weight = random_rows(ROWS + 3, INNER, dtype=dtype), random_rows(GROUPS, INNER, WIDTH, dtype=dtype, seed=2)
    weights = [weight] if stacked else list(weight)
    [out] = grouped_matmul([x], weights, group_list=group_list(kind), group_list_type=kind)
    wanted = torch.cat([(rows.float() @ weight[group].float()).to(dtype) for group, rows in enumerate(by_group(x))])
    assert out.dtype == dtype
    torch.testing.assert_close(out[:ROWS], wanted)
    assert bool(out[ROWS:].isnan().all()), "rows behind the last group are not written"


def test_key_value_groups_come_in_the_order_of_the_list() -> None:
    x, weight = random_rows(7, INNER), random_rows(GROUPS, INNER, WIDTH, seed=2)
    groups = torch.tensor([[2, 4], [0, 3], [1, 0], [3, 0]])
    [out] = grouped_matmul([x], [weight], group_list=groups, group_list_type=2)
    torch.testing.assert_close(out, torch.cat([x[:4] @ weight[2], x[4:] @ weight[0]]))


def test_transposed_weights() -> None:
    x, stored = random_rows(ROWS, INNER), random_rows(GROUPS, WIDTH, INNER, seed=2)
    weight = stored.npu().transpose(1, 2)
    [out] = npu.npu_grouped_matmul(
        [x.npu()], [weight], group_list=group_list(1).npu(), split_item=2, group_type=0, group_list_type=1
    )
    wanted = torch.cat([rows @ stored[group].t() for group, rows in enumerate(by_group(x))])
    torch.testing.assert_close(out.cpu(), wanted)


@pytest.mark.parametrize("stacked", [True, False])
def test_bias(stacked: bool) -> None:
    x, weight = (
        random_rows(ROWS, INNER, dtype=torch.bfloat16),
        random_rows(GROUPS, INNER, WIDTH, dtype=torch.bfloat16, seed=2),
    )
    bias = random_rows(GROUPS, WIDTH, seed=3)
    weights, biases = ([weight], [bias]) if stacked else (list(weight), list(bias))
    [out] = grouped_matmul([x], weights, bias=biases, group_list=group_list(1))
    wanted = torch.cat([rows.float() @ weight[g].float() + bias[g] for g, rows in enumerate(by_group(x))])
    torch.testing.assert_close(out, wanted.bfloat16())


@pytest.mark.parametrize(
    ("act_type", "activation"),
    [
        (1, F.relu),
        (2, lambda x: F.gelu(x, approximate="tanh")),
        (4, lambda x: x * torch.sigmoid(1.702 * x)),
        (5, F.silu),
    ],
)
def test_activations(act_type: int, activation: Any) -> None:
    x, weight = random_rows(ROWS, INNER), random_rows(GROUPS, INNER, WIDTH, seed=2)
    [out] = grouped_matmul([x], [weight], group_list=group_list(1), act_type=act_type)
    wanted = torch.cat([activation(rows @ weight[g]) for g, rows in enumerate(by_group(x))])
    torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize("split_item", [0, 1])
def test_one_output_for_each_group(split_item: int) -> None:
    x, weight = random_rows(ROWS, INNER), random_rows(GROUPS, INNER, WIDTH, seed=2)
    out = grouped_matmul([x], list(weight), group_list=group_list(0), group_list_type=0, split_item=split_item)
    assert [len(each) for each in out] == SIZES
    for each, rows, own in zip(out, by_group(x), weight, strict=True):
        torch.testing.assert_close(each, rows @ own)


def test_lists_of_matrices_without_groups() -> None:
    x = [random_rows(rows, INNER, seed=rows) for rows in (2, 5, 1)]
    weight = [random_rows(INNER, WIDTH, seed=10 + i) for i in range(3)]
    out = grouped_matmul(x, weight, split_item=0, group_type=-1, group_list_type=0)
    for each, rows, own in zip(out, x, weight, strict=True):
        torch.testing.assert_close(each, rows @ own)
    [joined] = grouped_matmul(x, weight, split_item=2, group_type=0, group_list_type=0)
    torch.testing.assert_close(joined, torch.cat([rows @ own for rows, own in zip(x, weight, strict=True)]))


def test_groups_of_the_inner_dimension() -> None:
    x, weight = random_rows(WIDTH, ROWS), random_rows(ROWS, 8, seed=2)
    [out] = grouped_matmul([x.t().contiguous().t()], [weight], group_list=group_list(1), split_item=3, group_type=2)
    wanted = [a @ b for a, b in zip(x.split(SIZES, 1), weight.split(SIZES), strict=True)]
    torch.testing.assert_close(out, torch.stack(wanted))


# --- int8 ---


def int8_sums(x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    return [rows.long() @ weight[group].long() for group, rows in enumerate(by_group(x))]


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_int8_is_scaled_to_floats(scale_dtype: torch.dtype, per_token: bool, with_bias: bool) -> None:
    output = torch.bfloat16 if scale_dtype is torch.bfloat16 else torch.float16
    x, weight = random_int8(ROWS + 2, INNER), random_int8(GROUPS, INNER, WIDTH, seed=2)
    scale = random_rows(GROUPS, WIDTH, seed=3).abs().mul(1e-2).to(scale_dtype)
    token_scale = random_rows(ROWS + 2, seed=4).abs() * 1e-1
    bias = torch.randint(-999, 999, (GROUPS, WIDTH), dtype=torch.int32, generator=seeded(5))
    options = {"per_token_scale": [token_scale]} if per_token else {}
    options |= {"bias": [bias]} if with_bias else {}
    [out] = grouped_matmul([x], [weight], scale=[scale], group_list=group_list(1), output_dtype=output, **options)
    parts = []
    for group, sums in enumerate(int8_sums(x, weight)):
        total = (sums + bias[group] if with_bias else sums).float() * scale[group].float()
        parts.append(total)
    wanted = torch.cat(parts)
    if per_token:
        wanted = wanted * token_scale[:ROWS, None]
    assert torch.equal(out[:ROWS], wanted.to(output))
    assert bool(out[ROWS:].isnan().all())


def test_int8_without_scale_gives_the_sums() -> None:
    x, weight = random_int8(ROWS, INNER), random_int8(GROUPS, INNER, WIDTH, seed=2)
    [out] = grouped_matmul([x], [weight], group_list=group_list(1), output_dtype=torch.int32)
    assert out.dtype == torch.int32
    assert torch.equal(out.long(), torch.cat(int8_sums(x, weight)))


# --- refusals ---

FLOATS = {"x": [torch.ones(ROWS, INNER)], "weight": [torch.ones(GROUPS, INNER, WIDTH)], "group_list": group_list(1)}
INT8 = FLOATS | {
    "x": [torch.ones(ROWS, INNER, dtype=torch.int8)],
    "weight": [torch.ones(GROUPS, INNER, WIDTH, dtype=torch.int8)],
    "scale": [torch.ones(GROUPS, WIDTH)],
    "output_dtype": torch.float16,
}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (FLOATS | {"offset": [torch.ones(WIDTH)]}, r"(?s)161002.*offset is given"),
        (FLOATS | {"antiquant_scale": [torch.ones(GROUPS, WIDTH)]}, r"(?s)161002.*antiquant_scale is given"),
        (FLOATS | {"antiquant_offset": [torch.ones(GROUPS, WIDTH)]}, r"(?s)161002.*antiquant_offset is given"),
        (FLOATS | {"activation_input": [torch.ones(ROWS, WIDTH)]}, r"(?s)161002.*activation_input is given"),
        (FLOATS | {"activation_quant_scale": [torch.ones(WIDTH)]}, r"(?s)161002.*activation_quant_scale is given"),
        (FLOATS | {"activation_quant_offset": [torch.ones(WIDTH)]}, r"(?s)161002.*activation_quant_offset is given"),
        (FLOATS | {"scale": [torch.ones(GROUPS, WIDTH)]}, r"(?s)161002.*scale is given, but only int8"),
        (FLOATS | {"per_token_scale": [torch.ones(ROWS)]}, r"(?s)161002.*per_token_scale is given, but only int8"),
        (FLOATS | {"act_type": 3}, r"(?s)561002.*act_type=3"),
        (FLOATS | {"group_list_type": 3}, r"(?s)561002.*group_list_type=3"),
        (FLOATS | {"group_list": group_list(1).int()}, r"(?s)161002.*group_list is Int"),
        (FLOATS | {"group_list": group_list(1)[:3]}, r"(?s)561002.*group_list has 3 entries and there are 4 weights"),
        (FLOATS | {"group_list": group_list(2)}, r"(?s)561002.*group_list has the shape"),
        (FLOATS | {"bias": [torch.ones(GROUPS, WIDTH + 1)]}, r"(?s)561002.*a group's bias has the shape"),
        (
            FLOATS | {"weight": [torch.ones(GROUPS, INNER, WIDTH, dtype=torch.int8)]},
            r"(?s)161002.*x is Float and weight",
        ),
        (FLOATS | {"weight": [torch.ones(GROUPS, INNER + 1, WIDTH)]}, r"(?s)561002.*x has the shape"),
        (FLOATS | {"output_dtype": torch.float16}, r"(?s)161002.*output_dtype is Half"),
        (INT8 | {"output_dtype": torch.int8}, r"(?s)161002.*output_dtype of an int8 product is Char"),
        (INT8 | {"scale": [torch.ones(GROUPS, WIDTH, dtype=torch.int64)]}, r"(?s)161002.*scale is Long"),
        (INT8 | {"scale": None, "output_dtype": torch.float16}, r"(?s)161002.*without scale is Half"),
        (INT8 | {"scale": None, "output_dtype": torch.int32, "act_type": 1}, r"(?s)561002.*act_type=1 needs scale"),
        (INT8 | {"scale": [torch.ones(GROUPS, 2)]}, r"(?s)561002.*a group's scale has the shape"),
        (INT8 | {"per_token_scale": [torch.ones(ROWS).half()]}, r"(?s)161002.*per_token_scale is Half"),
    ],
)
def test_refuses_by_name(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        grouped_matmul(**arguments)


def bad_group_lists(rank: int, num_ranks: int) -> None:
    del rank, num_ranks
    for values, kind, text in (
        ([3, 2, 8, 10], 0, "group_list must not fall with group_list_type=0: entry 1 is 2 after 3"),
        ([3, -1, 5, 2], 1, "group_list has the negative size -1 for group 1"),
        ([3, 0, 5, 3], 1, f"group_list adds up to 11 and x has {ROWS}"),
        ([3, 3, 8, 11], 0, f"group_list adds up to 11 and x has {ROWS}"),
        ([[0, 3], [9, 1]], 2, "group_list names group 9 of 4"),
    ):
        with pytest.raises(RuntimeError, match=rf"(?s)561002.*{text}"):
            grouped_matmul(**(FLOATS | {"group_list": torch.tensor(values), "group_list_type": kind}))


def test_refuses_bad_group_lists(run_in_ranks) -> None:
    run_in_ranks(bad_group_lists, 1)


# --- dynamic_quant ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("smooth", [False, True])
def test_dynamic_quant(dtype: torch.dtype, smooth: bool) -> None:
    x, factors = random_rows(2, 5, INNER, dtype=dtype), random_rows(INNER, seed=2).abs().to(dtype)
    values, scales = npu.npu_dynamic_quant(x.npu(), smooth_scales=factors.npu() if smooth else None)
    rows = x.float() * factors.float() if smooth else x.float()
    wanted = rows.abs().amax(-1) / 127
    assert torch.equal(scales.cpu(), wanted)
    assert torch.equal(values.cpu(), (rows / wanted[..., None]).round().to(torch.int8))


def test_dynamic_quant_with_a_smooth_row_for_each_group() -> None:
    x, factors = random_rows(ROWS, INNER, dtype=torch.float16), random_rows(GROUPS, INNER, seed=2).abs().half()
    ends = group_list(0).int()
    values, scales = npu.npu_dynamic_quant(x.npu(), smooth_scales=factors.npu(), group_index=ends.npu())
    rows = x.float() * torch.cat([factors[g].float().expand(size, -1) for g, size in enumerate(SIZES)])
    assert torch.equal(scales.cpu(), rows.abs().amax(-1) / 127)
    assert torch.equal(values.cpu(), (rows / scales.cpu()[:, None]).round().to(torch.int8))


def test_dynamic_quant_to_int4_packs_eight_in_an_int32() -> None:
    x = random_rows(3, INNER, dtype=torch.float16)
    packed, scales = npu.npu_dynamic_quant(x.npu(), dst_type=torch.quint4x2)
    wanted = (x.float() / (x.float().abs().amax(-1) / 7)[:, None]).round().int()
    nibbles = (packed.cpu()[..., None] >> (4 * torch.arange(8, dtype=torch.int32))) & 0xF
    assert torch.equal(torch.where(nibbles > 7, nibbles - 16, nibbles).view(3, INNER), wanted)
    assert torch.equal(scales.cpu(), x.float().abs().amax(-1) / 7)


def test_dynamic_quant_refuses_by_name() -> None:
    x = random_rows(4, INNER, dtype=torch.float16).npu()
    with pytest.raises(RuntimeError, match=r"(?s)161002.*input is Float"):
        npu.npu_dynamic_quant(x.float())
    with pytest.raises(RuntimeError, match=r"(?s)161002.*group_index is given, but smooth_scales is missing"):
        npu.npu_dynamic_quant(x, group_index=torch.ones(1, dtype=torch.int32).npu())
    with pytest.raises(RuntimeError, match=r"(?s)561002.*smooth_scales has the shape"):
        npu.npu_dynamic_quant(x, smooth_scales=x[0, :3])
    with pytest.raises(RuntimeError, match=r"(?s)161002.*asymmetric quantisation is not emulated"):
        npu.npu_dynamic_quant_asymmetric(x)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_quantize_with_given_scales(dtype: torch.dtype, axis: int) -> None:
    x = random_rows(5, INNER, dtype=dtype) * 40
    scales, offsets = (random_rows(x.shape[axis], seed=seed, dtype=dtype) * 9 for seed in (2, 3))
    values = npu.npu_quantize(x.npu(), scales.npu(), offsets.npu(), torch.qint8, axis, False)
    factors, shifts = ((each.float() if axis == -1 else each.float()[:, None]) for each in (scales, offsets))
    assert torch.equal(values.cpu(), (x.float() * factors + shifts).round().clamp(-128, 127).to(torch.int8))
    assert (values.cpu() == 127).any()


def test_quantize_refuses_by_name() -> None:
    x = random_rows(4, INNER, dtype=torch.float16).npu()
    with pytest.raises(RuntimeError, match=r"(?s)161002.*scale is Float"):
        npu.npu_quantize(x, x[0].float(), None, torch.qint8, -1, False)
    with pytest.raises(RuntimeError, match=r"(?s)561002.*scale has the shape"):
        npu.npu_quantize(x, x[0, :3], None, torch.qint8, -1, False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_swiglu(dtype: torch.dtype) -> None:
    x = random_rows(5, 2 * INNER, dtype=dtype)
    left, right = x.float().chunk(2, -1)
    torch.testing.assert_close(npu.npu_swiglu(x.npu()).cpu(), (F.silu(left) * right).to(dtype))
