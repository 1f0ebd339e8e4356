"""doctor's check of an engine that is not started yet: the plugin's start-up check, on the model's config.json.

    python -m vllm_npu.tools.doctor.engine_findings JSON

JSON is a PlannedEngine. Prints a list of Findings as JSON. This is a program of its own, because the check needs torch.
"""

import json
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_npu.child_processes import changed_environment
from vllm_npu.core.ascend_recipes import rows_of_recipe
from vllm_npu.core.expert_limits import ExpertsWanted
from vllm_npu.core.model_facts import read_config
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.envs import HCCL_BUFFSIZE, HCCL_INTRA_PCIE_ENABLE, HCCL_INTRA_ROCE_ENABLE
from vllm_npu.errors import UnsupportedConfigError, VllmNpuError
from vllm_npu.plugin.entry_points import vllm_ascend_version
from vllm_npu.plugin.options import Mode, parse_moe_comm
from vllm_npu.plugin.release_lines import ascend_line
from vllm_npu.strategies.start_checks import PlannedShape, check_chip, check_experts, check_start, describe_capacity
from vllm_npu.tools.doctor.examination import PlannedEngine
from vllm_npu.tools.doctor.findings import OK, PROBLEM, Finding
from vllm_npu.tools.doctor.serve_recipe import LEAVE_OUT, recipe_rows
from vllm_npu.tools.layers import device_of_engine, layer_of_model

CHECK = "engine"
HCCL_VARIABLES = [each.name for each in (HCCL_BUFFSIZE, HCCL_INTRA_PCIE_ENABLE, HCCL_INTRA_ROCE_ENABLE)]


def findings_of(engine: PlannedEngine) -> list[Finding]:
    """What happens to each option of the recipe, and the plugin's refusal to start this engine or what it would run."""
    strategy, mode = parse_moe_comm(engine.moe_comm)
    if mode is Mode.OFF:
        return [Finding(CHECK, OK, "moe_comm=off: vllm-ascend alone, with all its options")]
    recipe = recipe_findings(engine.additional_config)
    if engine.serve_options is not None:
        recipe += recipe_rows(engine.serve_options, engine.variables)
    try:
        if engine.ep % engine.tp:
            raise UnsupportedConfigError(f"--ep {engine.ep} is no multiple of --tp {engine.tp}; choose ep = tp * dp")
        model = read_config(Path(engine.model))
        with _hccl_variables(engine.variables):
            device = device_of_engine(engine.soc, engine.additional_config, ep_size=engine.ep)
            buffer_mb = HCCL_BUFFSIZE.read_whole_number()
        topology = ParallelTopology.of_rank(0, tp_size=engine.tp, dp_size=engine.ep // engine.tp)
        check_chip(topology, device)
        check_experts(ExpertsWanted(model=model, lora=engine.lora), topology, device)
        # engine_check takes it for W8A8 too.
        by_vllm_ascend = (engine.serve_options or {}).get("quantization") == "ascend"
        layer = layer_of_model(
            model, experts=engine.experts, topk=engine.topk, hidden=engine.hidden, w8a8=by_vllm_ascend
        )
        limits = check_start(
            strategy,
            topology,
            layer,
            device,
            shape=PlannedShape(decode_tokens=engine.max_num_seqs),
            hccl_buffer_mb=buffer_mb,
        )
    except VllmNpuError as error:
        return [*recipe, Finding.refusal(CHECK, f"{type(error).__name__}: {error}")]
    capacity = describe_capacity(limits, topology, [layer])
    started = Finding(CHECK, OK, f"moe_comm={engine.moe_comm} may start on {limits.family}, {topology}; {capacity}")
    return [*recipe, started]


def recipe_findings(additional_config: Mapping[str, Any]) -> list[Finding]:
    """What happens to each option of vllm-ascend. A refused one is a problem."""
    return [
        Finding("recipe", PROBLEM, f"{row.option}: {row.what}", LEAVE_OUT)
        if row.is_refused
        else Finding("recipe", OK, f"{row.option}: {row.what}")
        for row in rows_of_recipe(additional_config, ascend_line(vllm_ascend_version()))
    ]


def _hccl_variables(variables: Mapping[str, str]) -> AbstractContextManager[None]:
    """HCCL's variables as a recipe sets them, or else as this process has them."""
    return changed_environment({name: value for name, value in variables.items() if name in HCCL_VARIABLES})


if __name__ == "__main__":
    print(json.dumps([asdict(finding) for finding in findings_of(PlannedEngine(**json.loads(sys.argv[1])))]))
