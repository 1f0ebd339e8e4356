"""`vllm-npu doctor --trace FILES`: what differs between the ranks' collectives. Standard library only, as doctor."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.trust.trace import read_traces
from vllm_npu.trust.trace_comparison import compare, report


def compare_traces(paths: Sequence[Path], json_path: str | None) -> int:
    """Print what compare() finds in these files and folders, as JSON to `json_path` too ("-": only that, to standard output).
    Returns the exit status: 1 if it finds something."""
    traces = read_traces(paths)
    if not traces:
        raise UnsupportedConfigError(
            f"no traces in {', '.join(map(str, paths))}; VLLM_NPU_RECORD=FOLDER writes rank*.trace"
        )
    findings = compare(traces)
    found = [
        {"kind": each.kind.value, "ranks": each.ranks, "group": str(each.group), "text": each.text} for each in findings
    ]
    text = json.dumps({"findings": found}, indent=2) + "\n"
    if json_path == "-":
        sys.stdout.write(text)
        return bool(findings)
    print(report(traces))
    if json_path is not None:
        Path(json_path).write_text(text)
    return bool(findings)
