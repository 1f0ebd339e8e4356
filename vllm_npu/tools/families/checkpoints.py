"""A tiny checkpoint of any family that transformers has: random weights, and the tokens that transformers generates."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_npu.tools.engines.tiny_models import (
    BOS_TOKEN_ID,
    DEEPSEEK_V2,
    DEMO_MAX_TOKENS,
    EOS_TOKEN_ID,
    MAX_POSITIONS,
    VOCAB_SIZE,
    demo_prompts,
    write_byte_tokenizer,
)

SEEDS = 20  # tried for a wide margin
# Least gap (nats) between the best and the second-best token. float32 sums in another order change a log-probability by about
# 1e-5 in the models of the demo; recurrent layers by more.
WIDE_MARGIN = 2e-3

# Sizes of the tiny model by the name of the configuration's field. A family takes those that its configuration has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model"), 256),
    **dict.fromkeys(("num_hidden_layers", "n_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "kv_n_heads"), 2),
    "head_dim": 64,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts"), 2
    ),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "intermediate_size_mlp"), 128),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "shared_intermediate_size",
            "expert_ffn_hidden_size",
            "moe_shared_expert_intermediate_size",
        ),
        64,
    ),
    "first_k_dense_replace": 1,
    # vLLM's latent attention on CPUs decodes only latent rank 512 with 64 rotary dimensions.
    "q_lora_rank": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 64),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 64),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "sliding_window": 32,
    "vocab_size": VOCAB_SIZE,
    **dict.fromkeys(("max_position_embeddings", "max_seq_len"), MAX_POSITIONS),
    "tie_word_embeddings": False,
    "bos_token_id": BOS_TOKEN_ID,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": EOS_TOKEN_ID,
}
# What a family needs beyond SIZES: each value overrides the one there.
# Without a scaling of the rotation, vLLM 0.32 on CPUs rotates latent queries wrongly: see tiny_models.py.
LATENT_ATTENTION = {"num_key_value_heads": 4, "rope_parameters": DEEPSEEK_V2.config["rope_parameters"]}
OF_FAMILY: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            *("axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"),
            *("kimi_linear", "longcat_flash"),
        ),
        LATENT_ATTENTION,
    ),
    # vLLM reads what transformers takes for granted.
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "deepseek_v2": LATENT_ATTENTION | {"num_experts_per_tok": 2},
    "deepseek_v3": LATENT_ATTENTION | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "glm4_moe": {"head_dim": 64},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hy_v3": {"first_k_dense_replace": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": LATENT_ATTENTION | {"layer_types": ["linear_attention", "full_attention"] * 2},
    "llama4_text": {"num_experts_per_tok": 1},  # the weight goes on the input of one expert
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "minimax_m2": {
        "rotary_dim": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A tiny model on disk, with the tokens that transformers generates from it."""

    folder: Path
    seed: int
    tokens: list[list[int]]  # one list for each of demo_prompts()
    smallest_margin: float  # nats, over all generated tokens


def tiny_config(model_type: str) -> Any:
    """transformers' configuration of the family with the sizes of SIZES and OF_FAMILY."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    sizes = _sizes_in(config_class().to_dict()) | OF_FAMILY.get(model_type, {})
    return config_class(**sizes, dtype="float32")


def _sizes_in(default: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes for the fields of a configuration. A field without a value keeps none, as does a part of the model."""
    parts = {
        key: _sizes_in(value) for key, value in default.items() if key.endswith("_config") and isinstance(value, dict)
    }
    return parts | {key: SIZES[key] for key, value in default.items() if key in SIZES and value is not None}


def write_checkpoint(model_type: str, folder: Path) -> Checkpoint:
    """Write a checkpoint with the first seed whose tokens have WIDE_MARGIN, else with the widest of SEEDS. Seconds.

    Raises what transformers raises for a model that it cannot build with these sizes.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # the matrices are small
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32).eval()
    widest = Checkpoint(folder=folder, seed=0, tokens=[], smallest_margin=0.0)
    for seed in range(SEEDS):
        draw_weights(model, seed)
        tokens, margin = greedy(model, widest.smallest_margin)
        if margin > widest.smallest_margin:
            widest = Checkpoint(folder=folder, seed=seed, tokens=tokens, smallest_margin=margin)
        if margin >= WIDE_MARGIN:
            break
    draw_weights(model, widest.seed)
    model.save_pretrained(folder)
    write_byte_tokenizer(folder)
    return widest


def draw_weights(model: Any, seed: int) -> None:
    """Draw every matrix, every bias and the bias that experts are chosen by. Norms and what is no matrix keep their values."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed" in name:
                weight.normal_(generator=generator)
            elif weight.dim() > 1:
                weight.normal_(std=weight.shape[-1] ** -0.5, generator=generator)
            elif name.endswith("bias"):
                weight.normal_(std=0.1, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.normal_(std=0.1, generator=generator)


def greedy(model: Any, margin: float = 0.0) -> tuple[list[list[int]], float]:
    """transformers' greedy tokens for demo_prompts(), and the least gap in log-probability to the second-best token.

    Stops at the first gap that is not above `margin`.
    """
    import torch

    tokens: list[list[int]] = []
    smallest = float("inf")
    with torch.no_grad():
        for prompt, count in zip(demo_prompts(), DEMO_MAX_TOKENS, strict=True):
            tokens.append([])
            while len(tokens[-1]) < count:
                # The whole text each time: some recurrent models have no cache here.
                logits = model(torch.tensor([prompt + tokens[-1]]), use_cache=False).logits
                best = logits[0, -1].log_softmax(-1).topk(2)
                smallest = min(smallest, float(best.values[0] - best.values[1]))
                if smallest <= margin:
                    return tokens, smallest
                tokens[-1].append(int(best.indices[0]))
    return tokens, smallest
