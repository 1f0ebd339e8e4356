"""Rotary embeddings of vLLM on a CPU where heads are parts of wider ones, as in latent attention, against complex numbers."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding, get_rope
from vllm.plugins import load_general_plugins

from vllm_npu.plugin.compat import v0_32

TOKENS, HEADS, WIDTH, THETA = 5, 4, 64, 10000.0


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


def rope(neox_style: bool) -> Any:
    scaling = {"rope_type": "default", "rope_theta": THETA}
    made: Any = get_rope(WIDTH, 128, is_neox_style=neox_style, rope_parameters=scaling, dtype=torch.float32)
    return made


def parts_of_heads() -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys as DeepSeek's attention has them: the last 64 numbers of wider rows."""
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(TOKENS, HEADS, 128 + WIDTH, generator=generator)[..., 128:]
    return queries, torch.randn(TOKENS, 1, 512 + WIDTH, generator=generator)[..., 512:]


def turned(rows: torch.Tensor, positions: torch.Tensor, neox_style: bool) -> torch.Tensor:
    """Each pair of numbers as a complex one, turned by its position. A pair is (i, i + 32), or two neighbours."""
    pairs = (
        rows.double().unflatten(-1, (2, -1)).transpose(-1, -2) if neox_style else rows.double().unflatten(-1, (-1, 2))
    )
    angles = positions.double().unsqueeze(1) * THETA ** -(torch.arange(0, WIDTH, 2).double() / WIDTH)
    product = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    result = torch.view_as_real(product)
    return (result.transpose(-1, -2) if neox_style else result).flatten(-2)


Rotation = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def distance(rotation: Rotation, neox_style: bool) -> float:
    """The largest difference of `rotation` from the complex numbers."""
    positions = torch.arange(3, 3 + TOKENS)
    queries, keys = parts_of_heads()
    expected = turned(queries, positions, neox_style), turned(keys, positions, neox_style)
    got = rotation(rope(neox_style), positions, queries, keys)
    return max(float((one - other).abs().max()) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("neox_style", [True, False])
def test_parts_of_wider_heads_are_turned_by_their_positions(neox_style: bool) -> None:
    assert distance(v0_32.rotate, neox_style) < 1e-5


def test_every_layer_calls_ours() -> None:
    load_general_plugins()
    assert RotaryEmbedding.forward_cpu is v0_32.rotate


@pytest.mark.parametrize("neox_style", [True, False])
def test_vllms_own_kernel_needs_our_help(neox_style: bool) -> None:
    """mend_rotary_embeddings can go when this test fails."""
    assert distance(v0_32.vllms_rotation, neox_style) > 0.1
