"""What happens to each option of vllm-ascend that touches MoE communication. The options stand in --additional-config.

Standard library only. An engine and `vllm-npu doctor --additional-config` read these tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Never run with other communication. Some of them exist in one release line only.
REFUSED_OPTIONS = (
    "enable_fused_mc2",
    "enable_mc2_hierarchy_comm",
    "mc2_comm_alg",
    "combine_quant_mode",
)
TAKEN_OPTIONS = {
    "vllm_npu": "the options of this package",
    "enable_flashcomm1": "each TP rank brings its slice of the tokens",
    "eplb_config": "vllm-ascend balances and moves the experts; tokens go to the replicas that it names",
    "multistream_overlap_shared_expert": "shared experts run on a stream of their own, beside dispatch and combine",
    "multistream_overlap_gate": "shared experts and router run on a stream of their own; vllm-ascend 0.30 has no such option",
    "enable_shared_expert_dp": "needs enable_flashcomm1; an engine without it is refused",
    "mix_placement": "needs vllm-ascend 0.23 and W8A8 (--quantization ascend); any other engine is refused",
    "enable_prefill_mc2": "vllm_npu chooses the strategy of each step, so this option has no effect on MoE layers",
    "recompute_scheduler_enable": "a KV consumer that skips the agreement on token counts is refused when its layers are built",
}


@dataclass(frozen=True, slots=True)
class RecipeRow:
    """One option of a recipe."""

    option: str
    is_refused: bool
    what: str


def rows_of_recipe(additional_config: Mapping[str, Any]) -> list[RecipeRow]:
    """What happens to each option of --additional-config, in its order. An option that is off (false, 0, null) is no row."""
    rows = []
    for option, value in additional_config.items():
        if not value:
            continue
        if option in REFUSED_OPTIONS:
            what = "never run with the strategies of this package, so the engine does not start"
        else:
            what = TAKEN_OPTIONS.get(option, "vllm-ascend's own; this package does not read it")
        rows.append(RecipeRow(option, option in REFUSED_OPTIONS, what))
    return rows
