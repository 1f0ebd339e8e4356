"""All checks of doctor in their order. Standard library only: doctor starts where no other package can be imported."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_npu.tools.doctor.findings import PROBLEM, Finding
from vllm_npu.tools.doctor.import_checks import (
    check_emulator,
    check_import_of_torch,
    check_import_of_torch_npu,
    check_token_ops,
)
from vllm_npu.tools.doctor.machine_checks import (
    check_cann,
    check_cores,
    check_drivers,
    check_numa,
    check_shared_memory,
)
from vllm_npu.tools.doctor.plugin_checks import check_plugins, check_target_device
from vllm_npu.tools.doctor.probes import IMPORT_SECONDS, probe
from vllm_npu.tools.doctor.variable_checks import check_variables
from vllm_npu.tools.doctor.version_checks import check_python, check_versions

Check = Callable[[], Iterator[Finding]]

CHECKS: dict[str, Check] = {
    "python": check_python,
    "versions": check_versions,
    "import torch": check_import_of_torch,
    "CANN": check_cann,
    "drivers": check_drivers,
    "import torch_npu": check_import_of_torch_npu,
    "emulated device": check_emulator,
    "tokens on HCCL": check_token_ops,
    "shared memory": check_shared_memory,
    "plugins": check_plugins,
    "VLLM_TARGET_DEVICE": check_target_device,
    "variables": check_variables,
    "cores": check_cores,
    "NUMA": check_numa,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedEngine:
    """An engine that a user wants to start."""

    model: str  # path of config.json, or of its folder
    soc: str | None  # a family of core.limits.DEVICES; None: no NPU
    ep: int  # ranks of the grid; the experts are spread over all of them
    tp: int
    max_num_seqs: int  # sequences that a data-parallel rank decodes at once
    moe_comm: str
    additional_config: dict[str, Any] = field(default_factory=dict)  # of vLLM, with vllm-ascend's options
    lora: bool = False  # whether LoRA adapters may change the experts
    serve_options: dict[str, str] | None = None  # of a recipe: see ServeRecipe.options; None: there is no recipe
    variables: dict[str, str] = field(default_factory=dict)  # environment variables that a recipe sets
    experts: int | None = None  # this and the next two: numbers that replace those of config.json
    topk: int | None = None
    hidden: int | None = None


def examine(engine: PlannedEngine | None = None, checks: dict[str, Check] | None = None) -> Iterator[Finding]:
    """Run every check, and the one of `engine` if it is given. A check that raises an error becomes a finding."""
    chosen = dict(CHECKS if checks is None else checks)
    if engine is not None:
        chosen["engine"] = lambda: check_engine(engine)
    for name, check in chosen.items():
        try:
            yield from check()
        except Exception as error:  # noqa: BLE001 - the other findings are worth more than a traceback
            what = f"this check failed: {type(error).__name__}: {error}"
            yield Finding(name, PROBLEM, what, "run doctor again; if the check fails again, report it as a bug")


def check_engine(engine: PlannedEngine) -> Iterator[Finding]:
    """What the plugin would say at the start of this engine. Another process checks it, because that needs torch."""
    command = [sys.executable, "-m", "vllm_npu.tools.doctor.engine_findings", json.dumps(asdict(engine))]
    tried = probe(command, IMPORT_SECONDS)
    if tried.fault:
        yield Finding("engine", PROBLEM, f"cannot be checked: {tried.fault}", "solve the problems above first")
        return
    yield from (Finding(**finding) for finding in json.loads(tried.last_line))
