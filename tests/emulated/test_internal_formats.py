"""Tensors in the formats that only an NPU has: the format, the size of the storage and the values."""

import pytest
import torch
import torch_npu

pytestmark = pytest.mark.emulated

Format = torch_npu.Format


@pytest.fixture(autouse=True)
def internal_formats():
    torch_npu.npu.config.allow_internal_format = True
    yield
    torch_npu.npu.config.allow_internal_format = False


@pytest.mark.parametrize(
    ("sizes", "dtype", "internal", "stored"),
    [
        ((3, 5), torch.float32, Format.FRACTAL_NZ, 16 * 16),
        ((2, 17, 33), torch.float16, Format.FRACTAL_NZ, 2 * 3 * 2 * 16 * 16),
        ((20, 40), torch.int8, Format.FRACTAL_NZ, 2 * 2 * 16 * 32),
        ((2, 3, 4, 5), torch.float16, Format.NC1HWC0, 2 * 1 * 4 * 5 * 16),
        ((2, 3, 4, 5), torch.float16, Format.FRACTAL_Z, 1 * 4 * 5 * 1 * 16 * 16),
        ((2, 3, 2, 4, 5), torch.float16, Format.NDC1HWC0, 2 * 2 * 1 * 4 * 5 * 16),
    ],
)
def test_a_cast_there_and_back_keeps_the_values(sizes, dtype, internal, stored):
    values = (torch.arange(torch.Size(sizes).numel()) % 100).view(sizes).to(dtype)
    plain = values.npu()
    base = torch_npu.get_npu_format(plain)
    cast = torch_npu.npu_format_cast(plain, internal)
    assert torch_npu.get_npu_format(cast) == internal
    assert torch_npu.get_storage_size(cast) == stored
    assert torch.equal(cast.cpu(), values)
    assert torch.equal((cast + 1).cpu(), values + 1)
    back = torch_npu.npu_format_cast(cast, base)
    assert torch_npu.get_npu_format(back) == base
    assert torch.equal(back.cpu(), values)
    assert torch_npu.get_npu_format(plain) == base != internal
    torch_npu.npu_format_cast_(plain, internal)
    assert torch_npu.get_npu_format(plain) == internal
    assert torch.equal(plain.cpu(), values)
