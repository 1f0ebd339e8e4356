"""Real engines of vLLM beside vllm-ascend: every strategy gives the tokens of vllm-ascend alone."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ascend.engine_program import OWN
from tests.ascend.test_layer import EMULATED_A3, LINE, PLUGINS, STRATEGIES
from tests.lora_adapter import ATTENTION, RANK, write_adapter
from tests.time_limits import PATIENCE_SECONDS
from vllm_npu.tools.demo.ascend_demo import FEWER_TOKENS, INT4_EXPERTS, MODELS, QWEN3_MOE_INT8, for_ascend
from vllm_npu.tools.engines.tiny_models import DEEPSEEK_V3, QWEN3_MOE, write_tiny_model

PROGRAM = Path(__file__).with_name("engine_program.py")


def run_engine(plugins: str, *, env: dict[str, str] | None = None, **given: Any) -> subprocess.CompletedProcess[str]:
    """Run engine_program.py in a process of its own, on emulated A3."""
    variables = EMULATED_A3 | {"VLLM_PLUGINS": plugins, "TORCHDYNAMO_DISABLE": "1"}
    return subprocess.run(
        [sys.executable, str(PROGRAM), json.dumps(given)],
        env=os.environ | variables | (env or {}),
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_SECONDS,
        check=False,
    )


def generate(plugins: str, **given: Any) -> dict[str, Any]:
    """What engine_program.py reports."""
    return report_of(run_engine(plugins, **given))


def report_of(process: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    found = [line for line in process.stdout.splitlines() if line.startswith('{"tokens"')]
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    report: dict[str, Any] = json.loads(found[0])
    return report


def alone(folder: Path, **given: Any) -> dict[str, Any]:
    """What an engine of vllm-ascend alone reports, on two TP ranks."""
    return generate(PLUGINS.replace("vllm_npu", "ascend"), model=str(folder), tp=2, **given)


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory):
    """A checkpoint, and the tokens that vllm-ascend alone generates from it on two TP ranks."""
    folder = write_tiny_model(MODELS[0], tmp_path_factory.mktemp("qwen3-moe") / "model")
    return folder, alone(folder)["tokens"][OWN]


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE_SECONDS)
def test_every_strategy_gives_vllm_ascends_tokens_over_two_tp_ranks(qwen3_moe):
    folder, theirs = qwen3_moe
    ours = generate(PLUGINS, model=str(folder), tp=2, strategies=STRATEGIES)
    assert ours["ran"] == {name: [name, name] for name in STRATEGIES}
    assert ours["tokens"] == dict.fromkeys(STRATEGIES, theirs)
    assert sum(map(len, theirs)) == 4 * len(theirs) > 0


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE_SECONDS)
@pytest.mark.parametrize("kind", INT4_EXPERTS)
def test_every_strategy_gives_vllm_ascends_tokens_with_int4_experts(tmp_path, kind):
    folder = write_tiny_model(INT4_EXPERTS[kind], tmp_path / "model", quantised=kind)
    # vllm-ascend reads LLM-Compressor's format without an option, and its W4A8 computes in bfloat16 alone.
    options = {"dtype": "bfloat16", "quantization": "ascend"} if kind == "W4A8" else {}
    given = {"options": options, "max_tokens": list(FEWER_TOKENS)}
    theirs = alone(folder, **given)["tokens"][OWN]
    ours = generate(PLUGINS, model=str(folder), tp=2, **given, strategies=STRATEGIES)
    assert ours["ran"] == {name: [name, name] for name in STRATEGIES}
    assert ours["tokens"] == dict.fromkeys(STRATEGIES, theirs)
    assert sum(map(len, theirs)) == sum(FEWER_TOKENS)


ADAPTERS = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 1}
TIE = 2**-8  # two steps of float16 between 2 and 4, where the logits are: each of two tokens may move by one
BESIDE_EXPERTS = ADAPTERS | {"lora_target_modules": list(ATTENTION)}


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE_SECONDS)
@pytest.mark.parametrize("on_experts", [False, True])
@pytest.mark.skipif(
    LINE == "0.23",
    reason="vllm-ascend 0.23 refuses adapters on experts beside expert parallelism, and alone it ends with those on attention "
    "over two TP ranks: a tensor of size 8 must match one of size 16",
)
def test_an_adapter_changes_the_tokens_as_with_vllm_ascend_alone(qwen3_moe, tmp_path, on_experts):
    folder, without = qwen3_moe
    adapter = write_adapter(tmp_path / "adapter", MODELS[0].config, on_experts=on_experts)
    given = {"adapter": str(adapter), "options": ADAPTERS if on_experts else BESIDE_EXPERTS, "margins": True}
    report = alone(folder, **given)
    theirs = report["tokens"][OWN]
    assert theirs[::2] == without[::2]
    assert all(changed != plain for changed, plain in zip(theirs[1::2], without[1::2], strict=True))
    decided = [number for number, margin in enumerate(report["margins"][OWN]) if margin > TIE]
    assert len(decided) >= len(theirs) - 1, report["margins"]
    ours = generate(PLUGINS, model=str(folder), tp=2, **given, strategies=STRATEGIES)
    assert ours["ran"] == {name: [name, name] for name in STRATEGIES}
    for name in STRATEGIES:
        for number in decided:
            assert ours["tokens"][name][number] == theirs[number], (name, number)


@pytest.fixture(scope="module")
def deepseek_v3(tmp_path_factory):
    """A checkpoint, and the tokens that vllm-ascend alone generates from it on two TP ranks."""
    folder = write_tiny_model(MODELS[1], tmp_path_factory.mktemp("deepseek-v3") / "model")
    return folder, alone(folder)["tokens"][OWN]


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE_SECONDS)
@pytest.mark.parametrize(
    "option",
    [
        "multistream_overlap_shared_expert",
        "enable_shared_expert_dp",
        pytest.param(
            "multistream_overlap_gate",
            marks=pytest.mark.skipif(LINE != "0.23", reason="vllm-ascend 0.30 has no multistream_overlap_gate"),
        ),
    ],
)
def test_shared_experts_beside_the_routed_ones_give_the_same_tokens(deepseek_v3, option):
    folder, theirs = deepseek_v3
    ours = generate(
        PLUGINS,
        model=str(folder),
        tp=2,
        env={"VLLM_NPU_EMULATOR_ASYNC": "7"},  # threads with random delays are the streams: a missing event shows
        options={"additional_config": {option: True}},
        strategies=STRATEGIES,
        rounds=2,
    )
    assert ours["ran"] == {name: [name, name] for name in STRATEGIES}
    assert ours["tokens"] == dict.fromkeys(STRATEGIES, theirs * 2)


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE_SECONDS)
def test_prompts_of_latent_attention_in_chunks_give_the_same_tokens(deepseek_v3):
    """The later chunks attend to rows of the cache, which one operator joins. In float16 vllm-ascend gives this operator
    rotated rows of another type than the cache's."""
    folder, _ = deepseek_v3
    chunks = {"dtype": "bfloat16", "enable_chunked_prefill": True, "max_num_batched_tokens": 8}
    given = {"options": chunks, "max_tokens": 3}  # the fourth token of one prompt is a tie in bfloat16
    theirs = alone(folder, **given)["tokens"][OWN]
    ours = run_engine(
        PLUGINS, model=str(folder), tp=2, **given, strategies=STRATEGIES, env={"VLLM_NPU_EMULATOR_TRACE": "1"}
    )
    report = report_of(ours)
    assert report["ran"] == {name: [name, name] for name in STRATEGIES}
    assert report["tokens"] == dict.fromkeys(STRATEGIES, theirs)
    joins = "ATB PagedCacheLoad" if LINE == "0.23" else "aclnnGatherPaKvCache"
    assert joins in ours.stdout + ours.stderr


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE_SECONDS)
def test_fused_mc2_gives_the_tokens_of_vllm_ascend_with_and_without_it(qwen3_moe):
    folder, theirs = qwen3_moe
    fused = {"options": {"additional_config": {"enable_fused_mc2": 1}}}
    assert alone(folder, **fused)["tokens"][OWN] == theirs
    ours = generate(PLUGINS, model=str(folder), tp=2, **fused, strategies=["fused_mc2", "auto", "mc2"])
    assert ours["ran"] == {"fused_mc2": ["fused_mc2"] * 2, "auto": ["fused_mc2"] * 2, "mc2": ["mc2"] * 2}
    assert ours["tokens"] == dict.fromkeys(ours["ran"], theirs)


# vllm-ascend's options for MC2's ops that two ranks of A3 take (the hierarchy takes 16), whether the model is in W8A8, and the
# arguments that dispatch and combine then get. Prompts travel by MC2 too, since ALLTOALL has no int8 rows on the way back.
MC2_OPTIONS = {
    "fullmesh_v2": ({"mc2_comm_alg": "fullmesh_v2"}, False, ("fullmesh_v2", 0, 0)),
    "int8 rows": ({"combine_quant_mode": 2}, False, ("", 0, 2)),
    "both, W8A8": ({"mc2_comm_alg": "fullmesh_v2", "combine_quant_mode": 2}, True, ("fullmesh_v2", 2, 2)),
}
DECODE_GRAPHS = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}


INT8: dict[str, Any] = {"dtype": "bfloat16", "quantization": "ascend"}


@pytest.fixture(scope="module")
def qwen3_moe_int8(tmp_path_factory):
    """A checkpoint in W8A8, and the FEWER_TOKENS that vllm-ascend alone generates from it on two TP ranks."""
    folder = write_tiny_model(QWEN3_MOE_INT8, tmp_path_factory.mktemp("w8a8") / "model", quantised="W8A8")
    return folder, alone(folder, options=INT8, max_tokens=list(FEWER_TOKENS))["tokens"][OWN]


@pytest.mark.slow
@pytest.mark.timeout(6 * PATIENCE_SECONDS)
@pytest.mark.parametrize("case", MC2_OPTIONS)
@pytest.mark.skipif(LINE == "0.23", reason="vllm-ascend 0.23 has enable_mc2_hierarchy_comm alone, which takes 16 ranks")
def test_mc2_with_vllm_ascends_options_gives_its_tokens_eagerly_and_in_graphs(request, case):
    options, is_int8, (algorithm, sent, returned) = MC2_OPTIONS[case]
    folder, without = request.getfixturevalue("qwen3_moe_int8" if is_int8 else "qwen3_moe")
    given = {"model": str(folder), "tp": 2} | ({"max_tokens": list(FEWER_TOKENS)} if is_int8 else {})
    eager = (INT8 if is_int8 else {}) | {"additional_config": options | {"enable_prefill_mc2": True}}
    calls = {
        f"MoeDistributeDispatch comm_alg={algorithm} quant_mode={sent}",
        f"MoeDistributeCombine comm_alg={algorithm} comm_quant_mode={returned}",
    }

    def serve(plugins: str, env: Mapping[str, str] | None = None, **more: Any) -> dict[str, Any]:
        """What the engine reports. Every call of MC2's ops had these arguments, and there were such calls."""
        process = run_engine(plugins, env={"VLLM_NPU_EMULATOR_TRACE": "1", **(env or {})}, **given, **more)
        report = report_of(process)
        assert set(re.findall(r"MoeDistribute\w+ comm_alg.*", process.stdout + process.stderr)) == calls
        return report

    theirs = serve(PLUGINS.replace("vllm_npu", "ascend"), options=eager)["tokens"][OWN]
    if not returned:
        assert theirs == without  # the algorithms of the full mesh add up the same rows
    ours = serve(PLUGINS, options=eager, strategies=["mc2", "auto"])
    assert ours["ran"] == {name: ["mc2"] * 2 for name in ("mc2", "auto")}
    assert ours["tokens"] == dict.fromkeys(("mc2", "auto"), theirs)
    in_graphs = eager | {"enforce_eager": False, "compilation_config": DECODE_GRAPHS}
    compiled = {"TORCHDYNAMO_DISABLE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
    ours = serve(PLUGINS, compiled, options=in_graphs, strategies=["mc2"], moe_comm="mc2")
    assert (ours["ran"], ours["tokens"]) == ({"mc2": ["mc2"] * 2}, {"mc2": theirs})


# One MoE layer, and a drafter that is a copy of it.
MTP = for_ascend(
    DEEPSEEK_V3,
    1089,
    routed_scaling_factor=1.0,
    num_hidden_layers=1,
    first_k_dense_replace=0,
    num_nextn_predict_layers=1,
)


def check_drafts(folder: Path, speculative: dict[str, Any]) -> None:
    """Assert that every strategy gives the tokens of vllm-ascend alone, and accepts as many drafts: some, not all."""
    given = {"max_tokens": 12, "options": {"speculative_config": speculative}}
    theirs = alone(folder, **given)
    ours = generate(PLUGINS, model=str(folder), tp=2, **given, strategies=STRATEGIES)
    assert ours["ran"] == {name: [name, name] for name in STRATEGIES}
    assert ours["tokens"] == dict.fromkeys(STRATEGIES, theirs["tokens"][OWN])
    assert ours["drafted"] == dict.fromkeys(STRATEGIES, theirs["drafted"][OWN])
    proposed, accepted = theirs["drafted"][OWN]
    assert 0 < accepted < proposed


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE_SECONDS)
def test_a_drafter_with_experts_is_accepted_as_often_as_with_vllm_ascend_alone(tmp_path):
    check_drafts(write_tiny_model(MTP, tmp_path / "model"), {"method": "mtp", "num_speculative_tokens": 1})


ONE_LAYER = for_ascend(QWEN3_MOE, MODELS[0].seed, num_hidden_layers=1)


def draw_with_more_experts(config: Mapping[str, Any], draw: Callable[..., Any]) -> dict[str, Any]:
    """The weights of ONE_LAYER with more experts. Where a token chooses none of these, the model predicts as ONE_LAYER does."""
    kept, total = int(ONE_LAYER.config["num_experts"]), int(config["num_experts"])
    weights = ONE_LAYER.draw_weights({**config, "num_experts": kept}, draw)
    mlp = "model.layers.0.mlp"
    more = draw(total - kept, config["hidden_size"])
    weights[f"{mlp}.gate.weight"] = np.concatenate([weights[f"{mlp}.gate.weight"], more])
    for expert in range(kept, total):
        for name in ("gate_proj", "up_proj", "down_proj"):
            like = weights[f"{mlp}.experts.0.{name}.weight"]
            weights[f"{mlp}.experts.{expert}.{name}.weight"] = draw(*like.shape)
    return weights


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE_SECONDS)
@pytest.mark.skipif(LINE == "0.23", reason="vLLM 0.23 gives a draft model no expert parallelism; vllm-ascend then ends")
def test_a_draft_model_whose_layer_has_another_number_of_experts_is_accepted_as_often(tmp_path):
    drafter = replace(ONE_LAYER, config={**ONE_LAYER.config, "num_experts": 12}, draw_weights=draw_with_more_experts)
    written = write_tiny_model(drafter, tmp_path / "drafter")
    speculative = {"method": "draft_model", "model": str(written), "num_speculative_tokens": 2}
    check_drafts(write_tiny_model(ONE_LAYER, tmp_path / "model"), speculative)


def balanced(**options: Any) -> dict[str, Any]:
    """What an engine needs to move experts after a few steps: the variables, and the options of the engine."""
    eplb_config = {
        "dynamic_eplb": True,
        "num_redundant_experts": 2,
        "expert_heat_collection_interval": 3,
        "algorithm_execution_interval": 2,
    }
    return {
        "env": {"DYNAMIC_EPLB": "true", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"},
        "options": {"additional_config": {"eplb_config": eplb_config | options}},
    }


def check_moves(report: dict[str, Any], strategies: list[str], theirs: list[list[int]]) -> None:
    """Assert that experts moved in three rounds of each strategy, and that all tokens are `theirs`."""
    assert report["ran"] == {name: [name, name] for name in strategies}
    assert report["tokens"] == dict.fromkeys(strategies, theirs * 3)
    assert len({str(placement) for placement in report["placements"]}) > 1, "no expert moved"


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE_SECONDS)
def test_tokens_stay_the_same_while_vllm_ascend_moves_experts(qwen3_moe):
    folder, theirs = qwen3_moe
    ours = generate(PLUGINS, model=str(folder), tp=2, **balanced(), strategies=STRATEGIES, rounds=3)
    check_moves(ours, STRATEGIES, theirs)


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE_SECONDS)
def test_tokens_stay_the_same_while_vllm_ascend_moves_int8_experts(qwen3_moe_int8):
    folder, theirs = qwen3_moe_int8
    given = balanced() | {"max_tokens": list(FEWER_TOKENS)}
    given["options"] |= INT8
    ours = generate(PLUGINS, model=str(folder), tp=2, **given, strategies=STRATEGIES, rounds=3)
    check_moves(ours, STRATEGIES, theirs)


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE_SECONDS)
def test_tokens_stay_the_same_while_experts_move_under_captured_graphs(qwen3_moe):
    folder, theirs = qwen3_moe
    given = balanced()
    given["env"] |= {"TORCHDYNAMO_DISABLE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
    given["options"] |= {"enforce_eager": False, "compilation_config": DECODE_GRAPHS}
    # allgather: the broadcast of the chosen replicas is in the graph too.
    ours = generate(PLUGINS, model=str(folder), tp=2, **given, strategies=["allgather"], moe_comm="allgather", rounds=3)
    check_moves(ours, ["allgather"], theirs)


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE_SECONDS)
def test_an_engine_with_dynamic_eplb_ends_when_its_start_fails(qwen3_moe):
    """Workers of this engine are no daemons, and multiprocessing waits for them. The fault is in the engine's own process."""
    given = balanced()
    given["options"] |= {"kv_cache_memory_bytes": 1024}
    process = run_engine(PLUGINS, model=str(qwen3_moe[0]), tp=2, strategies=["auto"], **given)
    assert process.returncode == 1
    assert "memory" in process.stderr
