"""Quantised experts of one layer of vllm-ascend: what describes them in a checkpoint, and the rounding of drawn weights.

There are these kinds: "W8A8" (W8A8_DYNAMIC), "W4A8" (W4A8_DYNAMIC, one scale for each output), "W4A8 in groups" (a scale for
each GROUP inputs of an output, which vllm-ascend 0.30 refuses), "W4A16" (int4 weights in groups, and rows as they are).
ModelSlim describes the first three in a file, and LLM-Compressor the last one in config.json.
"""

from typing import Any

import torch

from vllm_npu.tools.engines.int4_weights import GROUP, as_w4a8, as_w4a16, compressed_tensors_config

PREFIX = "model.layers.{}.mlp.experts"  # with the number of the layer
SCHEMES = {"W8A8": "W8A8_DYNAMIC", "W4A8": "W4A8_DYNAMIC", "W4A8 in groups": "W4A8_DYNAMIC"}
COMPRESSED = "W4A16"


def has_int8_rows(kind: str | None) -> bool:
    """Whether the rows of such a layer travel as int8."""
    return kind in SCHEMES


def description(kind: str, number: int, experts: int) -> dict[str, Any]:
    """ModelSlim's description of layer `number`."""
    names = [
        f"{PREFIX.format(number)}.{expert}.{name}_proj" for expert in range(experts) for name in ("gate", "up", "down")
    ]
    parts = ("weight", "weight_scale", "weight_offset")
    described: dict[str, Any] = {f"{name}.{part}": SCHEMES[kind] for name in names for part in parts}
    if kind.startswith("W4A8"):
        described |= {"version": "1.0.0", "group_size": GROUP if kind == "W4A8 in groups" else 0}
    return described


def quant_config(kind: str | None, number: int, experts: int) -> Any:
    """vllm-ascend's quantisation config for layer `number`. None without a kind."""
    if kind is None:
        return None
    if kind == COMPRESSED:
        try:
            from vllm_ascend.quantization.configs.compressed_tensors_config import AscendCompressedTensorsConfig  # 0.30
        except ModuleNotFoundError:
            from vllm_ascend.quantization.compressed_tensors_config import AscendCompressedTensorsConfig
        return AscendCompressedTensorsConfig.from_config(compressed_tensors_config())
    try:
        from vllm_ascend.quantization.configs.modelslim_config import AscendModelSlimConfig  # 0.30
    except ModuleNotFoundError:
        from vllm_ascend.quantization.modelslim_config import AscendModelSlimConfig
    return AscendModelSlimConfig(description(kind, number, experts))


def load(kind: str, layer: Any, name: str, weight: torch.Tensor, own: list[int]) -> torch.Tensor:
    """Load the weight [experts, out, in] of the experts `own` into the layer's `name` (w13, w2), as the checkpoint has it.

    Returns the weight of all experts after the rounding.
    """
    parameters, rounded = _as_w8a8(weight) if kind == "W8A8" else _as_int4(kind, weight)
    for suffix, values in parameters.items():
        target = getattr(layer, f"{name}_{suffix}").data
        # A bias of several columns is their sum.
        target.copy_((values / target.shape[-1] if suffix == "scale_bias" else values)[own])
    return rounded


def _as_w8a8(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """int8, and a scale for each output."""
    scale = (weight.float().abs().amax(dim=2, keepdim=True) / 127).to(weight.dtype)
    quantised = (weight.float() / scale.float()).round().clamp(-127, 127)
    parameters = {"weight": quantised.to(torch.int8), "weight_scale": scale, "weight_offset": torch.zeros_like(scale)}
    return parameters, quantised * scale.float()


def _as_int4(kind: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    values = weight.float().numpy()
    made = as_w4a16(values) if kind == COMPRESSED else as_w4a8(values, GROUP if kind == "W4A8 in groups" else None)
    parameters = {name: torch.from_numpy(each) for name, each in made.parameters.items()}
    return parameters, torch.from_numpy(made.rounded)
