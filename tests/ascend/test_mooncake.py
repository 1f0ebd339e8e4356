"""A prefill node and a decode node of vllm-ascend, whose KV blocks travel by Mooncake's transfer engine."""

import subprocess
import sys
from contextlib import nullcontext

import pytest

from tests.time_limits import PATIENCE_SECONDS
from vllm_npu.tools.demo.recipe_demo import RecipeDemo, planned_recipes
from vllm_npu.tools.demo.session import demo_session

pytestmark = [pytest.mark.slow, pytest.mark.timeout(6 * PATIENCE_SECONDS)]

LOADS = [sys.executable, "-c", "import mooncake.engine"]
SCRIPT = """
vllm serve Qwen3-30B-A3B --tensor-parallel-size {tp} --data-parallel-size {dp} --enable-expert-parallel {graphs} \\
  --kv-transfer-config '{{"kv_connector": "MooncakeConnectorV1", "kv_role": "{role}", "kv_port": "{port}",
    "kv_connector_extra_config": {{}}}}'
"""
FULL = """--compilation-config '{"cudagraph_mode": "FULL_DECODE_ONLY"}'"""


@pytest.fixture(scope="module", autouse=True)
def needs_mooncake():
    loaded = subprocess.run(LOADS, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    if loaded.returncode != 0:
        *_, reason = loaded.stderr.splitlines()
        pytest.skip(
            f"needs Mooncake's transfer engine, and the libraries libibverbs1 and libnuma1 of the system: {reason}"
        )


@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (1, 2)], ids=["to TP2", "to DP2"])
def test_tokens_of_two_nodes_are_those_of_vllm_ascend_alone(tmp_path, monkeypatch, tp, dp):
    # A transfer waits while the other node computes on this machine's cores; Mooncake gives up after 30 s by default.
    monkeypatch.setenv("MC_TRANSFER_TIMEOUT", str(int(PATIENCE_SECONDS)))
    (tmp_path / "prefill.sh").write_text(
        SCRIPT.format(tp=2, dp=1, graphs="--enforce-eager", role="kv_producer", port=31000)
    )
    (tmp_path / "decode.sh").write_text(SCRIPT.format(tp=tp, dp=dp, graphs=FULL, role="kv_consumer", port=31100))
    with demo_session(tmp_path / "logs", lambda _: nullcontext()) as session:
        demo = RecipeDemo(session)
        demo.execute(planned_recipes(tmp_path, "decode"))
    [row] = demo.rows
    assert row.failed is None, row.failed
    assert row.tokens_total > 0
    assert row.tokens_identical == row.tokens_total
    assert row.ran == ("mc2",)
    for node in ("prefill", "decode"):
        [log] = (tmp_path / "logs").glob(f"{node}.sh-auto-*.log")
        assert "MooncakeConnector" in log.read_text(errors="replace")
