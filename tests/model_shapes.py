"""The parts of public models' config.json that describe experts, as their publishers wrote them, and what they mean.

Only the keys around the experts are kept, and the least that a configuration class needs beside them.
"""

from typing import Any, NamedTuple

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}}},
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
}
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
HEADS = {"num_attention_heads": 8, "num_hidden_layers": 2}  # vLLM takes no object without heads for a language model


class Shape(NamedTuple):
    """One config.json, and the right reading of it."""

    config: dict[str, Any]
    experts: int
    top_k: int
    hidden: int  # width of an expert's input
    activation: str | None = "silu"
    limit: float | None = None
    quantised: str | None = None


def flat(model_type: str, **keys: Any) -> dict[str, Any]:
    """A config.json with the language model at the top."""
    return {"model_type": model_type, **HEADS, **keys}


SHAPES = {
    "GPT-OSS 120B": Shape(
        flat(
            "gpt_oss", architectures=["GptOssForCausalLM"], num_local_experts=128, num_experts_per_tok=4,
            experts_per_token=4, hidden_size=2880, hidden_act="silu", swiglu_limit=7.0, quantization_config=MXFP4,
        ), 128, 4, 2880, activation="swigluoai", limit=7.0, quantised="mxfp4",
    ),
    "Mixtral 8x7B": Shape(
        flat("mixtral", num_local_experts=8, num_experts_per_tok=2, hidden_size=4096, hidden_act="silu"), 8, 2, 4096
    ),
    "DBRX": Shape(
        {
            "model_type": "dbrx", "d_model": 6144, "n_heads": 48, "n_layers": 2,
            "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4, "ffn_act_fn": {"name": "silu"}},
        }, 16, 4, 6144,
    ),
    "DeepSeek-V2": Shape(
        flat("deepseek_v2", n_routed_experts=160, num_experts_per_tok=6, hidden_size=5120, hidden_act="silu"),
        160, 6, 5120,
    ),
    "DeepSeek-V3": Shape(
        flat(
            "deepseek_v3", n_routed_experts=256, num_experts_per_tok=8, hidden_size=7168, hidden_act="silu",
            torch_dtype="bfloat16", quantization_config=FP8,
        ), 256, 8, 7168, quantised="fp8",
    ),
    "DeepSeek-V4 Flash": Shape(
        flat(
            "deepseek_v4", n_routed_experts=256, num_experts_per_tok=6, hidden_size=4096, hidden_act="silu",
            swiglu_limit=10.0, head_dim=512, num_hash_layers=1, quantization_config=FP8,
        ), 256, 6, 4096, limit=10.0, quantised="fp8",
    ),
    "Kimi-K2": Shape(
        flat(
            "kimi_k2", n_routed_experts=384, num_experts_per_tok=8, hidden_size=7168, hidden_act="silu",
            quantization_config=FP8,
        ), 384, 8, 7168, quantised="fp8",
    ),
    "Kimi-K2.5": Shape(
        {
            "model_type": "kimi_k25", "vision_config": {"mm_hidden_size": 1152},
            "text_config": flat(
                "kimi_k2", n_routed_experts=384, num_experts_per_tok=8, hidden_size=7168, hidden_act="silu",
                quantization_config=INT4,
            ),
        }, 384, 8, 7168, quantised="compressed-tensors",
    ),
    "Kimi-VL": Shape(
        {
            "model_type": "kimi_vl", "vision_config": {"hidden_size": 1152},
            "text_config": flat(
                "deepseek_v3", n_routed_experts=64, num_experts_per_tok=6, hidden_size=2048, hidden_act="silu"
            ),
        }, 64, 6, 2048,
    ),
    "Kimi-Linear": Shape(
        flat("kimi_linear", num_experts=256, num_experts_per_token=8, hidden_size=2304, hidden_act="silu"), 256, 8, 2304
    ),
    "DeepSeek-VL2": Shape(
        {
            "model_type": "deepseek_vl_v2", "vision_config": {"width": 1152}, "projector_config": {"n_embed": 2048},
            "language_config": flat("deepseek_v2", n_routed_experts=64, num_experts_per_tok=6, hidden_size=2048),
        }, 64, 6, 2048, activation=None,
    ),
    "InternVL3.5 30B": Shape(
        {
            "model_type": "internvl_chat", "vision_config": {"hidden_size": 1024},
            "llm_config": flat(
                "qwen3_moe", architectures=["Qwen3MoeForCausalLM"], num_experts=128, num_experts_per_tok=8,
                hidden_size=2048, hidden_act="silu",
            ),
        }, 128, 8, 2048,
    ),
    "Qwen2-57B-A14B": Shape(
        flat("qwen2_moe", num_experts=64, num_experts_per_tok=8, hidden_size=3584, hidden_act="silu"), 64, 8, 3584
    ),
    "Qwen3-30B-A3B": Shape(
        flat("qwen3_moe", num_experts=128, num_experts_per_tok=8, hidden_size=2048, hidden_act="silu"), 128, 8, 2048
    ),
    "Qwen3-30B-A3B FP8": Shape(
        flat(
            "qwen3_moe", num_experts=128, num_experts_per_tok=8, hidden_size=2048, hidden_act="silu",
            quantization_config={
                **FP8, "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm", "model.layers.0.mlp.gate"]
            },
        ), 128, 8, 2048, quantised="fp8",
    ),
    "Qwen3-Next": Shape(
        flat("qwen3_next", num_experts=512, num_experts_per_tok=10, hidden_size=2048, hidden_act="silu"), 512, 10, 2048
    ),
    "Qwen3-VL-MoE": Shape(
        {
            "model_type": "qwen3_vl_moe", "vision_config": {"hidden_size": 1152, "hidden_act": "gelu_pytorch_tanh"},
            "text_config": flat(
                "qwen3_vl_moe_text", num_experts=128, num_experts_per_tok=8, hidden_size=2048, hidden_act="silu"
            ),
        }, 128, 8, 2048,
    ),
    "Qwen3.5-35B-A3B": Shape(
        {
            "model_type": "qwen3_5_moe", "vision_config": {"hidden_size": 1152},
            "text_config": flat(
                "qwen3_5_moe_text", num_experts=256, num_experts_per_tok=8, hidden_size=2048, hidden_act="silu"
            ),
        }, 256, 8, 2048,
    ),
    "Qwen3-Omni": Shape(
        {
            "model_type": "qwen3_omni_moe",
            "talker_config": {
                "text_config": flat("qwen3_omni_moe_talker_text", num_experts=128, num_experts_per_tok=6, hidden_size=1024)
            },
            "thinker_config": {
                "model_type": "qwen3_omni_moe_thinker", "audio_config": {"d_model": 1280},
                "text_config": flat(
                    "qwen3_omni_moe_text", num_experts=128, num_experts_per_tok=8, hidden_size=2048, hidden_act="silu"
                ),
            },
        }, 128, 8, 2048,
    ),
    "Llama-4 Scout": Shape(
        {
            "model_type": "llama4", "vision_config": {"hidden_size": 1408, "hidden_act": "gelu"},
            "text_config": flat(
                "llama4_text", num_local_experts=16, num_experts_per_tok=1, hidden_size=5120, hidden_act="silu"
            ),
        }, 16, 1, 5120,
    ),
    "Hunyuan-A13B": Shape(
        flat(
            "hunyuan_v1_moe", num_experts=64, moe_topk=[8] * 2, moe_intermediate_size=[3072] * 2, num_shared_expert=[1] * 2,
            hidden_size=4096, hidden_act="silu",
        ), 64, 8, 4096,
    ),
    "MiniMax-M1": Shape(
        flat("minimax_m1", num_local_experts=32, num_experts_per_tok=2, hidden_size=6144, hidden_act="silu"), 32, 2, 6144
    ),
    "MiniMax-M2": Shape(
        flat(
            "minimax_m2", num_local_experts=256, num_experts_per_tok=8, hidden_size=3072, hidden_act="silu",
            scoring_func="sigmoid", quantization_config={**FP8, "modules_to_not_convert": ["gate", "lm_head"]},
        ), 256, 8, 3072, quantised="fp8",
    ),
    "GLM-4.5": Shape(
        flat("glm4_moe", n_routed_experts=160, num_experts_per_tok=8, hidden_size=5120, hidden_act="silu"), 160, 8, 5120
    ),
    "GLM-4.5V": Shape(
        {
            "model_type": "glm4v_moe", "vision_config": {"hidden_size": 1536, "hidden_act": "silu"},
            "text_config": flat(
                "glm4v_moe_text", n_routed_experts=128, num_experts_per_tok=8, hidden_size=4096, hidden_act="silu"
            ),
        }, 128, 8, 4096,
    ),
    "ERNIE-4.5-21B-A3B": Shape(
        flat("ernie4_5_moe", moe_num_experts=64, moe_k=6, hidden_size=2560, hidden_act="silu"), 64, 6, 2560
    ),
    "ERNIE-4.5-VL-28B-A3B": Shape(  # one number for text, one for images
        flat(
            "ernie4_5_moe_vl", moe_num_experts=[64, 64], moe_k=6, moe_intermediate_size=[1536, 512], hidden_size=2560,
            hidden_act="silu", vision_config={"hidden_size": 1280},
        ), 64, 6, 2560,
    ),
    "Granite 3.1 3B-A800M": Shape(
        flat("granitemoe", num_local_experts=40, num_experts_per_tok=8, hidden_size=1536, hidden_act="silu"), 40, 8, 1536
    ),
    "Granite 4.0 H Tiny": Shape(
        flat(
            "granitemoehybrid", num_local_experts=64, num_experts_per_tok=6, hidden_size=1536, hidden_act="silu",
            layer_types=["mamba", "attention"],
        ), 64, 6, 1536,
    ),
    "Jamba": Shape(
        flat("jamba", num_experts=16, num_experts_per_tok=2, hidden_size=4096, hidden_act="silu"), 16, 2, 4096
    ),
    "OLMoE": Shape(
        flat("olmoe", num_experts=64, num_experts_per_tok=8, hidden_size=2048, hidden_act="silu"), 64, 8, 2048
    ),
    "FlexOlmo": Shape(
        flat("flex_olmo", num_experts=7, num_experts_per_tok=5, hidden_size=4096, hidden_act="silu"), 7, 5, 4096
    ),
    "Phi-3.5-MoE": Shape(
        flat("phimoe", num_local_experts=16, num_experts_per_tok=2, hidden_size=4096, hidden_act="silu"), 16, 2, 4096
    ),
    "Step3": Shape(
        {
            "model_type": "step3_vl", "vision_config": {"hidden_size": 1792, "hidden_act": "quick_gelu"},
            "text_config": flat("step3_text", moe_num_experts=48, moe_top_k=3, hidden_size=7168),
        }, 48, 3, 7168, activation=None,
    ),
    "Step-3.5 Flash": Shape(
        flat(
            "step3p5", moe_num_experts=288, moe_top_k=8, hidden_size=4096, swiglu_limits=[0.0, 7.0],
            swiglu_limits_shared=[0.0, 16.0], layer_types=["full_attention"] * 2,
        ), 288, 8, 4096, activation=None, limit=7.0,
    ),
    "Ling-lite": Shape(
        flat("bailing_moe", num_experts=64, num_experts_per_tok=6, hidden_size=2048, hidden_act="silu"), 64, 6, 2048
    ),
    "Ling 2.0 mini": Shape(
        flat("bailing_moe_v2", num_experts=256, num_experts_per_tok=8, hidden_size=2048, hidden_act="silu"), 256, 8, 2048
    ),
    "MiMo-V2-Flash": Shape(
        flat("mimo_v2_flash", n_routed_experts=256, num_experts_per_tok=8, hidden_size=4096, hidden_act="silu"), 256, 8, 4096
    ),
    "LFM2-8B-A1B": Shape(
        flat("lfm2_moe", num_experts=32, num_experts_per_tok=4, hidden_size=2048), 32, 4, 2048, activation=None
    ),
    "Arctic": Shape(
        flat("arctic", num_local_experts=128, num_experts_per_tok=2, hidden_size=7168, hidden_act="silu"), 128, 2, 7168
    ),
    "Gemma-4 26B-A4B": Shape(
        {
            "model_type": "gemma4", "vision_config": {"hidden_size": 1152, "hidden_activation": "gelu_pytorch_tanh"},
            "text_config": flat(
                "gemma4_text", num_experts=128, top_k_experts=8, hidden_size=2816, moe_intermediate_size=704,
                hidden_activation="gelu_pytorch_tanh", enable_moe_block=True,
            ),
        }, 128, 8, 2816, activation="gelu_tanh",
    ),
    "Grok-2": Shape(
        flat("git", num_local_experts=8, num_experts_per_tok=2, hidden_size=8192, hidden_act="gelu"),
        8, 2, 8192, activation="gelu",
    ),
    "Nemotron 3 Nano": Shape(
        flat(
            "nemotron_h", n_routed_experts=128, num_experts_per_tok=6, hidden_size=2688, mlp_hidden_act="relu2",
            hybrid_override_pattern="ME",
        ), 128, 6, 2688, activation="relu2",
    ),
    "Nemotron 3 Super": Shape(  # its experts take rows of a latent width
        flat(
            "nemotron_h", n_routed_experts=512, num_experts_per_tok=22, hidden_size=4096, moe_latent_size=1024,
            mlp_hidden_act="relu2", hybrid_override_pattern="ME",
        ), 512, 22, 1024, activation="relu2",
    ),
    "K-EXAONE": Shape(
        flat("exaone_moe", num_experts=128, num_experts_per_tok=8, hidden_size=6144, hidden_act="silu"), 128, 8, 6144
    ),
    "dots.llm1": Shape(
        flat("dots1", n_routed_experts=128, num_experts_per_tok=6, hidden_size=4096, hidden_act="silu"), 128, 6, 4096
    ),
    "Trinity": Shape(
        flat("afmoe", num_experts=128, num_experts_per_tok=8, hidden_size=2048, hidden_act="silu"), 128, 8, 2048
    ),
    "LongCat-Flash": Shape(
        flat("longcat_flash", n_routed_experts=512, moe_topk=12, zero_expert_num=256, hidden_size=6144), 512, 12, 6144,
        activation=None,
    ),
    "MiniCPM-MoE 8x2B": Shape(
        flat("minicpm", num_experts=8, num_experts_per_tok=2, hidden_size=2304, hidden_act="silu"), 8, 2, 2304
    ),
    "Aria": Shape(
        {
            "model_type": "aria", "vision_config": {"hidden_size": 1152, "model_type": "idefics3_vision"},
            "text_config": flat("aria_text", moe_num_experts=64, moe_topk=6, hidden_size=2560, hidden_act="silu"),
        }, 64, 6, 2560,
    ),
    "Mistral's params.json": Shape(
        {"dim": 7168, "n_layers": 2, "moe": {"num_experts": 128, "num_experts_per_tok": 4}}, 128, 4, 7168, activation=None
    ),
}  # fmt: skip
