"""What happens to each option of vllm-ascend that touches MoE communication. The options stand in --additional-config.

Standard library and envs only. An engine and `vllm-npu doctor --additional-config` read these tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from vllm_npu.envs import HCCL_INTRA_PCIE_ENABLE, HCCL_INTRA_ROCE_ENABLE
from vllm_npu.errors import UnsupportedConfigError

MC2_ALGORITHM, HIERARCHY_COMM, COMBINE_QUANT_MODE = "mc2_comm_alg", "enable_mc2_hierarchy_comm", "combine_quant_mode"
FULL_MESH, FULL_MESH_V2, HIERARCHY = "fullmesh", "fullmesh_v2", "hierarchy"
ONLY_IN_LINE = {
    MC2_ALGORITHM: "0.30",
    COMBINE_QUANT_MODE: "0.30",
}  # vllm-ascend 0.23 ignores keys that it does not know
INT8_GROUPS = 2  # combine_quant_mode with which a row comes back as int8 numbers, with a scale for each group of them


@dataclass(frozen=True, slots=True)
class MC2Asked:
    """What vllm-ascend's options ask of MC2's two ops."""

    algorithm: str = ""
    """A value of mc2_comm_alg. Empty: the ops choose, which take the full mesh."""
    combine_quant_mode: int = 0
    """The form in which rows come back: comm_quant_mode of the combine. 0: as the experts give them."""
    hierarchy_by_variables: bool = False
    """Whether HCCL's two variables ask for the hierarchy. A2's ops obey them where no algorithm is named (document of
    npu_moe_distribute_dispatch_v2)."""


ASKED_NOTHING = MC2Asked()
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
# Of options whose other values vllm-ascend refuses, or runs as something else.
KNOWN_VALUES: dict[str, tuple[Any, ...]] = {
    FUSED_MC2: FUSED_MC2_VALUES,
    MC2_ALGORITHM: ("", FULL_MESH, FULL_MESH_V2, HIERARCHY),
    COMBINE_QUANT_MODE: (0, INT8_GROUPS, 3, 4),
}


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
    MC2_ALGORITHM: "mc2's ops take this algorithm, and mc2 has its limits; a chip that has no such algorithm is refused",
    HIERARCHY_COMM: "mc2's ops take the hierarchy, and mc2 has its limits",
    COMBINE_QUANT_MODE: "mc2's rows come back in this form, where the chip's op has it: 2 is int8",
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


def rows_of_recipe(additional_config: Mapping[str, Any], release_line: str) -> list[RecipeRow]:
    """What happens to each option of --additional-config, in its order. An option that is off (false, 0, null) is no row."""
    rows = []
    takes_no_fused = mc2_asked(additional_config, release_line).algorithm == HIERARCHY
    for option, value in additional_config.items():
        if not value:
            continue
        is_there = ONLY_IN_LINE.get(option, release_line) == release_line
        is_refused = is_there and option in KNOWN_VALUES and value not in KNOWN_VALUES[option]
        if not is_there:
            what = f"vllm-ascend {release_line} has no such option, so it has no effect"
        elif is_refused:
            what = f"vllm-ascend knows no value {value}, so the engine does not start"
        elif takes_no_fused and option == FUSED_MC2:
            is_refused = True
            what = f"vllm-ascend takes no fused MC2 beside MC2's {HIERARCHY}, so the engine does not start"
        else:
            what = TAKEN_OPTIONS.get(option, "vllm-ascend's own; this package does not read it")
        rows.append(RecipeRow(option, is_refused, what))
    return rows


def mc2_asked(additional_config: Mapping[str, Any], release_line: str) -> MC2Asked:
    """What the options ask of MC2's ops on this line of vllm-ascend. Reads two environment variables of HCCL.

    vllm-ascend refuses values of another type than an option's. Here they ask for nothing, and rows_of_recipe names them.
    """
    given = {
        option: additional_config.get(option)
        for option in (MC2_ALGORITHM, HIERARCHY_COMM, COMBINE_QUANT_MODE)
        if ONLY_IN_LINE.get(option, release_line) == release_line
    }
    named, mode = given.get(MC2_ALGORITHM), given.get(COMBINE_QUANT_MODE)
    algorithm = HIERARCHY if given[HIERARCHY_COMM] else named if isinstance(named, str) else ""
    by_variables = (HCCL_INTRA_PCIE_ENABLE.read(), HCCL_INTRA_ROCE_ENABLE.read()) == ("1", "0")
    return MC2Asked(algorithm, mode if isinstance(mode, int) else 0, by_variables)


def fused_mc2_asked(additional_config: Mapping[str, Any], release_line: str = "0.23") -> FusedMC2Asked | None:
    """The operator that the options ask for on this line of vllm-ascend. None: they ask for none, and vllm-ascend prepares no
    weights for one. Raises UnsupportedConfigError for a number of rows that is none."""
    value = additional_config.get(FUSED_MC2, 0)
    operator = FUSED_OPERATORS[release_line].get(value) if isinstance(value, int) else None
    if operator is None:
        return None
    rows = additional_config.get(MAX_FUSED_ROWS, MAX_FUSED_ROWS_IF_UNSET)
    if not isinstance(rows, int):
        raise UnsupportedConfigError(f"additional_config {MAX_FUSED_ROWS} is {rows!r}, which is no number of rows")
    return FusedMC2Asked(operator, rows if operator is FusedOperator.FFN_COMBINE else None)
