"""Which argument values of the MoE operators the emulated device honours, and which it refuses: docs/emulator_arguments.md.

Each row calls an operator on A2 and on A3 and makes a line of the page. A call is honoured where it also gives what golden.py
computes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.emulated import golden
from tests.emulated.references import Layer, distinct_ids, members, random_rows

pytestmark = pytest.mark.emulated

PAGE = Path(__file__).resolve().parents[2] / "docs" / "emulator_arguments.md"
BEGIN, END = "<!-- the table, by tests/emulated/test_documented_arguments.py -->\n\n", "\n<!-- end -->"
CHIPS = ("A2", "A3")
TOKENS, TOP_K, EXPERTS, WIDTH = 4, 3, 8, 32
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A value of an argument. `documented` names the chips whose documents allow it: a device must take it there."""

    argument: str
    value: str
    documented: str = "A2 A3"
    changes: Mapping[str, Any] | None = None  # of the call
    before: Mapping[str, Any] | None = None  # of a combine's dispatch
    layer: Mapping[str, Any] | None = None  # of the tokens and experts
    named: str = ""  # by a refusal, if not the argument


def made(value: Any) -> Any:
    """A tensor on the device, for a tensor."""
    return value.npu() if isinstance(value, torch.Tensor) else value


def mask(*shape: int) -> torch.Tensor:
    """Without the last token. With two dimensions, without the first choice of the first token too."""
    on = torch.ones(shape, dtype=torch.bool)
    on[-1] = False
    if len(shape) == 2:
        on[0, 0] = False
    return on


def positive(*shape: int) -> torch.Tensor:
    return random_rows(*shape, seed=9).abs() + 0.5


HIERARCHY = {"comm_alg": "hierarchy", "expert_scales": torch.ones(TOKENS, TOP_K)}
COPY = {"copy_expert_num": 1, "ori_x": random_rows(TOKENS, WIDTH, dtype=torch.bfloat16)}
CONSTANT = {
    "const_expert_num": 1,
    "ori_x": random_rows(TOKENS, WIDTH, dtype=torch.bfloat16),
    "const_expert_alpha_1": torch.tensor([0.75], dtype=torch.bfloat16),
    "const_expert_alpha_2": torch.tensor([-1.25], dtype=torch.bfloat16),
    "const_expert_v": random_rows(1, WIDTH, dtype=torch.bfloat16, seed=2),
}
OF_COMBINE = (CONSTANT.keys() | COPY.keys()) - {"const_expert_num", "copy_expert_num"}
GIVEN = torch.zeros(8, dtype=torch.int32)
GIVEN_LONG = torch.zeros(2, dtype=torch.int64)


def with_dispatch(rows: list[Row]) -> list[Row]:
    """Rows of a combine, whose dispatch takes the arguments that both have."""
    both = ("x_active_mask", "comm_alg", "global_bs", "zero_expert_num", "copy_expert_num", "const_expert_num")
    return [
        row
        if row.before is not None
        else replace(row, before={name: value for name, value in (row.changes or {}).items() if name in both})
        for row in rows
    ]


def placement_rows(has_special: bool, algorithms: list[Row]) -> list[Row]:
    """The arguments that all versions of dispatch and combine have."""
    special = [
        Row("zero_expert_num", "1", changes={"zero_expert_num": 1}),
        Row("copy_expert_num", "1", changes=COPY),
        Row("const_expert_num", "1", "A3", changes=CONSTANT),
    ]
    return [
        Row("group_ep", "name of the group"),
        Row("ep_world_size", "size of the group"),
        Row("ep_rank_id", "rank in the group"),
        Row("moe_expert_num", "multiple of the ranks"),
        Row("group_tp", "with tp_world_size=2", "A3", {"group_tp": "other", "tp_world_size": 2}, named="tp_world_size"),
        Row("tp_world_size", "0, 1", "A2 A3", {"tp_world_size": 1}),
        Row("tp_world_size", "2", "A3", {"tp_world_size": 2}),
        Row("tp_rank_id", "0"),
        Row("expert_shard_type", "0"),
        Row("expert_shard_type", "1", "", {"expert_shard_type": 1}),
        Row("shared_expert_num", "0, 1 without ranks of their own", "A2 A3", {"shared_expert_num": 0}),
        Row(
            "shared_expert_num",
            "1 to 4 with ranks of their own",
            "A3",
            layer={"shared_experts": 1, "shared_ranks": 1},
            named="shared_expert_rank_num",
        ),
        Row("shared_expert_rank_num", "1", "A3", layer={"shared_experts": 1, "shared_ranks": 1}),
        Row("global_bs", "0"),
        Row("global_bs", "largest batch times ranks", changes={"global_bs": 2 * TOKENS}),
        *algorithms,
        *(special if has_special else []),
    ]


def algorithms(weights: Arguments, documented_v1: str) -> list[Row]:
    return [
        Row("comm_alg", "empty"),
        Row("comm_alg", "fullmesh", "A2", {"comm_alg": "fullmesh"}),
        Row("comm_alg", "fullmesh_v1", documented_v1, {"comm_alg": "fullmesh_v1"}),
        Row("comm_alg", "fullmesh_v2", documented_v1, {"comm_alg": "fullmesh_v2"}),
        Row("comm_alg", "hierarchy", "A2 A3", weights),
        Row("comm_alg", "hierarchy with a copy expert", "", {**weights, **COPY}),
    ]


DISPATCH_1 = [
    Row("x", "bfloat16, float16"),
    Row("expert_ids", "[B, K] int32"),
    Row("scales", "[E, H] with quant_mode=2", changes={"quant_mode": 2, "scales": positive(EXPERTS, WIDTH)}),
    Row("x_active_mask", "given", "", {"x_active_mask": mask(TOKENS)}),
    Row("expert_scales", "[B, K]", changes={"expert_scales": torch.ones(TOKENS, TOP_K)}),
    *placement_rows(False, []),
    Row("quant_mode", "0"),
    Row("quant_mode", "2", changes={"quant_mode": 2}),
    Row("quant_mode", "1", "", {"quant_mode": 1}),
    Row("expert_token_nums_type", "0", changes={"expert_token_nums_type": 0}),
    Row("expert_token_nums_type", "1"),
]
DISPATCH = [
    Row("x", "bfloat16, float16"),
    Row("expert_ids", "[B, K] int32"),
    Row("scales", "[E, H] with quant_mode=2", changes={"quant_mode": 2, "scales": positive(EXPERTS, WIDTH)}),
    Row(
        "scales",
        "[E, H] with comm_alg=hierarchy",
        "A3",
        {**HIERARCHY, "quant_mode": 2, "scales": positive(EXPERTS, WIDTH)},
    ),
    Row("x_active_mask", "[B]", changes={"x_active_mask": mask(TOKENS)}),
    Row("x_active_mask", "[B, K]", "A3", {"x_active_mask": mask(TOKENS, TOP_K)}),
    Row("x_active_mask", "[B] with comm_alg=hierarchy", "A3", {**HIERARCHY, "x_active_mask": mask(TOKENS)}),
    Row("x_active_mask", "[B, K] with comm_alg=hierarchy", "", {**HIERARCHY, "x_active_mask": mask(TOKENS, TOP_K)}),
    Row("expert_scales", "[B, K]", changes={"expert_scales": torch.ones(TOKENS, TOP_K)}),
    Row("elastic_info", "given", "", {"elastic_info": GIVEN}),
    Row("performance_info", "[W] int64", "A2 A3", {"performance_info": GIVEN_LONG}),
    *placement_rows(True, algorithms(HIERARCHY, "A3")),
    Row("quant_mode", "0"),
    Row("quant_mode", "2", changes={"quant_mode": 2}),
    Row("quant_mode", "1", "", {"quant_mode": 1}),
    Row("expert_token_nums_type", "0", changes={"expert_token_nums_type": 0}),
    Row("expert_token_nums_type", "1"),
    Row("y_dtype", "None"),
    Row("x_dtype", "None"),
    Row("scales_dtype", "None"),
]
COMBINE_1 = with_dispatch(
    [
        Row("expand_x", "bfloat16, float16"),
        Row("expert_ids", "[B, K] int32"),
        Row("expand_idx", "dispatch's"),
        Row("ep_send_counts", "dispatch's"),
        Row("expert_scales", "[B, K] float32"),
        Row("tp_send_counts", "dispatch's"),
        Row("x_active_mask", "given", "", {"x_active_mask": mask(TOKENS)}, {}),
        Row("activation_scale", "given", "", {"activation_scale": GIVEN}),
        Row("weight_scale", "given", "", {"weight_scale": GIVEN}),
        Row("group_list", "given", "", {"group_list": GIVEN_LONG}),
        Row("expand_scales", "dispatch's"),
        Row("shared_expert_x", "None"),
        *placement_rows(False, []),
        Row("out_dtype", "0"),
        Row("out_dtype", "1", "", {"out_dtype": 1}),
        Row("comm_quant_mode", "0"),
        Row("comm_quant_mode", "2", "A3", {"comm_quant_mode": 2}),
        Row("comm_quant_mode", "1", "", {"comm_quant_mode": 1}),
        Row("group_list_type", "0"),
        Row("group_list_type", "1", "", {"group_list_type": 1}),
    ]
)
SHARED = random_rows(TOKENS, WIDTH, dtype=torch.bfloat16)
BACK = {"comm_alg": "hierarchy"}  # of the combine; its expert_scales are always there
COMBINE = with_dispatch(
    [
        Row("expand_x", "bfloat16, float16"),
        Row("expert_ids", "[B, K] int32"),
        Row("assist_info_for_combine", "dispatch's"),
        Row("ep_send_counts", "dispatch's"),
        Row("expert_scales", "[B, K] float32"),
        Row("tp_send_counts", "dispatch's"),
        Row("x_active_mask", "[B]", changes={"x_active_mask": mask(TOKENS)}),
        Row("x_active_mask", "[B, K]", "A3", {"x_active_mask": mask(TOKENS, TOP_K)}),
        Row("expand_scales", "dispatch's"),
        Row("shared_expert_x", "[B, H]", "A3", {"shared_expert_x": SHARED}),
        Row(
            "shared_expert_x",
            "[B, H] with ranks of shared experts",
            "",
            {"shared_expert_x": SHARED},
            layer={"shared_experts": 1, "shared_ranks": 1},
            named="shared_expert",
        ),
        Row("elastic_info", "given", "", {"elastic_info": GIVEN}),
        Row("ori_x", "[B, H] with a copy expert", changes=COPY),
        Row("const_expert_alpha_1", "[constant experts]", "A3", CONSTANT, named="const_expert_num"),
        Row("const_expert_alpha_2", "[constant experts]", "A3", CONSTANT, named="const_expert_num"),
        Row("const_expert_v", "[constant experts, H]", "A3", CONSTANT, named="const_expert_num"),
        Row("performance_info", "[W] int64", "A2 A3", {"performance_info": GIVEN_LONG}),
        *placement_rows(True, algorithms(BACK, "A3")),
        Row("comm_quant_mode", "0"),
        Row("comm_quant_mode", "2", "A3", {"comm_quant_mode": 2}),
        Row("comm_quant_mode", "2 with comm_alg=hierarchy", "A2 A3", {**BACK, "comm_quant_mode": 2}),
        Row("comm_quant_mode", "1", "", {"comm_quant_mode": 1}),
    ]
)

IDS = distinct_ids(TOKENS, TOP_K, EXPERTS, seed=3)
X = random_rows(TOKENS, WIDTH)
ROUTING = {"x": X, "expert_idx": IDS, "expert_num": EXPERTS, "expert_tokens_num_flag": True}
PADDED = {"drop_pad_mode": 1, "expert_capacity": 2, "expert_tokens_num_type": 1}
STATIC = {"scale": torch.tensor([40.1]), "offset": torch.tensor([3.3]), "quant_mode": 0}
INIT_ROUTING = [
    Row("x", "float32"),
    Row("x", "bfloat16, float16", changes={"x": X.bfloat16()}),
    Row("x", "int8, without quantisation", changes={"x": X.to(torch.int8)}),
    Row("expert_idx", "[N, K] int32"),
    Row("scale", "[N] with quant_mode=-1", changes={"scale": positive(TOKENS)}),
    Row("scale", "[experts, H] with quant_mode=1", changes={"scale": positive(EXPERTS, WIDTH), "quant_mode": 1}),
    Row("scale", "[1, H] with quant_mode=1", changes={"scale": positive(1, WIDTH), "quant_mode": 1}),
    Row("offset", "[1] with quant_mode=0", changes=STATIC),
    Row("offset", "[1] with quant_mode=1", "", {"offset": torch.ones(1), "quant_mode": 1}),
    Row("active_num", "0 or -1: all rows"),
    Row("active_num", "a number of rows", changes={"active_num": 5}),
    Row("expert_capacity", "with drop_pad_mode=1", changes=PADDED),
    Row("expert_num", "1 to 10240"),
    Row("drop_pad_mode", "0"),
    Row("drop_pad_mode", "1", changes=PADDED),
    *(Row("expert_tokens_num_type", str(kind), changes={"expert_tokens_num_type": kind}) for kind in (0, 1, 2)),
    Row("expert_tokens_num_type", "0, 2 with drop_pad_mode=1", "", {**PADDED, "expert_tokens_num_type": 2}),
    Row("expert_tokens_num_flag", "True"),
    Row("expert_tokens_num_flag", "False", changes={"expert_tokens_num_flag": False}),
    Row("quant_mode", "-1"),
    Row("quant_mode", "0", changes=STATIC),
    Row("quant_mode", "1", changes={"quant_mode": 1}),
    Row("quant_mode", "2, 3: MXFP8", "", {"quant_mode": 2}),
    Row("active_expert_range", "all experts"),
    Row("active_expert_range", "a part", changes={"active_expert_range": [2, 5]}),
    Row("active_expert_range", "a part with drop_pad_mode=1", "", {**PADDED, "active_expert_range": [2, 5]}),
    Row("row_idx_type", "0"),
    Row("row_idx_type", "1", changes={"row_idx_type": 1}),
    Row("row_idx_type", "1 with drop_pad_mode=1", "", {**PADDED, "row_idx_type": 1}),
    Row("x_dtype", "None"),
]
PAIRS = TOKENS * TOP_K
PERMUTATION = torch.randperm(PAIRS, generator=torch.Generator().manual_seed(1)).int()
FINALIZE_BASE = {
    "expanded_permuted_rows": random_rows(PAIRS, WIDTH, dtype=torch.bfloat16),
    "skip1": None,
    "skip2": None,
    "bias": None,
    "scales": random_rows(TOKENS, TOP_K, dtype=torch.bfloat16, seed=5),
    "expanded_src_to_dst_row": PERMUTATION,
    "export_for_source_row": None,
}
SKIP = random_rows(TOKENS, WIDTH, dtype=torch.bfloat16)
BIAS = {"bias": random_rows(EXPERTS, WIDTH, dtype=torch.bfloat16), "export_for_source_row": IDS}
CAPACITY = {"expanded_permuted_rows": random_rows(EXPERTS, 2, WIDTH, dtype=torch.bfloat16)}
NO_ROW = torch.where(PERMUTATION == 0, -1, PERMUTATION)
FINALIZE = [
    Row("expanded_permuted_rows", "bfloat16, float16, float32"),
    Row("skip1", "[N, H]", changes={"skip1": SKIP}),
    Row("skip2", "[N, H] with skip1", changes={"skip1": SKIP, "skip2": SKIP}),
    Row("skip2", "[N, H] without skip1", "", {"skip2": SKIP}),
    Row("bias", "[E, H] with export_for_source_row", changes=BIAS),
    Row("bias", "[E, H] without export_for_source_row", "", {"bias": BIAS["bias"]}),
    Row("scales", "[N, K], type of the rows"),
    Row("scales", "[N, K] float32 with bfloat16 rows", changes={"scales": positive(TOKENS, TOP_K)}),
    Row("expanded_src_to_dst_row", "[N * K] int32"),
    Row(
        "expanded_src_to_dst_row",
        "-1 with a capacity",
        changes={**CAPACITY, "drop_pad_mode": 3, "expanded_src_to_dst_row": NO_ROW},
    ),
    Row("expanded_src_to_dst_row", "-1 without a capacity", "", {"expanded_src_to_dst_row": NO_ROW}),
    Row("export_for_source_row", "[N, K] int32", changes=BIAS),
    Row("drop_pad_mode", "0"),
    Row("drop_pad_mode", "1", changes={**CAPACITY, "drop_pad_mode": 1}),
    Row("drop_pad_mode", "2", changes={"drop_pad_mode": 2}),
    Row("drop_pad_mode", "3", changes={**CAPACITY, "drop_pad_mode": 3}),
    Row("k", "1, the default"),
]
LOGITS = random_rows(TOKENS, 16)
TABLE_OF_IDS = {"tid2eid": torch.tensor([[0, 1], [7, 3]], dtype=torch.int32)}
HASHED = {"input_ids": torch.tensor([0, 1, 1, 0], dtype=torch.int32), **TABLE_OF_IDS}
GATING = [
    Row("x", "float32, float16, bfloat16"),
    Row("k", "1 to the experts of k_group groups"),
    Row("bias", "[E]", changes={"bias": random_rows(16, seed=6)}),
    Row("input_ids", "[N] with tid2eid", changes=HASHED),
    Row("tid2eid", "[ids, k] with input_ids", changes=HASHED),
    Row("tid2eid", "without input_ids", "", TABLE_OF_IDS),
    Row("k_group", "2", changes={"k_group": 2, "group_count": 4}),
    Row("group_count", "4", changes={"k_group": 2, "group_count": 4}),
    Row(
        "group_count",
        "groups that need more than 2048 padded experts",
        "",
        {"x": random_rows(2, 520), "group_count": 104},
    ),
    Row("group_select_mode", "0"),
    Row("group_select_mode", "1", changes={"k_group": 2, "group_count": 4, "group_select_mode": 1}),
    Row("renorm", "0"),
    Row("renorm", "1", "", {"renorm": 1}),
    Row("norm_type", "0"),
    Row("norm_type", "1", changes={"norm_type": 1}),
    Row("out_flag", "False"),
    Row("out_flag", "True", changes={"out_flag": True}),
    Row("routed_scaling_factor", "2.5", changes={"routed_scaling_factor": 2.5}),
    Row("eps", "1e-6", changes={"eps": 1e-6}),
]
FINISHED = torch.tensor([False, True, False, False])
GATING_SOFTMAX = [
    Row("x", "float32, float16, bfloat16"),
    Row("finished", "[N] bool", changes={"finished": FINISHED}),
    Row("k", "1 to 1024"),
]
GATING_SOFTMAX_2 = [
    *GATING_SOFTMAX,
    Row("renorm", "0"),
    Row("renorm", "1", changes={"renorm": 1}),
    Row("output_softmax", "True with renorm=0", changes={"output_softmax": True}),
    Row("output_softmax", "True with renorm=1: no effect", changes={"output_softmax": True, "renorm": 1}),
]
COUNTS = torch.tensor([[2, 0], [1, 1]])
RE_ROUTING = [
    Row("tokens", "bfloat16, float16"),
    Row("tokens", "int8", changes={"tokens": X.to(torch.int8)}),
    Row("expert_token_num_per_rank", "[W, E] int64"),
    Row("expert_token_num_per_rank", "[W, E] int32", changes={"expert_token_num_per_rank": COUNTS.int()}),
    Row("per_token_scales", "[A] float32", changes={"per_token_scales": positive(TOKENS)}),
    Row("expert_token_num_type", "1"),
    Row("expert_token_num_type", "0", "", {"expert_token_num_type": 0}),
    Row("idx_type", "0"),
    Row("idx_type", "1", "", {"idx_type": 1}),
    Row("tokens_dtype", "None"),
]


@dataclass(frozen=True)
class Operator:
    """How an operator is called, and what states its arguments."""

    rows: list[Row]
    base: Mapping[str, Any] | None  # of the call; None: dispatch or combine, by a group
    source: str


# Arguments that torch_npu 2.13 has and 2.10 has not. The page is that of 2.13.
SINCE_2_13 = {"npu_moe_finalize_routing": {"k"}, "npu_moe_gating_top_k": {"input_ids", "tid2eid"}}
DOCUMENT = "document of {} in CANN's ops-transformer"
MC2 = "document of {} and its op_tiling in CANN's ops-transformer"
OPERATORS = {
    "npu_moe_distribute_dispatch": Operator(DISPATCH_1, None, MC2.format("aclnnMoeDistributeDispatch")),
    "npu_moe_distribute_combine": Operator(COMBINE_1, None, MC2.format("aclnnMoeDistributeCombine")),
    "npu_moe_distribute_dispatch_v2": Operator(DISPATCH, None, MC2.format("aclnnMoeDistributeDispatchV4")),
    "npu_moe_distribute_combine_v2": Operator(COMBINE, None, MC2.format("aclnnMoeDistributeCombineV4")),
    "npu_moe_init_routing_v2": Operator(INIT_ROUTING, ROUTING, DOCUMENT.format("aclnnMoeInitRoutingV3")),
    "npu_moe_finalize_routing": Operator(FINALIZE, FINALIZE_BASE, DOCUMENT.format("aclnnMoeFinalizeRoutingV2")),
    "npu_moe_gating_top_k": Operator(GATING, {"x": LOGITS, "k": 2}, DOCUMENT.format("aclnnMoeGatingTopK")),
    "npu_moe_gating_top_k_softmax": Operator(
        GATING_SOFTMAX, {"x": LOGITS, "k": 2}, DOCUMENT.format("aclnnMoeGatingTopKSoftmax")
    ),
    "npu_moe_gating_top_k_softmax_v2": Operator(
        GATING_SOFTMAX_2, {"x": LOGITS, "k": 2}, DOCUMENT.format("aclnnMoeGatingTopKSoftmaxV2")
    ),
    "npu_moe_re_routing": Operator(
        RE_ROUTING,
        {"tokens": X.bfloat16(), "expert_token_num_per_rank": COUNTS},
        DOCUMENT.format("moe_re_routing"),
    ),
}


def arguments_of(name: str) -> set[str]:
    return {argument.name for argument in getattr(torch.ops.npu, name).default._schema.arguments}


def is_installed(name: str, argument: str) -> bool:
    """False for an argument that an older torch_npu has not."""
    return argument not in SINCE_2_13.get(name, ()) or argument in arguments_of(name)


def installed_rows() -> list[tuple[str, Row]]:
    return [
        (name, row) for name, operator in OPERATORS.items() for row in operator.rows if is_installed(name, row.argument)
    ]


def of_installed(table: str) -> str:
    """The table without the lines of arguments that the installed torch_npu has not."""
    lines, name = [], ""
    for line in table.splitlines(keepends=True):
        if line.startswith("### "):
            name = line.removeprefix("### ").strip()
        if not line.startswith("| ") or is_installed(name, line.split(" | ")[0].removeprefix("| ")):
            lines.append(line)
    return "".join(lines)


def as_tuple(returned: Any) -> tuple[torch.Tensor, ...]:
    return (returned,) if isinstance(returned, torch.Tensor) else tuple(returned)


def call(op: Any, taken: Arguments, changes: Mapping[str, Any] | None) -> tuple[torch.Tensor, ...]:
    """Calls with those of the arguments that this version of the operator has, and with all changes."""
    known = arguments_of(op.__name__)
    arguments = {name: value for name, value in taken.items() if name in known} | dict(changes or {})
    return as_tuple(op(**{name: made(value) for name, value in arguments.items()}))


def compare(what: str, outputs: Sequence[torch.Tensor], wanted: list[golden.Array], **tolerance: float) -> None:
    for place, (output, right) in enumerate(zip(outputs, wanted, strict=False)):
        different = golden.difference(output, right, **tolerance)
        assert different is None, f"{what}: output {place} {different}"


def layer_with(row: Row, num_ranks: int, arguments: Mapping[str, Any]) -> Layer:
    """The tokens and experts of a call with these arguments."""
    given = arguments.get("x_active_mask")
    special = tuple(arguments.get(f"{kind}_expert_num", 0) for kind in ("zero", "copy", "const"))
    return Layer(
        num_ranks,
        [TOKENS] * num_ranks,
        masks=None if given is None else [given] * num_ranks,
        special=special,
        global_bs=arguments.get("global_bs", 0),
        top_k=TOP_K,
        experts_per_rank=EXPERTS // num_ranks,
        width=WIDTH,
        **(row.layer or {}),
    )


def call_in_group(name: str, row: Row, rank: int, num_ranks: int) -> None:
    """Dispatch, and combine after it; compares what the one of this name gives."""
    npu = torch.ops.npu
    is_combine, version = "combine" in name, "_v2" if name.endswith("_v2") else ""
    changes = dict(row.changes or {})
    before = dict(row.before or {}) if is_combine else {k: v for k, v in changes.items() if k not in OF_COMBINE}
    layer = layer_with(row, num_ranks, before)
    if is_combine and before.get("comm_alg") == "hierarchy":
        before["expert_scales"] = layer.weights[rank]
    taken = members(layer, rank) | {"x": layer.x[rank], "expert_ids": layer.ids[rank]}
    sent = call(getattr(npu, f"npu_moe_distribute_dispatch{version}"), taken, before)
    expand_x, scales, index, counts, recv_counts, tp_counts, expand_scales = sent
    if not is_combine:
        of_values = {key: before[key] for key in ("quant_mode", "scales", "expert_token_nums_type") if key in before}
        wanted = golden.dispatch(layer, rank, **of_values)
        compare(f"{name}, {row}", (expand_x, scales, counts), wanted)
        return
    sent_back = {
        "expand_x": expand_x,
        "expand_idx": index,
        "assist_info_for_combine": index,
        "ep_send_counts": recv_counts,
        "tp_send_counts": tp_counts,
        "expand_scales": expand_scales,
        "expert_scales": layer.weights[rank],
    }
    outputs = call(getattr(npu, name), taken | sent_back, changes)
    tolerance = {"relative": 0.05} if changes.get("comm_quant_mode") else {}  # int8 on the wire
    compare(f"{name}, {row}", outputs, golden.combine(layer, rank, changes), **tolerance)


def outcomes(rank: int, num_ranks: int) -> list[bool]:
    """Whether each row is honoured. A refusal must name the argument."""
    honoured = []
    for name, row in installed_rows():
        base = OPERATORS[name].base
        try:
            if base is None:
                call_in_group(name, row, rank, num_ranks)
            else:
                arguments = dict(base) | dict(row.changes or {})
                outputs = call(getattr(torch.ops.npu, name), arguments, None)
                compare(f"{name}, {row}", outputs, golden.SINGLE[name](**arguments))
            torch.npu.synchronize()
        except RuntimeError as error:
            if (row.named or row.argument) not in str(error):
                raise AssertionError(f"{name}, {row} is refused without its name") from error
            honoured.append(False)
        else:
            honoured.append(True)
    return honoured


def table(honoured: Mapping[str, list[bool]]) -> str:
    def chips(flags: Mapping[str, bool]) -> str:
        return ", ".join(chip for chip, flag in flags.items() if flag) or "–"

    lines, place = [], 0
    for name, operator in OPERATORS.items():
        lines += [f"### {name}", "", f"Source: {operator.source}.", ""]
        lines += ["| argument | value | documented for | honoured on | refused on |", "|---|---|---|---|---|"]
        for row in (row for name_of_row, row in installed_rows() if name_of_row == name):
            here = {chip: honoured[chip][place] for chip in CHIPS}
            documented = chips({chip: chip in row.documented.split() for chip in CHIPS})
            refused = chips({chip: not flag for chip, flag in here.items()})
            lines.append(f"| {row.argument} | {row.value} | {documented} | {chips(here)} | {refused} |")
            place += 1
        lines.append("")
    return "\n".join(lines)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_argument_has_a_row(name: str) -> None:
    assert {row.argument for of, row in installed_rows() if of == name} == arguments_of(name)


def test_the_page_has_what_is_honoured_and_refused(run_in_ranks: Callable[..., Any], tmp_path: Path) -> None:
    """Small sizes, so LIMITS=none: the chips' limits of sizes have tests of their own."""
    honoured = {}
    for chip in CHIPS:
        first, second = run_in_ranks(outcomes, 2, soc=chip, env={"VLLM_NPU_EMULATOR_LIMITS": "none"}).returned
        assert first == second
        honoured[chip] = first
    made_table = table(honoured)
    rows = installed_rows()
    for chip in CHIPS:
        taken = [
            f"{name}: {row.argument} = {row.value}"
            for (name, row), flag in zip(rows, honoured[chip], strict=True)
            if flag and chip not in row.documented.split()
        ]
        assert not taken, f"{chip} takes what its documents do not allow"
    written = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    right = tmp_path / "table.md"
    right.write_text(made_table)
    assert of_installed(written) == made_table, f"the table of {PAGE} is stale; copy that of {right}"
