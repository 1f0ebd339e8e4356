"""Random combinations of the arguments that A2 and A3 honour together, against golden.py. test_documented_arguments.py has each
argument alone; a fault may need two."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.emulated import golden
from tests.emulated.references import distinct_ids, random_rows

pytestmark = pytest.mark.emulated

COMBINATIONS = 60  # of each operator and chip
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Arguments = dict[str, Any]


def positive(*shape: int, seed: int) -> torch.Tensor:
    return random_rows(*shape, seed=seed).abs() + 0.5


def init_routing(pick: random.Random, seed: int) -> Arguments:
    tokens, experts, width = pick.randint(1, 40), pick.choice([4, 8, 33]), pick.choice([8, 33, 128])
    top_k = pick.randint(1, 4)
    arguments: Arguments = {
        "expert_idx": distinct_ids(tokens, top_k, experts, seed),
        "expert_num": experts,
        "expert_tokens_num_flag": pick.random() < 0.8,
        "quant_mode": pick.choice([-1, 0, 1]),
    }
    first, end = 0, experts
    if pick.random() < 0.4:
        arguments |= {
            "active_expert_range": [0, experts],  # without one, torch_npu keeps that of the process's first call
            "drop_pad_mode": 1,
            "expert_capacity": pick.randint(1, tokens),
            "expert_tokens_num_type": 1,
        }
    else:
        first, end = sorted(pick.sample(range(experts + 1), 2))
        arguments |= {
            "active_expert_range": [first, end],
            "active_num": pick.choice([-1, 0, pick.randint(1, tokens * top_k)]),
            "expert_tokens_num_type": pick.choice([0, 1, 2]),
            "row_idx_type": pick.choice([0, 1]),
        }
    dtype = pick.choice([*FLOATS, torch.int8]) if arguments["quant_mode"] == -1 else pick.choice(FLOATS)
    arguments["x"] = random_rows(tokens, width, seed=seed).mul(20).to(dtype)
    if arguments["quant_mode"] == -1 and pick.random() < 0.5:
        arguments["scale"] = positive(tokens, seed=seed)
    elif arguments["quant_mode"] == 0:
        arguments |= {"scale": torch.tensor([1.7]), "offset": torch.tensor([3.3])}
    elif arguments["quant_mode"] == 1 and pick.random() < 0.6:
        arguments["scale"] = positive(pick.choice([1, end - first]), width, seed=seed)
    return arguments


def finalize_routing(pick: random.Random, seed: int) -> Arguments:
    tokens, width, top_k, experts = pick.randint(1, 30), pick.choice([8, 33, 128]), pick.randint(1, 6), 6
    mode, dtype = pick.randint(0, 3), pick.choice(FLOATS)
    generator = torch.Generator().manual_seed(seed)
    has_capacity = mode in (1, 3)
    rows = (experts, tokens, width) if has_capacity else (tokens * top_k, width)
    num_rows = experts * tokens if has_capacity else tokens * top_k
    index = torch.randperm(num_rows, generator=generator)[: tokens * top_k].int()
    if has_capacity:
        index[torch.rand(len(index), generator=generator) < 0.3] = -1
    skips, with_bias = pick.randint(0, 2), pick.random() < 0.5
    scale_type = pick.choice([dtype, torch.float32]) if dtype == torch.bfloat16 else dtype
    return {
        "expanded_permuted_rows": random_rows(*rows, dtype=dtype, seed=seed),
        "skip1": random_rows(tokens, width, dtype=dtype, seed=seed + 1) if skips > 0 else None,
        "skip2": random_rows(tokens, width, dtype=dtype, seed=seed + 2) if skips > 1 else None,
        "bias": random_rows(experts, width, dtype=dtype, seed=seed + 3) if with_bias else None,
        "scales": random_rows(tokens, top_k, dtype=scale_type, seed=seed + 4),
        "expanded_src_to_dst_row": index,
        "export_for_source_row": distinct_ids(tokens, top_k, experts, seed) if with_bias else None,
        "drop_pad_mode": mode,
    }


def re_routing(pick: random.Random, seed: int) -> Arguments:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 5, (pick.randint(1, 5), pick.randint(1, 7)), generator=generator)
    rows = int(counts.sum()) + pick.choice([0, 3])
    arguments: Arguments = {
        "tokens": random_rows(max(rows, 1), 33, seed=seed).mul(20).to(pick.choice([*FLOATS[1:], torch.int8])),
        "expert_token_num_per_rank": counts.to(pick.choice([torch.int32, torch.int64])),
    }
    if pick.random() < 0.5:
        arguments["per_token_scales"] = positive(max(rows, 1), seed=seed)
    return arguments


def gating_top_k(pick: random.Random, seed: int) -> Arguments:
    groups, size = pick.choice([1, 2, 4, 8]), pick.choice([4, 8, 32])
    experts, k_group = groups * size, pick.randint(1, groups)
    arguments: Arguments = {
        "x": random_rows(pick.randint(1, 9), experts, seed=seed),
        "k": pick.randint(1, min(k_group * size, 16)),
        "k_group": k_group,
        "group_count": groups,
        "group_select_mode": pick.choice([0, 1]),
        "norm_type": pick.choice([0, 1]),
        "out_flag": pick.random() < 0.5,
        "routed_scaling_factor": pick.choice([1.0, 2.5]),
    }
    if pick.random() < 0.5:
        arguments["bias"] = random_rows(experts, seed=seed + 1)
    return arguments


def gating_top_k_softmax(pick: random.Random, seed: int) -> Arguments:
    tokens, experts = pick.randint(1, 9), pick.choice([4, 8, 160])
    arguments: Arguments = {"x": random_rows(tokens, experts, seed=seed), "k": pick.randint(1, 4)}
    if pick.random() < 0.5:
        arguments["finished"] = random_rows(tokens, seed=seed) > 0
    return arguments


def gating_top_k_softmax_v2(pick: random.Random, seed: int) -> Arguments:
    more = {"renorm": pick.choice([0, 1]), "output_softmax": pick.random() < 0.5}
    return gating_top_k_softmax(pick, seed) | more


DRAWN: dict[str, Callable[[random.Random, int], Arguments]] = {
    "npu_moe_init_routing_v2": init_routing,
    "npu_moe_finalize_routing": finalize_routing,
    "npu_moe_re_routing": re_routing,
    "npu_moe_gating_top_k": gating_top_k,
    "npu_moe_gating_top_k_softmax": gating_top_k_softmax,
    "npu_moe_gating_top_k_softmax_v2": gating_top_k_softmax_v2,
}


def rounded_sums(output: torch.Tensor, arguments: Arguments) -> dict[str, float]:
    """The kernel adds float16 in float16: a rounding for each addend. Sums of the other types are in float32."""
    if output.dtype != torch.float16:
        return {}
    return {"relative": (arguments["scales"].shape[1] + 2) * torch.finfo(torch.float16).eps}


def differences(rank: int, num_ranks: int) -> list[str]:
    """What is not as golden.py has it."""
    del rank, num_ranks
    found = []
    for name, draw in DRAWN.items():
        for seed in range(COMBINATIONS):
            arguments = draw(random.Random(f"{name} {seed}"), seed)
            given = {key: value.npu() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
            shown = {
                key: f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else value
                for key, value in arguments.items()
            }
            try:
                returned = getattr(torch.ops.npu, name)(**given)
            except RuntimeError as error:
                found.append(f"{name} {shown}: {str(error)[:600]}")
                continue
            outputs = (returned,) if isinstance(returned, torch.Tensor) else returned
            wanted = golden.SINGLE[name](**arguments)
            relative = {} if name != "npu_moe_finalize_routing" else rounded_sums(outputs[0], arguments)
            for place, (output, right) in enumerate(zip(outputs, wanted, strict=True)):
                if (different := golden.difference(output, right, **relative)) is not None:
                    found.append(f"{name} {shown}: output {place} {different}")
    return found


@pytest.mark.parametrize("chip", ["A2", "A3"])
def test_combinations_give_what_the_documents_say(chip: str, run_in_ranks: Callable[..., Any]) -> None:
    [found] = run_in_ranks(differences, 1, soc=chip, env={"VLLM_NPU_EMULATOR_LIMITS": "none"}).returned
    assert not found, "\n".join(found)
