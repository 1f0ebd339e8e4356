"""`vllm-npu doctor --trace FILES`: what differs between the ranks' collectives."""

import json
from collections.abc import Sequence
from pathlib import Path

import typer

from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.trace import compare, read_traces, report


def compare_traces(paths: Sequence[Path], asked_for: bool, json_path: Path | None) -> None:
    """Print what compare() finds in these files and folders. Exit status 1 if it finds something."""
    if not asked_for or not paths:
        raise UnsupportedConfigError("give files and option together: vllm-npu doctor --trace FILES, or their folder")
    traces = read_traces(paths)
    if not traces:
        raise UnsupportedConfigError(
            f"no traces in {', '.join(map(str, paths))}; VLLM_NPU_RECORD=FOLDER writes rank*.trace"
        )
    findings = compare(traces)
    print(report(traces))
    if json_path is not None:
        found = [
            {"kind": each.kind.value, "ranks": each.ranks, "group": str(each.group), "text": each.text}
            for each in findings
        ]
        json_path.write_text(json.dumps({"findings": found}, indent=2) + "\n")
    if findings:
        raise typer.Exit(1)
