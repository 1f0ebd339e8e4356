"""A mixture-of-experts layer and its device from options of the command line, for bench, plan, simulate and doctor."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from vllm_npu.core.ascend_recipes import fused_mc2_asked, mc2_asked
from vllm_npu.core.limits import DEVICES, PORTABLE, DeviceLimits, MoELayer, QuantMode
from vllm_npu.core.model_facts import ModelFacts
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin.entry_points import vllm_ascend_version
from vllm_npu.plugin.release_lines import ascend_line
from vllm_npu.strategies.start_checks import check_choice

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def moe_layer(experts: int, topk: int, hidden: int, dtype: str) -> MoELayer:
    """The layer with these numbers. Raises UnsupportedConfigError, which names the option, if no layer can have them."""
    if dtype not in DTYPES:
        raise UnsupportedConfigError(f"unknown --dtype {dtype!r}; there are: {', '.join(DTYPES)}")
    check_choice(topk, experts)
    return MoELayer(num_experts=experts, top_k=topk, hidden_size=hidden, dtype=DTYPES[dtype])


def layer_of_model(
    model: ModelFacts,
    *,
    experts: int | None = None,
    topk: int | None = None,
    hidden: int | None = None,
    dtype: str | None = None,
    w8a8: bool = False,
) -> MoELayer:
    """The layer of a model. A number that is given replaces the one of the model. Its rows travel as int8 if `w8a8`, or if
    config.json says that the experts are W8A8.

    Raises UnsupportedConfigError, which names the options to give, for numbers that neither has.
    """
    experts, topk, hidden = experts or model.num_experts, topk or model.top_k, hidden or model.hidden_size
    if experts is None or topk is None or hidden is None:
        given = {"--experts": experts, "--topk": topk, "--hidden": hidden}
        missing = [name for name, value in given.items() if value is None]
        raise UnsupportedConfigError(f"{', '.join(missing)} not given, nor in --model's config.json; give them")
    layer = moe_layer(experts, topk, hidden, dtype or model.dtype or "bfloat16")
    return replace(layer, quant_mode=QuantMode.INT8_PER_TOKEN) if w8a8 or model.w8a8_experts else layer


def device_of_engine(soc: str | None, additional_config: Mapping[str, Any], *, ep_size: int) -> DeviceLimits:
    """The limits of these chips for an engine of the installed vllm-ascend with these options; without one, for 0.23. `soc`
    None: of a machine without an NPU.

    Raises UnsupportedConfigError for an unknown family, and as DeviceLimits.with_mc2.
    """
    if soc is not None and soc not in DEVICES:
        raise UnsupportedConfigError(f"there is no --soc {soc}; name one of {', '.join(DEVICES)}")
    device, line = PORTABLE if soc is None else DEVICES[soc], ascend_line(vllm_ascend_version())
    if ep_size > 1:
        device = device.with_mc2(mc2_asked(additional_config, line))
    return replace(device, fused_mc2_asked=fused_mc2_asked(additional_config, line))
