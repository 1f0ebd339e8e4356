"""doctor's check of an engine that is not started yet: the plugin's start-up check, on the model's config.json.

    python -m vllm_npu.tools.doctor.engine_findings JSON

JSON is a PlannedEngine. Prints a list of Findings as JSON. This is a program of its own, because the check needs torch.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vllm_npu.child_processes import changed_environment
from vllm_npu.core.ascend_recipes import fused_mc2_asked, rows_of_recipe
from vllm_npu.core.expert_limits import ExpertsWanted
from vllm_npu.core.limits import DEVICES, PORTABLE
from vllm_npu.core.model_facts import read_config
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.envs import HCCL_BUFFSIZE
from vllm_npu.errors import UnsupportedConfigError, VllmNpuError
from vllm_npu.plugin.entry_points import vllm_ascend_version
from vllm_npu.plugin.options import Mode, parse_moe_comm
from vllm_npu.plugin.release_lines import ascend_line
from vllm_npu.strategies.start_checks import PlannedShape, check_experts, check_start, describe_capacity
from vllm_npu.tools.doctor.examination import PlannedEngine
from vllm_npu.tools.doctor.findings import OK, PROBLEM, Finding
from vllm_npu.tools.doctor.serve_recipe import LEAVE_OUT, recipe_rows
from vllm_npu.tools.layers import layer_of_model

CHECK = "engine"


def findings_of(engine: PlannedEngine) -> list[Finding]:
    """What happens to each option of the recipe, and the plugin's refusal to start this engine or what it would run."""
    strategy, mode = parse_moe_comm(engine.moe_comm)
    if mode is Mode.OFF:
        return [Finding(CHECK, OK, "moe_comm=off: vllm-ascend alone, with all its options")]
    recipe = recipe_findings(engine.additional_config)
    if engine.serve_options is not None:
        recipe += recipe_rows(engine.serve_options, engine.variables)
    try:
        if engine.soc is not None and engine.soc not in DEVICES:
            raise UnsupportedConfigError(f"there is no --soc {engine.soc}; name one of {', '.join(DEVICES)}")
        if engine.ep % engine.tp:
            raise UnsupportedConfigError(f"--ep {engine.ep} is no multiple of --tp {engine.tp}; choose ep = tp * dp")
        model = read_config(Path(engine.model))
        device = PORTABLE if engine.soc is None else DEVICES[engine.soc]
        device = replace(
            device, fused_mc2_asked=fused_mc2_asked(engine.additional_config, ascend_line(vllm_ascend_version()))
        )
        topology = ParallelTopology.of_rank(0, tp_size=engine.tp, dp_size=engine.ep // engine.tp)
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
            hccl_buffer_mb=_buffer_mb(engine.variables),
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
        for row in rows_of_recipe(additional_config)
    ]


def _buffer_mb(variables: Mapping[str, str]) -> int:
    """HCCL's buffer in MiB, as a recipe sets it, or else as this process has it."""
    with changed_environment({name: value for name, value in variables.items() if name == HCCL_BUFFSIZE.name}):
        return HCCL_BUFFSIZE.read_whole_number()


if __name__ == "__main__":
    print(json.dumps([asdict(finding) for finding in findings_of(PlannedEngine(**json.loads(sys.argv[1])))]))
