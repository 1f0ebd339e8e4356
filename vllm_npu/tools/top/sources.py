"""Where the rows of `vllm-npu top` come from: a folder of traces, or the /metrics of a server."""

import time
import urllib.error
import urllib.request
from collections import deque
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from vllm_npu.envs import METRICS, RECORD
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.tools.top.rows import RankRow, Sample, rows_of_samples, rows_of_traces
from vllm_npu.trust.trace import read_traces

ANSWER_SECONDS = 5.0  # for a server's /metrics
KEPT_SAMPLES = 600
MOST_BYTES = 64 << 20  # of /metrics


class Source(Protocol):
    """One engine."""

    def rows(self) -> list[RankRow]:
        """Look at the engine. Raises UnsupportedConfigError if it cannot be looked at."""
        ...


def source_of(place: str) -> Source:
    """The source that a URL or a folder names. Raises UnsupportedConfigError for a place that is neither."""
    if place.startswith(("http://", "https://")):
        if find_spec("prometheus_client") is None:
            raise UnsupportedConfigError("reading /metrics needs prometheus_client; install it, or vllm_npu[cpu]")
        return _Server(place)
    folder = Path(place)
    if not folder.is_dir():
        raise UnsupportedConfigError(
            f"{place} is no folder here and no http:// address; name the folder of {RECORD.name}, or a server such as "
            "http://localhost:8000"
        )
    return _Folder(folder)


class _Folder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def rows(self) -> list[RankRow]:
        traces = read_traces([self._folder])
        if not traces:
            raise UnsupportedConfigError(
                f"no traces in {self._folder}; start the ranks with {RECORD.name}={self._folder}, which writes rank*.trace"
            )
        return rows_of_traces(traces, time.time())


class _Server:
    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/").removesuffix("/metrics") + "/metrics"
        self._samples: deque[Sample] = deque(maxlen=KEPT_SAMPLES)

    def rows(self) -> list[RankRow]:
        from vllm_npu.tools.top.metrics_text import sample_of  # not at the top: a folder needs no prometheus_client

        text = self._read()
        if "vllm:" not in text:
            raise UnsupportedConfigError(
                f"{self._url} is not the /metrics of a vLLM server; name the server's own address"
            )
        sample = sample_of(text, time.monotonic())
        if not sample.steps:
            raise UnsupportedConfigError(
                f"{self._url} shows no steps of vllm_npu; start the server with {METRICS.name}=1 vllm-npu serve, and send it "
                "a request"
            )
        self._samples.append(sample)
        return rows_of_samples(tuple(self._samples))

    def _read(self) -> str:
        try:
            with urllib.request.urlopen(self._url, timeout=ANSWER_SECONDS) as answer:
                text: str = answer.read(MOST_BYTES).decode(errors="replace")
                return text
        except (OSError, ValueError, urllib.error.URLError) as error:
            raise UnsupportedConfigError(
                f"no answer from {self._url} ({error}); name the address of a running server, such as http://localhost:8000"
            ) from error
