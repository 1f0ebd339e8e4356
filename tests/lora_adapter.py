"""Writes a LoRA adapter of a tiny Qwen3-MoE, as PEFT does: adapter_config.json and adapter_model.safetensors. Or adds it up."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

RANK = 8
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("gate_proj", "up_proj", "down_proj")


def write_adapter(folder: Path, config: Mapping[str, Any], *, on_experts: bool, seed: int = 1) -> Path:
    """Write an adapter of the attention, or also of every expert, into `folder` and return it. Its matrices are drawn."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    queries, keys = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    shapes = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
    }
    of_expert = {"gate_proj": (hidden, width), "up_proj": (hidden, width), "down_proj": (width, hidden)}
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"base_model.model.model.layers.{layer}"
        modules = {f"{prefix}.self_attn.{name}": shape for name, shape in shapes.items()}
        for expert in range(config["num_experts"] if on_experts else 0):
            modules |= {f"{prefix}.mlp.experts.{expert}.{name}": shape for name, shape in of_expert.items()}
        for name, (inner, outer) in modules.items():
            for part, shape in (("A", (RANK, inner)), ("B", (outer, RANK))):
                drawn = generator.standard_normal(shape) * shape[1] ** -0.5
                weights[f"{name}.lora_{part}.weight"] = drawn.astype(np.float32)
    targets = [*ATTENTION, *(EXPERTS if on_experts else ())]
    adapter = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def write_merged(folder: Path, checkpoint: Path, adapter: Path) -> Path:
    """Copy `checkpoint` into `folder`, add to its weights what the adapter adds to them, and return `folder`."""
    shutil.copytree(checkpoint, folder)
    weights, added = load_file(checkpoint / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name in added:
        if name.endswith(".lora_A.weight"):
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            weights[f"{layer}.weight"] += added[name.replace("lora_A", "lora_B")] @ added[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
