"""Which routing of a model cannot run on a CPU, as far as its config.json tells. Imports no vLLM, so any command may ask."""

from collections.abc import Mapping
from typing import Any

SCORE_NAMES = ("softmax", "sigmoid", "sqrtsoftplus")
"""Scores that routing.choose_experts computes. vLLM 0.32 knows no others."""

# The keys from which vLLM 0.32's models take their scores, as they are.
_SCORE_KEYS = (
    "scoring_func",
    "score_function",
    "score_func",
    "moe_router_activation",
    "moe_router_activation_func",
    "router_score_func",
)

# Models whose code in vLLM puts the weight on the input whatever config.json says.
_WEIGHT_ON_INPUT_TYPES = frozenset({"llama4_text"})

UNKNOWN_SCORES = f"router scores {{scores!r}} are not supported; supported: {', '.join(SCORE_NAMES)}"
ZERO_EXPERTS = (
    "zero experts return a token as it is, and their places among a token's experts hold no expert. No strategy moves such "
    "tokens; run this model without expert and data parallelism"
)
WEIGHT_ON_INPUT = (
    "the router's weight goes on the experts' input, which is possible with one expert for each token only, and this model "
    "chooses {top_k}; run it without expert and data parallelism"
)


def why_not_routed(config: Mapping[str, Any]) -> str | None:
    """Reason why layers that exchange tokens cannot run this model's routing on a CPU, or None. Ask if DP or EP is on.

    `config` is the text part of config.json. The runner asks again when it builds a layer.
    """
    if config.get("zero_expert_num") and config.get("zero_expert_type") is not None:
        return ZERO_EXPERTS
    top_k = config.get("num_experts_per_tok")
    on_input = config.get("moe_apply_router_weight_on_input") or str(config.get("model_type")) in _WEIGHT_ON_INPUT_TYPES
    if on_input and isinstance(top_k, int) and top_k > 1:
        return WEIGHT_ON_INPUT.format(top_k=top_k)
    for key in _SCORE_KEYS:
        if isinstance(scores := config.get(key), str) and scores not in SCORE_NAMES:
            return f"{key}: " + UNKNOWN_SCORES.format(scores=scores)
    return None
