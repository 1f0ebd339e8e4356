"""Seeds of tiny models whose greedy tokens survive rounding.

Usage: $PY scripts/tiny_model_seeds.py qwen3-moe --first 0 --seeds 200    with the python of scripts/setup.sh

Sums in another order differ in their last bits. That changes a token if two tokens are nearly equally likely, or if two experts
are: a router that picks the other expert changes the whole row. The margin between tokens does not show the second case. So
transformers decodes every model in float32 together with copies, whose layers have disturbed outputs. A seed is printed, with
its smallest margin, if all copies generate the same tokens.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch.overrides import TorchFunctionMode

from vllm_npu.tools.demo import ascend_demo, recipes
from vllm_npu.tools.engines.int4_weights import as_w4a8, as_w4a16
from vllm_npu.tools.engines.tiny_models import TinyModel, demo_prompts, write_tiny_model

COPIES = 16
# Parts of a row's root mean square. float16 rounds to 0.0005 of a number, and strategies differ by about 0.001 of a row. Rows
# of int8 matrix products are bfloat16, which rounds 8 times more coarsely. These products are exact, so only MLPs differ.
NOISE = 0.0015
NOISE_INT8 = 0.003
FLOAT_WEIGHTS = ("gate.weight", "lm_head.weight", "kv_b_proj.weight")  # in float also where the others are int8


class Int8Linears(TorchFunctionMode):
    """Linear layers with int8 weights and int8 rows, as in W8A8_DYNAMIC, but for those in float.

    `rounded` are weights that keep their values: those of experts that are int4 already.
    """

    def __init__(self, model: torch.nn.Module, rounded: Sequence[torch.Tensor] = ()) -> None:
        super().__init__()
        self._float_weights = {
            weight.data_ptr() for name, weight in model.named_parameters() if name.endswith(FLOAT_WEIGHTS)
        }
        self._rounded = {matrix.data_ptr() for weight in rounded for matrix in weight}
        self._weights: dict[tuple[int, torch.Size], torch.Tensor] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not F.linear or args[1].data_ptr() in self._float_weights:
            return function(*args, **(kwargs or {}))
        rows, weight, *bias = args
        key = weight.data_ptr(), weight.shape
        if key not in self._weights:
            self._weights[key] = weight if key[0] in self._rounded else through_int8(weight)
        return F.linear(through_int8(rows), self._weights[key], *bias)


def through_int8(rows: torch.Tensor) -> torch.Tensor:
    """Each row after quantisation to int8 with one scale."""
    scale = rows.abs().amax(-1, keepdim=True) / 127
    return (rows / scale).round() * scale


def round_experts(model: torch.nn.Module, kind: str) -> list[torch.Tensor]:
    """Round the weights of experts to int4, as checkpoints in W4A8 or W4A16 have them. Returns them."""
    experts = [weight for name, weight in model.named_parameters() if ".experts." in name]
    rounding = as_w4a8 if kind == "W4A8" else as_w4a16
    for weight in experts:
        weight.copy_(torch.from_numpy(rounding(weight.numpy()).rounded))
    return experts


def disturb(model: Any, generator: torch.Generator, *, int8: bool) -> None:
    """Add noise to the outputs of MLP and attention of each layer, in every row of the batch except the first."""
    noise = NOISE_INT8 if int8 else NOISE

    def hook(_module: torch.nn.Module, _inputs: Any, output: Any) -> Any:
        rows = output[0] if isinstance(output, tuple) else output
        size = noise * rows.square().mean(-1, keepdim=True).sqrt()
        size[0] = 0.0
        disturbed = rows + size * torch.randn(rows.shape, generator=generator)
        return (disturbed, *output[1:]) if isinstance(output, tuple) else disturbed

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(hook)
        if not int8:
            layer.self_attn.register_forward_hook(hook)


def decode(model: Any, prompt: list[int], max_tokens: int) -> Iterator[tuple[int, float]]:
    """Greedy tokens, each with its least margin (nats) in any copy. Ends early if a copy generates another token."""
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
def smallest_margin(
    tiny: TinyModel, max_tokens: Sequence[int], at_least: float, *, quantised: str | None = None
) -> tuple[float, int] | None:
    """Smallest margin and number of distinct tokens of a seed; None if a copy differs or the margin is below `at_least`."""
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_model(tiny, Path(folder))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="eager"
        ).eval()
    rounded = round_experts(model, quantised) if quantised in ("W4A8", "W4A16") else []
    int8 = quantised in ("W8A8", "W4A8")
    disturb(model, torch.Generator().manual_seed(0), int8=int8)
    linears = Int8Linears(model, rounded) if int8 else nullcontext()
    least, seen = float("inf"), set()
    for prompt, wanted in zip(demo_prompts(), max_tokens, strict=True):
        with linears:
            decoded = list(decode(model, prompt, wanted))
        least = min([least, *(margin for _, margin in decoded)])
        seen |= {token for token, _ in decoded}
        if len(decoded) < wanted or least < at_least:
            return None
    return least, len(seen)


def main() -> None:
    """Print seed, margin and number of distinct tokens, in one line for each good seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # The model, how it is quantised, and the tokens to generate for each prompt.
    models: dict[str, tuple[TinyModel, str | None, Sequence[int]]] = {
        each.model.family: (each.model, "W8A8" if each.int8 else None, each.max_tokens)
        for each in ascend_demo.FULL_PLAN
    }
    for _, unquantised, in_int8 in recipes.FAMILIES:
        if unquantised is not None:
            models[unquantised.family] = unquantised, None, ascend_demo.MAX_TOKENS
        models[in_int8.family] = in_int8, "W8A8", ascend_demo.FEWER_TOKENS
    for wide in recipes.WIDE_EXPERTS.values():
        models[wide.family] = wide, "W8A8", ascend_demo.FEWER_TOKENS
    for kind, model in ascend_demo.INT4_EXPERTS.items():
        models[model.family] = model, kind, ascend_demo.FEWER_TOKENS
    parser.add_argument("family", choices=models)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--margin", type=float, default=2 * ascend_demo.SAFE_MARGIN, help="nats")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        model, quantised, max_tokens = models[arguments.family]
        found = smallest_margin(replace(model, seed=seed), max_tokens, arguments.margin, quantised=quantised)
        if found is not None:
            print(f"seed {seed}: margin {found[0]:.3f}, {found[1]} distinct tokens", flush=True)


if __name__ == "__main__":
    main()
