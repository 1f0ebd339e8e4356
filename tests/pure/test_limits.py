"""limits: each number of the tables refuses the next value, and the buffers are those of the published cases."""

from dataclasses import replace

import pytest
import torch

from vllm_npu.core.limits import (
    A2_FULL_MESH,
    A2_HIERARCHY,
    A2_VERSION_1,
    A3_FULL_MESH,
    A3_FULL_MESH_V2,
    A3_HIERARCHY,
    A3_VERSION_1,
    DEVICES,
    PORTABLE_MC2,
    MoELayer,
)

LAYER = MoELayer(num_experts=256, top_k=8, hidden_size=7168, dtype=torch.bfloat16)
NATIVE = [A2_FULL_MESH, A2_HIERARCHY, A2_VERSION_1, A3_FULL_MESH, A3_FULL_MESH_V2, A3_HIERARCHY, A3_VERSION_1]


def test_the_portable_ops_take_any_layer():
    for layer in (LAYER, replace(LAYER, num_experts=5000, top_k=64, hidden_size=3, dtype=torch.float32)):
        assert PORTABLE_MC2.why_not(layer, 5) is None
    assert PORTABLE_MC2.buffer_mb(LAYER, 16, 512) is None


@pytest.mark.parametrize("limits", NATIVE, ids=lambda limits: limits.name)
def test_a_usual_layer_is_taken(limits):
    assert limits.why_not(LAYER, 16) is None
    assert limits.why_not(replace(LAYER, dtype=torch.float16), 32) is None


@pytest.mark.parametrize(
    ("limits", "changes", "ep_size", "reason"),
    [
        (A2_FULL_MESH, {}, 9, "takes ep_size 2 to 8, 16, 32, 64, 128, 256, not 9"),
        (A2_FULL_MESH, {}, 8, "takes at most 24 experts a rank, not 32"),
        (A2_FULL_MESH, {"hidden_size": 7200}, 16, "takes hidden_size 32 to 7168 in steps of 32, not 7200"),
        (A2_FULL_MESH, {"hidden_size": 48}, 16, "takes hidden_size 32 to 7168 in steps of 32, not 48"),
        (A2_FULL_MESH, {"dtype": torch.float32}, 16, "takes bfloat16 and float16, hidden_states are float32"),
        (A2_HIERARCHY, {}, 128, "takes ep_size 16, 32, 64, not 128"),
        (A3_FULL_MESH, {}, 1, "takes ep_size 2 to 768, not 1"),
        (A3_FULL_MESH, {"hidden_size": 1023}, 16, "takes hidden_size 1024 to 8192, not 1023"),
        (A3_HIERARCHY, {}, 24, "takes ep_size 16 to 256 in steps of 16, not 24"),
        (A2_VERSION_1, {}, 128, "takes ep_size 16, 32, 64, not 128"),
        (A3_VERSION_1, {}, 24, "takes ep_size 8, 16, 32, 64, 128, 144, 256, 288, not 24"),
        (A3_VERSION_1, {"hidden_size": 7136}, 16, "takes hidden_size 7168, not 7136"),
        (A3_VERSION_1, {"top_k": 9}, 16, "takes at most 8 experts a token, not 9"),
        (A3_HIERARCHY, {"num_experts": 1024}, 32, "takes at most 512 experts, not 1024"),
        (A3_HIERARCHY, {"num_experts": 400}, 16, "takes at most 24 experts a rank, not 25"),
        (A3_HIERARCHY, {"hidden_size": 7200}, 16, "takes hidden_size 1024 to 7168 in steps of 32, not 7200"),
        (A3_FULL_MESH_V2, {"hidden_size": 8224}, 16, "takes hidden_size 1024 to 8192, not 8224"),
    ],
)
def test_the_first_limit_that_is_broken_is_named(limits, changes, ep_size, reason):
    assert limits.why_not(replace(LAYER, **changes), ep_size) == f"{limits.name} {reason}"


@pytest.mark.parametrize(
    ("limits", "field", "most", "what"),
    [
        (A2_FULL_MESH, "num_experts", 512, "experts"),
        (A2_FULL_MESH, "top_k", 16, "experts a token"),
        (A2_HIERARCHY, "num_experts", 512, "experts"),
        (A2_HIERARCHY, "top_k", 16, "experts a token"),
        (A3_FULL_MESH, "num_experts", 1024, "experts"),
        (A3_FULL_MESH, "top_k", 16, "experts a token"),
        (A3_FULL_MESH_V2, "num_experts", 1024, "experts"),
        (A3_FULL_MESH_V2, "top_k", 12, "experts a token"),
        (A3_HIERARCHY, "num_experts", 512, "experts"),
        (A3_HIERARCHY, "top_k", 16, "experts a token"),
    ],
)
def test_the_most_is_taken_and_one_more_is_not(limits, field, most, what):
    assert limits.why_not(replace(LAYER, **{field: most}), 64) is None
    reason = f"{limits.name} takes at most {most} {what}, not {most + 1}"
    assert limits.why_not(replace(LAYER, **{field: most + 1}), 64) == reason


def test_the_experts_of_a_rank_that_the_full_mesh_of_a2_takes():
    assert A2_FULL_MESH.why_not(replace(LAYER, num_experts=24 * 16), 16) is None
    assert A2_FULL_MESH.why_not(replace(LAYER, num_experts=24 * 16 + 1), 16) is not None


# 33 tokens of a rank, 6 experts a token, 256 experts on 16 ranks, rows of 14336 bytes; by hand from the documents.
@pytest.mark.parametrize(
    ("limits", "num_bytes"),
    [
        (A2_FULL_MESH, 2 * (33 * 16 * 6 * 14336 + 2 * 2**20)),
        (A2_HIERARCHY, (256 + 4) * 933 * 512 + 8 * 2**20),  # 933 * 512 holds 33 * (14336 + 16 * 8)
        (A3_FULL_MESH, 2 * 33 * (16 * 16 * 14848 + 6 * 14336)),  # 14848 = 29 * 512 holds 14336 + 64
        (A3_FULL_MESH_V2, 2 * 33 * (16 * 16 * 15360 + 6 * 14336)),  # 30 blocks of 480 bytes hold 14336 + 64
        (A3_HIERARCHY, 256 * 33 * (14336 + 12 * 8 + 64) + 404 * 2**20),
    ],
)
def test_buffers_to_the_byte(limits, num_bytes):
    layer = replace(LAYER, top_k=6)
    assert limits.buffer_bytes(layer, 16, 33) == num_bytes


def test_buffers_of_the_published_cases():
    # The report of a refused start on A3 asked for a buffer above 608; op-plugin's example for A2 computes 900.
    a3 = MoELayer(num_experts=128, top_k=8, hidden_size=2048, dtype=torch.bfloat16)
    assert A3_FULL_MESH.buffer_mb(a3, 2, 512) == 608
    assert A2_FULL_MESH.buffer_mb(LAYER, 16, 256) == 900
    # By hand: 2 MiB and 2 * 128 rows of 2 * (7168 + 128) bytes for each of 8 * 8 + 8 + 1 slots.
    assert A3_VERSION_1.buffer_mb(replace(LAYER, num_experts=64), 8, 128) == 263


def test_version_1_of_the_ops_stands_in_where_torch_npu_has_no_other():
    for family, limits in DEVICES.items():
        assert limits.of_version(2) is limits
        assert limits.of_version(1).mc2 is {"A2": A2_VERSION_1, "A3": A3_VERSION_1}.get(family)
        assert limits.of_version(1).mc2_hierarchy is limits.of_version(0).mc2 is None


@pytest.mark.parametrize("limits", NATIVE, ids=lambda limits: limits.name)
def test_a_buffer_grows_with_tokens_width_and_experts(limits):
    sizes = [
        limits.buffer_mb(layer, 16, tokens)
        for layer, tokens in (
            (replace(LAYER, num_experts=64, top_k=4, hidden_size=1024), 64),
            (replace(LAYER, num_experts=64, top_k=4, hidden_size=1024), 256),
            (replace(LAYER, num_experts=64, top_k=4), 256),
            (LAYER, 256),
        )
    ]
    assert sizes == sorted(set(sizes))
