"""A prefill node and a decode node of vllm-ascend: engines of two data-parallel ranks, with a KV connector between them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ascend.layer_program import CONSUMER
from tests.ascend.test_layer import EMULATED_A3, LINE, PLUGINS
from tests.time_limits import PATIENCE_SECONDS
from vllm_npu.tools.demo.ascend_demo import DP2_EP, FEWER_TOKENS, MAX_TOKENS, MODELS, QWEN3_MOE_INT8
from vllm_npu.tools.demo.recipes import WIDE_EXPERTS
from vllm_npu.tools.engines.engine_processes import EngineFailedError
from vllm_npu.tools.engines.engine_set import EngineSet, Generation
from vllm_npu.tools.engines.tiny_models import demo_prompts, write_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(6 * PATIENCE_SECONDS)]

GRAPHS = {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}}
Run = Callable[..., Generation]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A function that runs an engine and returns what it generated. The logs are in the folder `logs`."""
    tiny = write_tiny_model(MODELS[0], tmp_path_factory.mktemp("qwen3-moe") / "model")
    caches = tmp_path_factory.mktemp("caches")

    def run(
        role: str,
        kv: Path,
        moe_comm: str,
        logs: Path,
        *,
        max_tokens: Any = MAX_TOKENS,
        model: Path = tiny,
        dtype: str = "float16",
        options: dict[str, Any] = {},  # noqa: B006 never written
        **engine_args: Any,
    ) -> Generation:
        consumer = role == "kv_consumer"
        connector = CONSUMER | {"kv_role": role, "kv_connector_extra_config": {"shared_storage_path": str(kv)}}
        # Only a decode node takes the recompute scheduler.
        options = options | ({"recompute_scheduler_enable": True} if consumer else {})
        engines = EngineSet(
            model,
            DP2_EP,
            strategies=[None],  # moe_comm stands in additional_config
            prompts=demo_prompts(),
            max_tokens=max_tokens,
            folder=logs,
            caches=caches,
            compiled="compilation_config" in engine_args,
            environment=EMULATED_A3 | {"VLLM_PLUGINS": PLUGINS, "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"},
            engine_args={
                "kv_transfer_config": connector,
                "additional_config": options | {"vllm_npu": {"moe_comm": moe_comm}},
                **engine_args,
            },
            dtype=dtype,
        )
        with engines:
            engines.wait_until_ready()
            return engines.generate()

    return run


@pytest.fixture(scope="module")
def prefilled(run: Run, tmp_path_factory) -> tuple[Path, Generation]:
    """The KV that a prefill node has stored, and what a decode node of vllm-ascend alone generates from it."""
    kv = tmp_path_factory.mktemp("kv")
    logs = tmp_path_factory.mktemp("logs")
    run("kv_producer", kv, "auto", logs, max_tokens=[1] * len(MAX_TOKENS))
    assert len(list(kv.iterdir())) == len(MAX_TOKENS), "a folder for each prompt"
    return kv, run("kv_consumer", kv, "off", logs)


@pytest.mark.parametrize(
    ("moe_comm", "graphs", "line"),
    [
        ("auto", {}, "ranks do not agree on token counts of up to 8"),
        ("auto", GRAPHS, "ranks do not agree on token counts of up to 8"),
        ("allgather", {}, "moe_comm=allgather on A3"),  # it needs counts, so the ranks agree on them
    ],
    ids=["mc2", "mc2 in graphs", "allgather"],
)
def test_a_decode_node_gives_the_tokens_of_vllm_ascend_alone(run: Run, prefilled, tmp_path, moe_comm, graphs, line):
    kv, alone = prefilled
    served = run("kv_consumer", kv, moe_comm, tmp_path, **graphs)
    log = (tmp_path / "rank0.log").read_text(errors="replace")
    assert served.tokens == alone.tokens
    assert sum(map(len, served.tokens)) == sum(MAX_TOKENS)
    assert line in log
    ran = "mc2" if moe_comm == "auto" else moe_comm
    assert f"MoE communication: {ran} on TP1" in log
    assert ("do not agree" in log) == (moe_comm == "auto")


def test_prompts_without_kv_end_a_decode_node_with_an_error_that_names_the_ranks(run: Run, tmp_path):
    kv = tmp_path / "kv"
    kv.mkdir()
    with pytest.raises(EngineFailedError):
        run("kv_consumer", kv, "auto", tmp_path)
    log = "".join((tmp_path / f"rank{rank}.log").read_text(errors="replace") for rank in range(2))
    # One rank may still be idle while the other one prefills its prompts.
    value = r"(\[\d\d, \d\d\]|up to 8 on each rank)"
    assert re.search(rf"tokens: ranks \[\d\]: {value}; ranks \[\d\]: {value}", log)


@pytest.mark.skipif(LINE != "0.23", reason="on vllm-ascend 0.30, 2 asks for an operator that needs agreed counts")
def test_a_decode_node_by_the_operator_for_decode_steps_gives_the_tokens_of_vllm_ascend_alone(run: Run, tmp_path):
    model = write_tiny_model(WIDE_EXPERTS[QWEN3_MOE_INT8.family], tmp_path / "model", quantised="W8A8")
    int8 = {"model": model, "dtype": "bfloat16", "quantization": "ascend"}
    kv = tmp_path / "kv"
    kv.mkdir()
    run("kv_producer", kv, "auto", tmp_path, max_tokens=[1] * len(FEWER_TOKENS), **int8)
    alone = run("kv_consumer", kv, "off", tmp_path, max_tokens=FEWER_TOKENS, **int8)
    served = run("kv_consumer", kv, "auto", tmp_path, max_tokens=FEWER_TOKENS, options={"enable_fused_mc2": 2}, **int8)
    log = (tmp_path / "rank0.log").read_text(errors="replace")
    assert served.tokens == alone.tokens
    assert sum(map(len, served.tokens)) == sum(FEWER_TOKENS)
    assert "ranks do not agree on token counts of up to 8" in log
    assert "MoE communication: fused_mc2 on TP1" in log
