"""A mixture-of-experts layer from options of the command line, for bench, plan, simulate and doctor."""

import json
from pathlib import Path
from typing import Any

import torch

from vllm_npu.core.limits import MoELayer
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.strategies.planning import facts_of_config

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def moe_layer(experts: int, topk: int, hidden: int, dtype: str) -> MoELayer:
    """The layer with these numbers. Raises UnsupportedConfigError, which names the option, if no layer can have them."""
    if dtype not in DTYPES:
        raise UnsupportedConfigError(f"unknown --dtype {dtype!r}; there are: {', '.join(DTYPES)}")
    if topk > experts:
        raise UnsupportedConfigError(f"--topk {topk} of --experts {experts}: a token has fewer to choose")
    return MoELayer(num_experts=experts, top_k=topk, hidden_size=hidden, dtype=DTYPES[dtype])


def layer_of_model(
    model: Path | None,
    *,
    experts: int | None = None,
    topk: int | None = None,
    hidden: int | None = None,
    dtype: str | None = None,
) -> MoELayer:
    """The layer of a config.json or of the folder that holds it. A number that is given replaces the one in the file."""
    given: dict[str, Any] = {"experts": experts, "topk": topk, "hidden": hidden, "dtype": dtype}
    if model is not None:
        path = model / "config.json" if model.is_dir() else model
        try:
            config = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise UnsupportedConfigError(f"--model {path} cannot be read as a config.json: {error}") from error
        if not isinstance(config, dict):
            raise UnsupportedConfigError(f"--model {path} is not a config.json: it holds no object")
        given = {
            name: given[name] if given[name] is not None else found for name, found in facts_of_config(config).items()
        }
    given["dtype"] = given["dtype"] or "bfloat16"
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if missing:
        raise UnsupportedConfigError(f"{', '.join(missing)} not given, nor in --model's config.json; give them")
    return moe_layer(**given)
