"""What only an NPU can tell: MC2's real need of HCCL's buffer, the error of sums over experts, our layers beside vllm-ascend's.

    python -m vllm_npu.tools.hardware_checks buffers|sums|compare [--ranks N]

Prints JSON lines. scripts/on_hardware.sh runs all three. Without CANN they run on the emulated Ascend device, where they show
that the checks work, and nothing about an NPU.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vllm_npu.child_processes import changed_environment
from vllm_npu.core.limits import MoELayer
from vllm_npu.envs import HCCL_BUFFSIZE
from vllm_npu.errors import VllmNpuError
from vllm_npu.tools.launch import Rank
from vllm_npu.tools.rank_pools import open_rank_pool
from vllm_npu.tools.verification import limits_of_device

# The layers and steps whose buffer is looked for. Hidden size 7168 with 8 experts a token is DeepSeek-V3's.
BUFFER_LAYERS = (
    (MoELayer(num_experts=32, top_k=8, hidden_size=7168, dtype=torch.bfloat16), 64),
    (MoELayer(num_experts=32, top_k=4, hidden_size=2048, dtype=torch.bfloat16), 256),
)
SUM_TOKENS, SUM_TOP_K, SUM_HIDDEN = 512, 8, 4096
SUM_ROUNDS = 20
COMPARED_TOKENS = 8  # that each prompt generates


def buffers(ranks: int) -> Iterator[dict[str, Any]]:
    """The smallest HCCL_BUFFSIZE (MiB) with which MC2's dispatch and combine give the right sums, beside the formula's.

    Each size is tried by ranks of its own, because HCCL reads the variable once. The search halves what is below.
    """
    with open_rank_pool("hccl", ranks) as (pool, device):
        limits = pool.run(limits_of_device)[0]
    for layer, tokens in BUFFER_LAYERS:
        row = {"device": device, "ranks": ranks, "tokens": tokens, "layer": str(layer)}
        mc2 = limits.for_layer(layer, ranks).mc2
        why_not = "the chip has no MC2 op" if mc2 is None else mc2.why_not(layer, ranks)
        formula = None if mc2 is None or why_not is not None else mc2.buffer_mb(layer, ranks, tokens)
        if formula is None:
            yield row | {"not_legal": why_not or "the op needs no buffer"}
            continue
        tried: dict[int, str | None] = {formula: _try_buffer(ranks, layer, tokens, formula)}
        works, fails = (formula, 0) if tried[formula] is None else (0, formula)
        while works - fails > 1:
            size = (works + fails) // 2
            tried[size] = _try_buffer(ranks, layer, tokens, size)
            works, fails = (size, fails) if tried[size] is None else (works, size)
        yield row | {"formula_mb": formula, "smallest_mb": works or None, "errors": {fails: tried.get(fails)}}


def _try_buffer(ranks: int, layer: MoELayer, tokens: int, size_mb: int) -> str | None:
    """Run one step with this size. Returns the error, or None if the sums are right."""
    with changed_environment({HCCL_BUFFSIZE.name: str(size_mb)}):
        try:
            with open_rank_pool("hccl", ranks) as (pool, _):
                worst = max(pool.run(_dispatch_and_combine, layer, tokens))
        except (VllmNpuError, RuntimeError) as error:  # torch_npu reports an error of an op as RuntimeError
            return " ".join(str(error).split())[:500]
    return None if worst < 0.05 else f"the sums are wrong by {worst:.3g}"


def _dispatch_and_combine(rank: Rank, layer: MoELayer, tokens: int) -> float:
    """Send rows to their experts and back, unchanged. The largest error of the weighted sums. COLLECTIVE."""
    from vllm_npu.device import ops_of

    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    generator = torch.Generator().manual_seed(rank.rank)
    x = torch.randn(tokens, layer.hidden_size, generator=generator).to(layer.dtype).to(rank.device)
    # Every rank sends all tokens to the experts of rank 0, so that the fullest window is full.
    ids = torch.arange(layer.top_k, dtype=torch.int32).repeat(tokens, 1).to(rank.device)
    weights = torch.full((tokens, layer.top_k), 1 / layer.top_k, device=rank.device)
    ops = ops_of(x)
    sent = ops.distribute_dispatch(x, ids, group_ep=ep, moe_expert_num=layer.num_experts, expert_scales=weights)
    back = ops.distribute_combine(
        sent.expand_x,
        ids,
        sent.combine_index,
        sent.ep_recv_counts,
        weights,
        group_ep=ep,
        moe_expert_num=layer.num_experts,
        expand_scales=sent.expand_scales,
        comm_alg=sent.comm_alg,
    )
    return float((back.float() - x.float()).abs().max())


def sums() -> Iterator[dict[str, Any]]:
    """The error against float64 and the time of the two ops that add up the experts' rows of a token."""
    with open_rank_pool("hccl", 1) as (pool, device):
        for dtype in (torch.float16, torch.bfloat16):
            for row in pool.run(_sums_of, dtype)[0]:
                yield {"device": device, "dtype": str(dtype), **row}


def _sums_of(rank: Rank, dtype: torch.dtype) -> list[dict[str, Any]]:
    import torch_npu

    generator = torch.Generator().manual_seed(0)
    pairs = SUM_TOKENS * SUM_TOP_K
    rows = torch.randn(pairs, SUM_HIDDEN, generator=generator).to(dtype)
    weights = torch.rand(SUM_TOKENS, SUM_TOP_K, generator=generator)
    row_of_pair = torch.randperm(pairs, generator=generator).int()
    exact = (rows.double()[row_of_pair.long()].view(SUM_TOKENS, SUM_TOP_K, -1) * weights.double().unsqueeze(-1)).sum(1)
    on_device, index = rows.to(rank.device), row_of_pair.to(rank.device)
    full, rounded = weights.to(rank.device), weights.to(dtype).to(rank.device)
    ids = torch.zeros(SUM_TOKENS, SUM_TOP_K, dtype=torch.int32, device=rank.device)
    # finalize_routing takes the rows of all tokens' first choice, then those of their second one.
    by_choice = row_of_pair.view(SUM_TOKENS, SUM_TOP_K).t().reshape(-1).contiguous().to(rank.device)
    ways = {
        "npu_moe_token_unpermute, float32 weights": lambda: torch_npu.npu_moe_token_unpermute(on_device, index, full),
        "npu_moe_token_unpermute, weights in the rows' dtype": lambda: torch_npu.npu_moe_token_unpermute(
            on_device, index, rounded
        ),
        "npu_moe_finalize_routing": lambda: torch_npu.npu_moe_finalize_routing(
            on_device, None, None, None, rounded, by_choice, ids
        ),
    }
    found = []
    for name, way in ways.items():
        error = (way().cpu().double() - exact).abs()
        torch_npu.npu.synchronize()
        started = time.perf_counter()
        for _ in range(SUM_ROUNDS):
            way()
        torch_npu.npu.synchronize()
        microseconds = (time.perf_counter() - started) / SUM_ROUNDS * 1e6
        found.append(
            {
                "op": name,
                "largest_error": float(error.max()),
                "rms_error": float(error.square().mean().sqrt()),
                "us_eager": round(microseconds, 1),
            }
        )
    return found


def compare(ranks: int) -> Iterator[dict[str, Any]]:
    """A tiny model beside vllm-ascend with moe_comm=compare: each layer both ways, by each strategy."""
    from vllm import LLM, SamplingParams

    from vllm_npu.strategies.table import STRATEGIES
    from vllm_npu.tools.demo.ascend_demo import MODELS
    from vllm_npu.tools.engines.tiny_models import demo_prompts, write_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        engine = LLM(
            str(write_tiny_model(MODELS[0], Path(folder) / "model")),
            dtype="bfloat16",
            enforce_eager=True,
            tensor_parallel_size=ranks,
            enable_expert_parallel=True,
            max_model_len=64,
            max_num_seqs=8,
            max_num_batched_tokens=256,
            additional_config={"vllm_npu": {"moe_comm": "compare"}},
        )
        greedy = SamplingParams(temperature=0, max_tokens=COMPARED_TOKENS, ignore_eos=True)
        for strategy in STRATEGIES:
            engine.collective_rpc("set_moe_comm", args=(strategy,))
            engine.generate(demo_prompts(), greedy, use_tqdm=False)
            for rank, counters in enumerate(engine.collective_rpc("moe_comm_counters")):
                yield {"strategy": strategy, "rank": rank, **counters}


def main(arguments: list[str]) -> None:
    """Run one check, and print its rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=("buffers", "sums", "compare"))
    parser.add_argument("--ranks", type=int, default=2)
    given = parser.parse_args(arguments)
    rows = {"buffers": lambda: buffers(given.ranks), "sums": sums, "compare": lambda: compare(given.ranks)}
    for row in rows[given.check]():
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
