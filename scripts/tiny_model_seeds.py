#!/usr/bin/env python3
"""Seeds of tiny models whose greedy tokens survive rounding: python scripts/tiny_model_seeds.py qwen3-moe --first 0 --seeds 200

Sums in another order differ in their last bits. That changes a token where two tokens are nearly as likely, and where two
experts are: a router that picks the other one changes the whole row. Neither margin alone finds the second, so every model
is decoded by transformers in float32 beside copies whose layers' outputs are disturbed, and a seed is printed, with its
smallest margin, where no copy's tokens differ.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from vllm_npu.cli import ascend_demo
from vllm_npu.cli.tiny_models import TinyModel, demo_prompts, write_tiny_model

COPIES = 16
# Of a row's root mean square; float16 rounds to 0.0005 of a number, and strategies differ by some 0.001 of a row.
NOISE = 0.0015


def disturb(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Add noise to what attention and MLP of each layer put out, in every row of the batch but the first."""

    def hook(_module: torch.nn.Module, _inputs: Any, output: Any) -> Any:
        rows = output[0] if isinstance(output, tuple) else output
        size = NOISE * rows.square().mean(-1, keepdim=True).sqrt()
        size[0] = 0.0
        disturbed = rows + size * torch.randn(rows.shape, generator=generator)
        return (disturbed, *output[1:]) if isinstance(output, tuple) else disturbed

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(hook)
        layer.mlp.register_forward_hook(hook)


def decode(model: Any, prompt: list[int], max_tokens: int) -> Iterator[tuple[int, float]]:
    """Greedy tokens, each with the least margin (nats) that it has in any copy; ends early where a copy differs."""
    ids = torch.tensor([prompt]).expand(COPIES, -1)
    cache = None
    for _ in range(max_tokens):
        answer = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = answer.past_key_values
        best = answer.logits[:, -1].log_softmax(-1).topk(2)
        tokens = best.indices[:, 0]
        if (tokens != tokens[0]).any():
            return
        yield int(tokens[0]), float((best.values[:, 0] - best.values[:, 1]).min())
        ids = tokens[:, None]


@torch.inference_mode()
def smallest_margin(tiny: TinyModel, max_tokens: list[int], at_least: float) -> tuple[float, int] | None:
    """Of one seed, with the number of distinct tokens; None where a copy differs or the margin is below `at_least`."""
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_model(tiny, Path(folder))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    disturb(model, torch.Generator().manual_seed(0))
    least, seen = float("inf"), set()
    for prompt, wanted in zip(demo_prompts(), max_tokens, strict=True):
        decoded = list(decode(model, prompt, wanted))
        least = min([least, *(margin for _, margin in decoded)])
        seen |= {token for token, _ in decoded}
        if len(decoded) < wanted or least < at_least:
            return None
    return least, len(seen)


def main() -> None:
    """Print seed, margin and distinct tokens, one line a seed that holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = {model.family: model for model in ascend_demo.MODELS}
    parser.add_argument("family", choices=models)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--margin", type=float, default=2 * ascend_demo.SAFE_MARGIN, help="nats")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        found = smallest_margin(replace(models[arguments.family], seed=seed), ascend_demo.MAX_TOKENS, arguments.margin)
        if found is not None:
            print(f"seed {seed}: margin {found[0]:.3f}, {found[1]} distinct tokens", flush=True)


if __name__ == "__main__":
    main()
