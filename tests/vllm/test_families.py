"""`vllm-npu families` finds vLLM's MoE families, writes checkpoints of them, and serves them."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("vllm")

from tests.time_limits import PATIENCE_SECONDS
from vllm_npu.core.model_facts import read_config
from vllm_npu.tools.families.checkpoints import write_checkpoint
from vllm_npu.tools.families.registry import find_families
from vllm_npu.tools.families.sweep import AS_TRANSFORMERS, EQUAL, FAULTS

# A family that vanilla vLLM serves as transformers does, and one that it does not.
SERVED = {"gpt_oss": EQUAL, "ernie4_5_moe": AS_TRANSFORMERS}


def run_families(tmp_path, *options: str, timeout: float) -> tuple[int, list[dict]]:
    """The exit status of the command, and its rows."""
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "vllm_npu", "families", "--json", str(file), *options]
    process = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert file.exists(), process.stdout + process.stderr
    return process.returncode, json.loads(file.read_text())


def test_families_are_found_in_vllms_registry():
    found = {family.name: family.architecture for family in find_families()}
    assert {"mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "phimoe", "BailingMoeForCausalLM"} <= set(found)
    assert found["phimoe"] == "PhiMoEForCausalLM"
    assert not {"llama", "qwen3", "LlamaForCausalLM", "Qwen3ForCausalLM"} & (set(found) | set(found.values()))


def test_a_checkpoint_has_the_sizes_of_the_table_and_a_wide_margin(tmp_path):
    checkpoint = write_checkpoint("mixtral", tmp_path / "mixtral")
    facts = read_config(checkpoint.folder)
    assert (facts.num_experts, facts.top_k, facts.hidden_size) == (8, 2, 256)
    assert checkpoint.smallest_margin > 1e-3
    assert len({token for tokens in checkpoint.tokens for token in tokens}) > 40


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE_SECONDS)
def test_families_are_served_by_every_strategy(tmp_path):
    only = [option for family in SERVED for option in ("--only", family)]
    code, rows = run_families(tmp_path, *only, timeout=4 * PATIENCE_SECONDS)
    assert {row["family"]: row["verdict"] for row in rows} == SERVED
    assert all(set(row["identical"].values()) == {row["tokens_total"]} for row in rows)
    assert code == 0


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_no_family_is_wrong_or_crashes(tmp_path):
    code, rows = run_families(tmp_path, "--full", timeout=4 * 3600)
    assert [row for row in rows if row["verdict"] in FAULTS] == []
    assert code == 0
