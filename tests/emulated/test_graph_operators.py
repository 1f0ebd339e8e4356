"""Operators that op-plugin runs as graph operators (aclop), against their definitions in plain torch."""

import pytest
import torch
import torch_npu

pytestmark = pytest.mark.emulated

X = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_activations(dtype: torch.dtype) -> None:
    x = X.to(dtype)
    wide = x.float()
    assert torch.equal(torch_npu.fast_gelu(x.npu()).cpu(), (wide * torch.sigmoid(wide * 1.702)).to(dtype))
    assert torch.allclose(torch_npu.npu_silu(x.npu()).cpu().float(), (wide * torch.sigmoid(wide)).to(dtype).float())
    in_place = x.npu()
    torch_npu.npu_silu_(in_place)
    assert torch.allclose(in_place.cpu().float(), (wide * torch.sigmoid(wide)).to(dtype).float())


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_extremes_with_their_indices(dim: int, keepdim: bool) -> None:
    for ours, plain in ((torch_npu.npu_max, torch.max), (torch_npu.npu_min, torch.min)):
        values, indices = ours(X.npu(), dim, keepdim)
        expected = plain(X, dim, keepdim)
        assert torch.equal(values.cpu(), expected.values)
        assert torch.equal(indices.cpu().long(), expected.indices)
        assert indices.dtype == torch.int32


def call_one_that_is_not_emulated(rank: int, num_ranks: int) -> None:
    x = X.npu()
    outputs = x, x.clone(), x.clone()
    with pytest.raises(RuntimeError, match="operator ApplyAdamV2 has no aclnn kernel in the emulator"):  # noqa: PT012
        torch_npu.npu_bert_apply_adam(0.1, 0.9, 0.99, 1e-8, x, 1.0, 0.0, 0.0, out=outputs)
        torch.npu.synchronize()  # the queue's thread meets the error, before or after the call returns


def test_one_that_is_not_emulated_is_named(run_in_ranks) -> None:
    run_in_ranks(call_one_that_is_not_emulated, 1, env={"TASK_QUEUE_ENABLE": "1"})
