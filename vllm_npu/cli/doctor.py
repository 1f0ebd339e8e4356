"""`vllm-npu doctor`: what is wrong with this environment, and what to do about it.

Standard library only, like the checks of tools/doctor: doctor starts where neither torch nor vLLM can be imported.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_npu.envs import MOE_COMM
from vllm_npu.errors import InvalidInputError, UnsupportedConfigError
from vllm_npu.tools.doctor.examination import PlannedEngine, examine
from vllm_npu.tools.doctor.findings import OK, PROBLEM, WARNING, Finding
from vllm_npu.tools.doctor.serve_recipe import read_recipe
from vllm_npu.tools.json_option import read_object
from vllm_npu.trust.timeline import timeline
from vllm_npu.trust.trace import read_traces
from vllm_npu.trust.trace_comparison import compare, report

COLOURS = {OK: 32, WARNING: 33, PROBLEM: 31}  # terminal codes for green, yellow and red
STANDARD_OUTPUT = "-"

DESCRIPTION = """\
Look for common problems and say how to solve them: versions, imports, CANN, HCCL and drivers, the emulated device, shared
memory, plugins, environment variables, cores and NUMA nodes. Works where neither torch nor any other package can be imported.
Exit status 1 if there is a problem.
"""


def doctor(arguments: Sequence[str]) -> None:
    """Run every check, or compare traces, and print the findings. Exit with status 1 if there is a problem."""
    given = parse(arguments)
    if given.trace is not None:
        sys.exit(_compare_traces(given.trace, given.json, given.timeline))
    quiet = given.json == STANDARD_OUTPUT
    findings = []
    for finding in examine(planned_engine(given)):
        findings.append(finding)
        if not quiet:
            _show(finding)
    count = Counter(finding.status for finding in findings)
    if not quiet:
        print(f"doctor: {len(findings)} findings, {count[WARNING]} warnings, {count[PROBLEM]} problems")
    _write_json(given.json, [asdict(finding) for finding in findings])
    sys.exit(1 if count[PROBLEM] else 0)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, checked. Exits with status 2 and a message if they make no sense."""
    parser = argparse.ArgumentParser(prog="vllm-npu doctor", description=DESCRIPTION)
    parser.add_argument(
        "--json",
        metavar="PATH",
        nargs="?",
        const=STANDARD_OUTPUT,
        help="Write the findings to this file. Without a PATH, print JSON instead of text.",
    )
    parser.add_argument(
        "--trace",
        metavar="FILE",
        nargs="+",
        type=Path,
        help="Only compare the ranks' traces: the files that VLLM_NPU_RECORD wrote, or their folder.",
    )
    parser.add_argument(
        "--timeline",
        metavar="FILE",
        type=Path,
        help="With --trace: also write the calls as a timeline, which ui.perfetto.dev and chrome://tracing open.",
    )
    engine = parser.add_argument_group("an engine to be started", "Say whether it may start, and what to set.")
    engine.add_argument("--model", metavar="PATH", help="The model's config.json, or its folder.")
    engine.add_argument(
        "--recipe",
        metavar="FILE",
        type=Path,
        help="A script that starts vllm serve, as in vllm-ascend's tutorials: say what happens to each option and variable. "
        "Nothing of it is run. --model is the model's config.json, if the recipe's model is no folder.",
    )
    engine.add_argument("--soc", help="Family of NPUs: A2, A3, A5 or 310P. Without this option: no NPU.")
    engine.add_argument("--ep", type=int, help="Ranks that hold the experts: TP times DP.")
    engine.add_argument("--tp", type=int, default=1, help="Tensor-parallel ranks (1).")
    engine.add_argument("--max-num-seqs", type=int, default=256, help="vLLM's option of this name (256).")
    engine.add_argument("--moe-comm", help="The plugin's option of this name (--additional-config's, else auto).")
    engine.add_argument(
        "--additional-config",
        metavar="JSON",
        default="{}",
        help="vLLM's option of this name, with vllm-ascend's options: say what happens to each of them.",
    )
    engine.add_argument("--enable-lora", action="store_true", help="vLLM's option of this name.")
    engine.add_argument("--experts", type=int, help="Routed experts of a layer, in place of config.json's.")
    engine.add_argument("--topk", type=int, help="Experts for each token, in place of config.json's.")
    engine.add_argument("--hidden", type=int, help="hidden_size of the model, in place of config.json's.")
    given = parser.parse_args(arguments)
    try:
        given.additional_config = read_object("--additional-config", given.additional_config)
    except InvalidInputError as error:
        parser.error(str(error))
    if given.recipe is not None:
        _take_recipe(given, parser)
    if (given.model is None) != (given.ep is None) or (given.model is None and given.soc is not None):
        parser.error("an engine is named by --model and --ep together")
    sizes = (given.ep, given.tp, given.max_num_seqs, given.experts, given.topk, given.hidden)
    if any(size is not None and size < 1 for size in sizes):
        parser.error("--ep, --tp, --max-num-seqs, --experts, --topk and --hidden are 1 or more")
    if given.additional_config and given.model is None:
        parser.error("--additional-config describes an engine: give --model and --ep too")
    if given.timeline is not None and given.trace is None:
        parser.error("--timeline shows traces: give --trace too")
    if given.timeline is not None and not given.timeline.parent.is_dir():
        parser.error(f"there is no folder {given.timeline.parent}; create it")
    if given.json not in (None, STANDARD_OUTPUT) and not Path(given.json).parent.is_dir():
        parser.error(f"there is no folder {Path(given.json).parent}; create it")
    return given


def _take_recipe(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Put what the recipe says in the place of the options that describe an engine."""
    try:
        recipe = given.recipe = read_recipe(given.recipe.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, InvalidInputError) as error:
        parser.error(f"--recipe: {error}")
    given.ep, given.tp, given.additional_config = recipe.tp * recipe.dp, recipe.tp, recipe.additional_config
    given.max_num_seqs = recipe.max_num_seqs or given.max_num_seqs
    given.enable_lora = recipe.enable_lora
    if given.model is None and not Path(recipe.model).exists():
        parser.error(
            f"--recipe: its model {recipe.model!r} is no folder here; give --model with the model's config.json"
        )
    given.model = given.model or recipe.model


def planned_engine(given: argparse.Namespace) -> PlannedEngine | None:
    """The engine that --model and the options beside it describe. None without --model."""
    if given.model is None:
        return None
    recipe = given.recipe
    variables = {} if recipe is None else recipe.variables
    return PlannedEngine(
        model=given.model,
        soc=given.soc,
        ep=given.ep,
        tp=given.tp,
        max_num_seqs=given.max_num_seqs,
        moe_comm=given.moe_comm
        or _configured_moe_comm(given.additional_config)
        or variables.get(MOE_COMM.name)
        or "auto",
        additional_config=given.additional_config,
        lora=given.enable_lora,
        serve_options=None if recipe is None else recipe.options,
        variables=variables,
        experts=given.experts,
        topk=given.topk,
        hidden=given.hidden,
    )


def _configured_moe_comm(additional_config: dict[str, Any]) -> str:
    """moe_comm in the section vllm_npu of --additional-config. Without one: "". It goes before the variable."""
    section = additional_config.get("vllm_npu")
    configured = section.get("moe_comm") if isinstance(section, dict) else None
    return configured if isinstance(configured, str) else ""


def _compare_traces(paths: Sequence[Path], json_path: str | None, timeline_path: Path | None) -> int:
    """Print the differences between the traces in these files and folders. Return exit status 1 if there are any."""
    traces = read_traces(paths)
    if not traces:
        raise UnsupportedConfigError(
            f"no traces in {', '.join(map(str, paths))}; VLLM_NPU_RECORD=FOLDER writes rank*.trace"
        )
    if timeline_path is not None:
        timeline_path.write_text(json.dumps(timeline(traces)), encoding="utf-8")
    differences = compare(traces)
    if json_path != STANDARD_OUTPUT:
        print(report(traces))
    _write_json(
        json_path,
        [
            {"kind": each.kind.value, "ranks": each.ranks, "group": str(each.group), "text": each.text}
            for each in differences
        ],
    )
    return bool(differences)


def _show(finding: Finding) -> None:
    """Print one line for the finding, and one for its remedy."""
    status = f"{finding.status:<8}"
    if sys.stdout.isatty():
        status = f"\033[{COLOURS[finding.status]}m{status}\033[0m"
    print(f"{status} {finding.check}: {finding.what}", flush=True)
    if finding.remedy:
        print(f"         -> {finding.remedy}", flush=True)


def _write_json(path: str | None, findings: Sequence[Mapping[str, Any]]) -> None:
    """Write the findings to the file, or to standard output if the path is STANDARD_OUTPUT."""
    if path is None:
        return
    text = json.dumps({"findings": findings}, indent=2) + "\n"
    if path == STANDARD_OUTPUT:
        sys.stdout.write(text)
    else:
        Path(path).write_text(text)
