"""Real engines of vLLM beside vllm-ascend: every strategy gives the tokens of vllm-ascend alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ascend.engine_program import OWN
from tests.ascend.test_layer import PLUGINS, ROOT, STRATEGIES
from tests.time_limits import PATIENCE_SECONDS
from vllm_npu.tools.demo.ascend_demo import MODELS
from vllm_npu.tools.engines.tiny_models import write_tiny_model

PROGRAM = Path(__file__).with_name("engine_program.py")


def generate(plugins: str, **given: Any) -> dict[str, Any]:
    """Run engine_program.py in a process of its own, on emulated A3."""
    variables = {
        "PYTHONPATH": str(ROOT),
        "VLLM_PLUGINS": plugins,
        "VLLM_NPU_EMULATOR": "1",
        "VLLM_NPU_EMULATOR_SOC": "A3",
        "VLLM_NPU_EMULATOR_MEMORY_GB": "4",
        "VLLM_NPU_EMULATOR_LIMITS": "none",
        "VLLM_NPU_EMULATOR_UNDEFINED": "zero",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "HCCL_BUFFSIZE": "300",
        "OMP_NUM_THREADS": "1",
        "TASK_QUEUE_ENABLE": "0",
        "TORCHDYNAMO_DISABLE": "1",
    }
    process = subprocess.run(
        [sys.executable, str(PROGRAM), json.dumps(given)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_SECONDS,
        check=False,
    )
    found = [line for line in process.stdout.splitlines() if line.startswith('{"tokens"')]
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    report: dict[str, Any] = json.loads(found[0])
    return report


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE_SECONDS)
def test_every_strategy_gives_vllm_ascends_tokens_over_two_tp_ranks(tmp_path):
    write_tiny_model(MODELS[0], tmp_path / "model")
    theirs = PLUGINS.replace("vllm_npu", "ascend")
    alone = generate(theirs, model=str(tmp_path / "model"), tp=2)["tokens"][OWN]
    ours = generate(PLUGINS, model=str(tmp_path / "model"), tp=2, strategies=STRATEGIES)
    assert ours["ran"] == {name: [name, name] for name in STRATEGIES}
    assert ours["tokens"] == dict.fromkeys(STRATEGIES, alone)
    assert sum(map(len, alone)) == 4 * len(alone) > 0
