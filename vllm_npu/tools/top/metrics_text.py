"""Reads this package's series from the text of /metrics."""

from collections import defaultdict

from prometheus_client.parser import text_string_to_metric_families

from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.tools.top.rows import Sample

PREFIX = "vllm_npu:moe_"


def sample_of(text: str, seconds: float) -> Sample:
    """The series at a look. `seconds`: when it was. Raises UnsupportedConfigError for a text that is not Prometheus's."""
    found: dict[str, dict[tuple[int, str], float]] = defaultdict(dict)
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples if family.name.startswith(PREFIX) else ():
                if "rank" in sample.labels and "strategy" in sample.labels and "requested" not in sample.labels:
                    key = int(sample.labels["rank"]), sample.labels["strategy"]
                    found[sample.name.removeprefix(PREFIX)][key] = sample.value
    except (ValueError, KeyError, IndexError) as error:
        raise UnsupportedConfigError(f"this is no text of Prometheus's format ({error}); name a vLLM server") from error
    return Sample(seconds, found["steps_total"], found["tokens_total"], found["sent_bytes_total"])
