"""A tiny model that vLLM alone cannot run on a CPU: its checkpoint, and the tokens that transformers generates from it."""

from pathlib import Path
from typing import NamedTuple

import torch

from vllm_npu.tools.engines.tiny_models import MAX_POSITIONS, VOCAB_SIZE, write_byte_tokenizer
from vllm_npu.tools.families.checkpoints import greedy

SEED = 2  # it gives a wide margin on demo_prompts()


class Greedy(NamedTuple):
    """Tokens for each of demo_prompts(), and the least gap in log-probability between the best and the second-best token."""

    tokens: list[list[int]]
    smallest_margin: float


def write_minimax_m2(folder: Path, seed: int = SEED) -> Greedy:
    """Write a MiniMax-M2 checkpoint (sigmoid scores without groups, and a bias for the choice) and generate from it."""
    from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

    hidden = 256
    torch.manual_seed(seed)
    config = MiniMaxM2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        rotary_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=hidden**-0.5,
        num_experts_per_tok=2,
        num_local_experts=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        scoring_func="sigmoid",
        use_routing_bias=True,
        torch_dtype="float32",
    )
    model = MiniMaxM2ForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.mlp.e_score_correction_bias.normal_(std=0.1)
    model.save_pretrained(folder)
    write_byte_tokenizer(folder)
    return Greedy(*greedy(model))
