"""Operators of LoRA adapters on a CPU, against each row alone in float64. vLLM's own need an adapter for every row."""

from collections.abc import Callable

import pytest
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from vllm_npu.plugin.cpu.adapters import CpuAdapters

RANK, WIDTH, SLOTS = 4, 16, 2
TOKENS = (1, 1, 0, 2, 2, 0)  # the adapter of each token; 0: none
SAMPLES = (1, 0, 2, 0)


def operators(kind: type[PunicaWrapperCPU], is_prefill: bool) -> PunicaWrapperCPU:
    """The operators in a step with the rows TOKENS and SAMPLES, with the adapter 1 in the slot 1 and 2 in the slot 0."""
    made = kind(max_num_batched_tokens=16, max_batches=8, device="cpu")
    made.update_metadata(LoRAMapping(TOKENS, SAMPLES, is_prefill), [2, 1], SLOTS, vocab_size=32)
    return made


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def linear(kind: type[PunicaWrapperCPU], is_prefill: bool) -> tuple[torch.Tensor, torch.Tensor]:
    first, second, x = drawn(SLOTS, 1, RANK, WIDTH), drawn(SLOTS, 1, WIDTH, RANK), drawn(len(TOKENS), WIDTH)
    y = torch.zeros(len(TOKENS), WIDTH)
    operators(kind, is_prefill).add_lora_linear(y, x, (first,), (second,), 0.5, (WIDTH,))
    return y, by_row(x, TOKENS, 0.5 * (second.double() @ first.double()))


def embedding(kind: type[PunicaWrapperCPU], is_prefill: bool) -> tuple[torch.Tensor, torch.Tensor]:
    second, x, y = drawn(SLOTS, 1, WIDTH, RANK), drawn(len(TOKENS), RANK), torch.zeros(len(TOKENS), WIDTH)
    operators(kind, is_prefill).add_lora_embedding(y, x, second)
    return y, by_row(x, TOKENS, second.double())


def logits(kind: type[PunicaWrapperCPU], is_prefill: bool) -> tuple[torch.Tensor, torch.Tensor]:
    first, second, x = drawn(SLOTS, 1, RANK, WIDTH), drawn(SLOTS, 1, WIDTH, RANK), drawn(len(SAMPLES), WIDTH)
    y = torch.zeros(len(SAMPLES), WIDTH)
    operators(kind, is_prefill).add_lora_logits(y, x, first, second, 0.5)
    return y, by_row(x, SAMPLES, 0.5 * (second.double() @ first.double()))


def by_row(x: torch.Tensor, adapters: tuple[int, ...], matrices: torch.Tensor) -> torch.Tensor:
    """Each row by the matrix of its adapter, [SLOTS, 1, outputs, inputs]. Zeros without one."""
    rows = [
        matrices[2 - adapter, 0] @ row.double() if adapter else matrices.new_zeros(matrices.shape[2])
        for row, adapter in zip(x, adapters, strict=True)
    ]
    return torch.stack(rows)


Operator = Callable[[type[PunicaWrapperCPU], bool], tuple[torch.Tensor, torch.Tensor]]


@pytest.mark.parametrize("is_prefill", [True, False])
@pytest.mark.parametrize("operator", [linear, embedding, logits])
def test_rows_without_an_adapter_stay_as_they_are(operator: Operator, is_prefill: bool) -> None:
    got, expected = operator(CpuAdapters, is_prefill)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operator", [linear, embedding, logits])
def test_vllms_own_operators_need_ours(operator: Operator) -> None:
    """CpuAdapters can go when this test fails."""
    got, expected = operator(PunicaWrapperCPU, True)
    assert not torch.allclose(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_platform_names_them() -> None:
    assert resolve_obj_by_qualname(current_platform.get_punica_wrapper()) is CpuAdapters
