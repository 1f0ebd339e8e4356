"""A mixture-of-experts layer as options of the command line name it: for bench and plan."""

import torch

from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.limits import MoELayer

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def moe_layer(experts: int, topk: int, hidden: int, dtype: str) -> MoELayer:
    """The layer. Raises UnsupportedConfigError for what cannot be one, naming the option."""
    if dtype not in DTYPES:
        raise UnsupportedConfigError(f"unknown --dtype {dtype!r}; there are: {', '.join(DTYPES)}")
    if topk > experts:
        raise UnsupportedConfigError(f"--topk {topk} of --experts {experts}: a token has fewer to choose")
    return MoELayer(num_experts=experts, top_k=topk, hidden_size=hidden, dtype=DTYPES[dtype])
