"""int4 weights as checkpoints have them, made of float weights: ModelSlim's W4A8 and LLM-Compressor's W4A16.

The layouts are those of the docstrings in vllm-ascend's quantization/methods (w4a8.py, w4a16.py). A scale has at most eight
significant bits, so that bfloat16 and float16 hold it exactly.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

GROUP = 32  # inputs of an output that share a scale in W4A16; vllm-ascend reads no other number from a checkpoint
INT4_IN_INT32 = 8


class Int4(NamedTuple):
    """A weight [..., out, in] as a checkpoint has it."""

    parameters: "dict[str, Array]"  # by the ends of their names
    rounded: "Array"  # [..., out, in] float32: the values that the parameters stand for


def as_w4a8(weight: "Array", group: int | None = None) -> Int4:
    """Two int4 of neighbouring outputs in a byte, the first one in the low half, and a scale for each output.

    With `group`, there is a second scale for so many inputs of an output, and the first one is 1. scale_bias is 8 times the sum
    of an output's weights: the product of int8 rows lacks it.
    """
    import numpy as np

    values, scale, rounded = _rounded(weight, group or weight.shape[-1])
    channel = np.ones_like(scale[..., :1]) if group else scale
    pairs = values.astype(np.int32).reshape(*weight.shape[:-2], -1, 2, weight.shape[-1])
    packed = (pairs[..., 0, :] & 15) | (pairs[..., 1, :] << 4)
    parameters = {
        "weight": packed.astype(np.int8),
        "weight_scale": channel,
        "weight_offset": np.zeros_like(channel),
        "scale_bias": 8 * rounded.sum(-1, keepdims=True),
    }
    if group:
        parameters |= {"weight_scale_second": scale, "weight_offset_second": np.zeros_like(scale)}
    return Int4(parameters, rounded)


def as_w4a16(weight: "Array") -> Int4:
    """Eight int4 of neighbouring inputs in an int32, each with 8 added, the first one in the lowest bits."""
    import numpy as np

    values, scale, rounded = _rounded(weight, GROUP)
    eights = (values.astype(np.int64) + 8).reshape(*weight.shape[:-1], -1, INT4_IN_INT32)
    packed = (eights << (4 * np.arange(INT4_IN_INT32))).sum(-1).astype(np.uint32).view(np.int32)
    return Int4({"weight_packed": packed, "weight_scale": scale}, rounded)


def compressed_tensors_config() -> dict[str, Any]:
    """The section quantization_config of config.json for a model whose experts are W4A16, and nothing else."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"experts": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
    }


def _rounded(weight: "Array", group: int) -> "tuple[Array, Array, Array]":
    """int4 values [..., out, in], scales [..., out, in / group] float32, and the values that both stand for."""
    import numpy as np

    groups = weight.astype(np.float32).reshape(*weight.shape[:-1], -1, group)
    scale = np.abs(groups).max(-1) / np.float32(7)
    scale = (scale.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    values = np.clip(np.rint(groups / scale[..., None]), -8, 7)
    rounded = (values * scale[..., None]).reshape(weight.shape)
    return values.reshape(weight.shape), scale, rounded
