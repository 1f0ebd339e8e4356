"""Tiny random checkpoints that vLLM loads like any other model: config.json, model.safetensors, a tokenizer.

There are four families. In Qwen3-MoE, every layer is a mixture of experts. DeepSeek-V2 has latent attention, a dense first
layer, shared experts, and grouped top-k with a scaling factor. DeepSeek-V3 has also latent queries, sigmoid scores and a bias
for the choice of experts, and sizes that Ascend's gating and attention take. GLM-4 has the experts of DeepSeek-V3 and the
attention of Qwen3; only recipes use it, with a seed of their own. The same family and seed give the same bytes on every
machine, because numpy's PCG64 and not torch draws the numbers. Every expert matters: without any one of them, at least 19 of
the 96 tokens of the demo change. With the chosen seeds, greedy decoding of `demo_prompts()` gives many different tokens and no
near tie. Each run that generates a reference measures the margin again.
"""

import json
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_npu.tools.engines.int4_weights import as_w4a8, as_w4a16, compressed_tensors_config

if TYPE_CHECKING:
    import numpy as np

VOCAB_SIZE = 2048
BOS_TOKEN, BOS_TOKEN_ID = "<s>", 0
EOS_TOKEN, EOS_TOKEN_ID = "</s>", 1
MAX_POSITIONS = 2048

# Tokens to generate for each of demo_prompts(), 96 in all. On two ranks they end at different steps, so that one rank runs
# empty steps while the other rank still works.
DEMO_MAX_TOKENS = [20, 7, 16, 10, 13, 4, 17, 9]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

# The weights of linear layers by the ends of their names: in checkpoints in W8A8, and those that stay in float there.
INT8_WEIGHTS = ("_proj.weight", ".kv_a_proj_with_mqa.weight")
FLOAT_WEIGHTS = (".kv_b_proj.weight", ".eh_proj.weight")
EXPERTS = ".experts."  # in the names of routed experts' weights
BIAS_COLUMNS = 16  # of ModelSlim's scale_bias of a second product

Weights = dict[str, "np.ndarray[Any, Any]"]
Draw = Callable[..., "np.ndarray[Any, Any]"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    """One family: its config.json and the function that draws its weights."""

    family: str
    summary: str  # one line for tables: the properties of the family
    seed: int  # of the weights; it gives wide margins on demo_prompts()
    config: Mapping[str, Any]
    draw_weights: Callable[[Mapping[str, Any], Draw], Weights]

    @property
    def num_moe_layers(self) -> int:
        """Layers whose MLP is a mixture of experts."""
        return int(self.config["num_hidden_layers"]) - int(self.config.get("first_k_dense_replace", 0))

    @property
    def num_experts(self) -> int:
        """Routed experts per layer."""
        return int(self.config.get("num_experts") or self.config["n_routed_experts"])


def write_tiny_model(model: TinyModel, folder: Path, *, quantised: str | None = None) -> Path:
    """Write the checkpoint of `model` into `folder` (created if absent) and return `folder`.

    quantised="W8A8" writes the weights of attention and experts as int8 with a scale for each output, and a file that lists
    them. This is ModelSlim's format W8A8_DYNAMIC, which vllm-ascend reads with quantization="ascend". "W4A8" is the same with
    experts in int4 (W4A8_DYNAMIC). "W4A16" has experts in int4 and all else as it is, in LLM-Compressor's format, which
    config.json describes.

    Writes 12 MB (qwen3-moe) to 30 MB (deepseek-v3) in less than a second. Raises OSError if the folder cannot be written.
    """
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(model.seed)

    def draw(*shape: int, scale: float | None = None) -> "np.ndarray[Any, Any]":
        """Normal numbers. By default their scale is that of a layer whose last dimension is the fan-in."""
        scale = shape[-1] ** -0.5 if scale is None else scale
        return (generator.standard_normal(shape) * scale).astype(np.float32)

    config, weights = dict(model.config), model.draw_weights(model.config, draw)
    if quantised in ("W8A8", "W4A8"):
        weights, description = _by_modelslim(weights, int4_experts=quantised == "W4A8")
        (folder / "quant_model_description.json").write_text(json.dumps(description, indent=1) + "\n")
        if quantised == "W8A8":
            config["quantize"] = "w8a8_dynamic"  # as ModelSlim; vllm-ascend 0.23 reads it for enable_fused_mc2: 2
    elif quantised == "W4A16":
        weights = _by_llm_compressor(weights)
        config["quantization_config"] = compressed_tensors_config()
    elif quantised is not None:
        raise ValueError(f"quantised={quantised!r} is none of W8A8, W4A8, W4A16")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_byte_tokenizer(folder)
    return folder


def demo_prompts() -> list[list[int]]:
    """One prompt (token ids) for each entry of DEMO_MAX_TOKENS, of 5, 8, 11, ...

    tokens. Ranks thus have unequal numbers of tokens.
    """
    first_id, span = 2, VOCAB_SIZE - 48
    return [[(7 * i + 13 * j) % span + first_id for j in range(5 + 3 * i)] for i in range(len(DEMO_MAX_TOKENS))]


def write_byte_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: 256 bytes and pairs of letters, VOCAB_SIZE tokens in all.

    Every string can be encoded, and every token id can be decoded. So text works over HTTP in both directions, although the
    model is random.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {BOS_TOKEN: BOS_TOKEN_ID, EOS_TOKEN: EOS_TOKEN_ID}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    letters = string.ascii_lowercase + string.digits + ".,:;!?-"  # 43 symbols, so 1849 possible pairs
    merges = [(first, second) for first in letters for second in letters][: VOCAB_SIZE - len(vocabulary)]
    for first, second in merges:
        vocabulary[first + second] = len(vocabulary)

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS_TOKEN, EOS_TOKEN])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "pad_token": EOS_TOKEN,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def _by_modelslim(weights: Weights, *, int4_experts: bool) -> tuple[Weights, dict[str, Any]]:
    """The weights, with those of linear layers in int8, or int4 in experts, and the kind of each weight by its name."""
    import numpy as np

    written: Weights = {}
    kinds: dict[str, Any] = {"version": "1.0.0", "group_size": 0} if int4_experts else {}
    for name, weight in weights.items():
        is_linear = name.endswith(INT8_WEIGHTS) and not name.endswith(FLOAT_WEIGHTS)
        if is_linear and int4_experts and EXPERTS in name:
            parameters, kind = as_w4a8(weight).parameters, "W4A8_DYNAMIC"
            if "down_proj" in name:  # its bias has columns for the ranks of a tensor-parallel layer
                parameters["scale_bias"] = np.repeat(parameters["scale_bias"] / BIAS_COLUMNS, BIAS_COLUMNS, axis=1)
        elif is_linear:
            scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
            values = np.rint(weight / scale).astype(np.int8)
            parameters = {"weight": values, "weight_scale": scale, "weight_offset": np.zeros_like(scale)}
            kind = "W8A8_DYNAMIC"
        else:
            parameters, kind = {"weight": weight}, "FLOAT"
        for suffix, values in parameters.items():
            full = name.removesuffix("weight") + suffix if name.endswith("weight") else name
            written[full], kinds[full] = values, kind
    return written, kinds


def _by_llm_compressor(weights: Weights) -> Weights:
    """The weights, with those of experts in int4."""
    import numpy as np

    written: Weights = {}
    for name, weight in weights.items():
        if EXPERTS not in name:
            written[name] = weight
            continue
        parameters = as_w4a16(weight).parameters | {"weight_shape": np.array(weight.shape, dtype=np.int32)}
        written |= {name.removesuffix("weight") + suffix: values for suffix, values in parameters.items()}
    return written


def _ones(size: int) -> "np.ndarray[Any, Any]":
    import numpy as np

    return np.ones(size, dtype=np.float32)


def _mlp(prefix: str, hidden: int, intermediate: int, draw: Draw, gain: float = 1.0) -> Weights:
    """Gate, up and down projections of one expert or of a dense MLP. `gain` scales its output."""
    return {
        f"{prefix}.gate_proj.weight": draw(intermediate, hidden),
        f"{prefix}.up_proj.weight": draw(intermediate, hidden),
        f"{prefix}.down_proj.weight": draw(hidden, intermediate) * gain,
    }


def _embeddings(hidden: int, draw: Draw) -> Weights:
    return {
        "model.embed_tokens.weight": draw(VOCAB_SIZE, hidden, scale=1.0),
        "lm_head.weight": draw(VOCAB_SIZE, hidden),
        "model.norm.weight": _ones(hidden),
    }


def _norms(prefix: str, hidden: int) -> Weights:
    """Of a layer."""
    return {
        f"{prefix}.input_layernorm.weight": _ones(hidden),
        f"{prefix}.post_attention_layernorm.weight": _ones(hidden),
    }


def _grouped_attention(prefix: str, config: Mapping[str, Any], draw: Draw) -> Weights:
    """Attention whose heads share keys and values, with a norm for each head."""
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    query_width = config["num_attention_heads"] * head_dim
    key_width = config["num_key_value_heads"] * head_dim
    return {
        f"{prefix}.q_proj.weight": draw(query_width, hidden),
        f"{prefix}.k_proj.weight": draw(key_width, hidden),
        f"{prefix}.v_proj.weight": draw(key_width, hidden),
        f"{prefix}.o_proj.weight": draw(hidden, query_width),
        f"{prefix}.q_norm.weight": _ones(head_dim),
        f"{prefix}.k_norm.weight": _ones(head_dim),
    }


def _draw_qwen3_moe(config: Mapping[str, Any], draw: Draw) -> Weights:
    hidden = config["hidden_size"]
    weights = _embeddings(hidden, draw)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        weights |= _norms(prefix, hidden) | _grouped_attention(f"{prefix}.self_attn", config, draw)
        weights[f"{prefix}.mlp.gate.weight"] = draw(config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            name = f"{prefix}.mlp.experts.{expert}"
            weights |= _mlp(name, hidden, config["moe_intermediate_size"], draw, gain=2.0)
    return weights


def _draw_queries(prefix: str, config: Mapping[str, Any], draw: Draw) -> Weights:
    """The projection of queries: one matrix, or two around a latent if the configuration has q_lora_rank."""
    hidden, rank = config["hidden_size"], config["q_lora_rank"]
    width = config["num_attention_heads"] * (config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    if rank is None:
        return {f"{prefix}.q_proj.weight": draw(width, hidden)}
    return {
        f"{prefix}.q_a_proj.weight": draw(rank, hidden),
        f"{prefix}.q_a_layernorm.weight": _ones(rank),
        f"{prefix}.q_b_proj.weight": draw(width, rank),
    }


def _latent_attention(prefix: str, config: Mapping[str, Any], draw: Draw) -> Weights:
    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    return _draw_queries(prefix, config, draw) | {
        f"{prefix}.kv_a_proj_with_mqa.weight": draw(latent + rope, hidden),
        f"{prefix}.kv_a_layernorm.weight": _ones(latent),
        f"{prefix}.kv_b_proj.weight": draw(heads * (nope + value), latent),
        f"{prefix}.o_proj.weight": draw(hidden, heads * value),
    }


def _draw_deepseek(config: Mapping[str, Any], draw: Draw) -> Weights:
    """DeepSeek's layers, and GLM-4's: these have the same experts, and other attention."""
    hidden = config["hidden_size"]
    attention = _latent_attention if "kv_lora_rank" in config else _grouped_attention
    weights = _embeddings(hidden, draw)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        weights |= _norms(prefix, hidden) | attention(f"{prefix}.self_attn", config, draw)
        if layer < config["first_k_dense_replace"]:
            weights |= _mlp(f"{prefix}.mlp", hidden, config["intermediate_size"], draw)
            continue
        expert_width = config["moe_intermediate_size"]
        weights[f"{prefix}.mlp.gate.weight"] = draw(config["n_routed_experts"], hidden)
        if config.get("topk_method", "noaux_tc") == "noaux_tc":
            weights[f"{prefix}.mlp.gate.e_score_correction_bias"] = draw(config["n_routed_experts"], scale=0.05)
        weights |= _mlp(f"{prefix}.mlp.shared_experts", hidden, expert_width * config["n_shared_experts"], draw)
        for expert in range(config["n_routed_experts"]):
            weights |= _mlp(f"{prefix}.mlp.experts.{expert}", hidden, expert_width, draw, gain=3.0)
    for layer in range(config.get("num_nextn_predict_layers", 0)):
        weights |= _copy_as_drafter(config, weights, config["num_hidden_layers"] + layer)
    return weights


def _copy_as_drafter(config: Mapping[str, Any], weights: Weights, number: int) -> Weights:
    """A layer that predicts the token after the next: the last layer of the model, on the embedding of the next token.

    In a model of one layer, its prediction differs from the model's only in that its attention does not see the first token.
    So some drafts are accepted, and some are not.
    """
    import numpy as np

    hidden, prefix, source = (
        config["hidden_size"],
        f"model.layers.{number}.",
        f"model.layers.{config['num_hidden_layers'] - 1}.",
    )
    copied = {prefix + name.removeprefix(source): each for name, each in weights.items() if name.startswith(source)}
    return copied | {
        f"{prefix}embed_tokens.weight": weights["model.embed_tokens.weight"],
        f"{prefix}enorm.weight": _ones(hidden),
        f"{prefix}hnorm.weight": _ones(hidden),
        f"{prefix}eh_proj.weight": np.concatenate(
            [np.eye(hidden), np.zeros((hidden, hidden))], axis=1, dtype=np.float32
        ),
        f"{prefix}shared_head.head.weight": weights["lm_head.weight"],
        f"{prefix}shared_head.norm.weight": weights["model.norm.weight"],
    }


_SHARED_SETTINGS: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "hidden_act": "silu",
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": MAX_POSITIONS,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "norm_topk_prob": True,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": BOS_TOKEN_ID,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": EOS_TOKEN_ID,
}

QWEN3_MOE = TinyModel(
    family="qwen3-moe",
    summary="3 MoE layers, 8 experts, top-2",
    seed=444,
    config=_SHARED_SETTINGS
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "intermediate_size": 1024,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "output_router_logits": False,
        "use_sliding_window": False,
    },
    draw_weights=_draw_qwen3_moe,
)

# vLLM's latent attention on CPUs decodes only latent rank 512 with 64 rotary dimensions, which are DeepSeek's own sizes. Yarn
# is DeepSeek's own scaling of the rotation, and needed: without it, vLLM 0.32.0 on CPUs rotates latent queries wrongly, and
# tokens depend on the other requests of the batch.
DEEPSEEK_V2 = TinyModel(
    family="deepseek-v2",
    summary="2 MoE layers, 2 shared + 8 routed experts, top-2 in 2 of 4 groups, MLA",
    seed=98,
    config=_SHARED_SETTINGS
    | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "intermediate_size": 512,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 64,
        "v_head_dim": 32,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_shared_experts": 2,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "scoring_func": "softmax",
        "routed_scaling_factor": 1.5,
        "norm_topk_prob": False,
    },
    draw_weights=_draw_deepseek,
)

# Ascend's gating takes groups of 3 or more experts. Its attention takes heads of 128 dimensions with 64 rotary ones.
DEEPSEEK_V3 = TinyModel(
    family="deepseek-v3",
    summary="2 MoE layers, 1 shared + 16 routed experts, top-2 in 2 of 4 groups by sigmoid and bias, MLA",
    seed=511,
    config={
        **DEEPSEEK_V2.config,
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "q_lora_rank": 128,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 16,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
    },
    draw_weights=_draw_deepseek,
)

GLM4_MOE = TinyModel(
    family="glm4-moe",
    summary="2 MoE layers, 1 shared + 16 routed experts, top-2 by sigmoid and bias, half of each head rotated",
    seed=0,
    config=_SHARED_SETTINGS
    | {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "intermediate_size": 512,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "n_routed_experts": 16,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
    },
    draw_weights=_draw_deepseek,
)

FAMILIES: dict[str, TinyModel] = {model.family: model for model in (QWEN3_MOE, DEEPSEEK_V2, DEEPSEEK_V3)}
