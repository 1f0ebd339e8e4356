"""What happens to each option of vllm-ascend that touches MoE communication. The options stand in --additional-config.

Standard library only. An engine and `vllm-npu doctor --additional-config` read these tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

# Never run with other communication. Some of them exist in one release line only.
REFUSED_OPTIONS = (
    "enable_mc2_hierarchy_comm",
    "mc2_comm_alg",
    "combine_quant_mode",
)
FUSED_MC2, MAX_FUSED_ROWS = "enable_fused_mc2", "mega_moe_max_tokens"
MAX_FUSED_ROWS_IF_UNSET = 65536  # vllm-ascend's default


class FusedOperator(Enum):
    """The operators of vllm-ascend that dispatch the tokens, compute the experts, and combine. The values are their names."""

    FFN_COMBINE = "dispatch_ffn_combine"
    GMM_COMBINE_DECODE = "dispatch_gmm_combine_decode"


# By release line of vllm-ascend and value of enable_fused_mc2. 0.30 reads 2 and keeps 1, unless the Python package of CANN's
# MegaMoe is installed (ascend_config.py of 0.30.0rc2).
FUSED_OPERATORS = {
    "0.23": {1: FusedOperator.FFN_COMBINE, 2: FusedOperator.GMM_COMBINE_DECODE},
    "0.30": {1: FusedOperator.FFN_COMBINE, 2: FusedOperator.FFN_COMBINE},
}
FUSED_MC2_VALUES = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class FusedMC2Asked:
    """What enable_fused_mc2 asks of vllm-ascend."""

    operator: FusedOperator
    max_rows: int | None
    """The rows that a rank of the operator has room for. It drops more without an error. None: all fit."""


RANDOM_EPLB_POLICY = 0  # eplb_policy_type of vllm-ascend's RandomLoadBalance
RANDOM_EPLB_RANKS = (
    4  # that exchange experts: it names ranks 1 and 3, and with fewer ranks its process ends at the first move
)
TAKEN_OPTIONS = {
    FUSED_MC2: "moe_comm may be fused_mc2, and auto takes it where it fits; other steps take mc2, all2all or allgather. With "
    "2, vllm-ascend 0.23 has it for W8A8 and up to 256 tokens a rank; on 0.30, 2 is as 1, and is refused with CANN's MegaMoe",
    MAX_FUSED_ROWS: "the rows that a rank of fused_mc2 has room for; a step that may bring more goes another way",
    "vllm_npu": "the options of this package",
    "enable_flashcomm1": "each TP rank brings its slice of the tokens",
    "eplb_config": "vllm-ascend balances and moves the experts; tokens go to the replicas that it names. eplb_policy_type "
    f"{RANDOM_EPLB_POLICY} needs {RANDOM_EPLB_RANKS} ranks",
    "multistream_overlap_shared_expert": "shared experts run on a stream of their own, beside dispatch and combine. "
    "In graphs, moe_comm=off needs TASK_QUEUE_ENABLE=0: torch_npu's queue may put tensors outside of the graph's memory",
    "multistream_overlap_gate": "shared experts and router run on a stream of their own; vllm-ascend 0.30 has no such option",
    "enable_shared_expert_dp": "each TP rank has whole shared experts, and a slice of the tokens for them",
    "mix_placement": "needs vllm-ascend 0.23 and W8A8 (--quantization ascend); any other engine is refused",
    "enable_prefill_mc2": "vllm_npu chooses the strategy of each step, so this option has no effect on MoE layers",
    "recompute_scheduler_enable": "a decode node's ranks take mc2 without counts; with another moe_comm they agree on counts",
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
        unknown_value = option == FUSED_MC2 and value not in FUSED_MC2_VALUES
        if unknown_value:
            what = f"vllm-ascend knows no value {value}, so the engine does not start"
        elif option in REFUSED_OPTIONS:
            what = "never run with the strategies of this package, so the engine does not start"
        else:
            what = TAKEN_OPTIONS.get(option, "vllm-ascend's own; this package does not read it")
        rows.append(RecipeRow(option, option in REFUSED_OPTIONS or unknown_value, what))
    return rows


def fused_mc2_asked(additional_config: Mapping[str, Any], release_line: str = "0.23") -> FusedMC2Asked | None:
    """The operator that the options ask for on this line of vllm-ascend. None: they ask for none, and vllm-ascend prepares no
    weights for one."""
    operator = FUSED_OPERATORS[release_line].get(additional_config.get(FUSED_MC2, 0))
    if operator is None:
        return None
    rows = int(additional_config.get(MAX_FUSED_ROWS, MAX_FUSED_ROWS_IF_UNSET))
    return FusedMC2Asked(operator, rows if operator is FusedOperator.FFN_COMBINE else None)
