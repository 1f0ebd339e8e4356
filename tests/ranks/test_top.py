"""`vllm-npu top`: rows of traces that ranks wrote and of a served /metrics; one sentence for a place that is no engine."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest

from tests.command_line import vllm_npu
from vllm_npu.tools.top.rows import Sample, rows_of_samples, rows_of_traces
from vllm_npu.tools.top.sources import source_of
from vllm_npu.trust.trace import Group, TraceRing, read_traces

EP = Group(name="ep", members=(0, 1, 2))


def record_a_late_rank(folder: Path, epoch: int = 0) -> None:
    """Ranks 0 and 2 are inside their second call, and rank 1 has ended the first one."""
    group = Group(name="ep", members=(0, 1, 2), epoch=epoch)
    for rank in range(3):
        ring = TraceRing.create(folder, rank, 3)
        ring.enter_step(5, "all2all")
        if epoch:
            ring.begin(EP, "all_gather", sizes=[1, 1, 1])  # of the epoch before: it never ended
        ring.end(ring.begin(group, "all_gather", sizes=[1, 1, 1]))
        if rank != 1:
            ring.begin(group, "all_to_all")


@pytest.mark.parametrize("epoch", [0, 2])
def test_of_traces(tmp_path, epoch):
    record_a_late_rank(tmp_path, epoch)
    rows = rows_of_traces(read_traces([tmp_path]), time.time() + 7)
    assert [row.strategy for row in rows] == ["all2all"] * 3
    assert [row.epoch for row in rows] == [epoch] * 3
    assert [row.step for row in rows] == [5] * 3
    assert [row.waiting_seconds is None for row in rows] == [False, True, False]
    assert rows[0].waiting_seconds == pytest.approx(7, abs=2)
    assert [row.late_seconds is None for row in rows] == [True, False, True]
    assert rows[1].late_seconds == pytest.approx(7, abs=2)
    assert rows[0].call.startswith("all_to_all on ep")
    now = rows_of_traces(read_traces([tmp_path]), time.time())
    assert [row.late_seconds for row in now] == [None] * 3, "a short wait is normal"


def sample(seconds: float, steps: list[float], strategy: str = "mc2") -> Sample:
    return Sample(
        seconds,
        {(rank, strategy): count for rank, count in enumerate(steps)},
        {(0, strategy): 10 * steps[0]},
        {(rank, strategy): 1e6 * count for rank, count in enumerate(steps)},
    )


def test_of_samples():
    [first, second] = rows_of_samples([sample(0, [5, 5])])
    assert (first.tokens, first.sent_bytes, first.step) == (None, None, 5)
    rows = rows_of_samples([sample(0, [5, 5]), sample(2, [9, 9])])
    assert [row.tokens for row in rows] == [20, None], "the second rank counts no tokens"
    assert [row.sent_bytes for row in rows] == [2e6, 2e6]
    assert [row.late_seconds for row in rows] == [None, None]
    stuck = [sample(0, [5, 5]), sample(2, [9, 8]), sample(4, [9, 8]), sample(12, [9, 8])]
    first, second = rows_of_samples(stuck)
    assert (first.waiting_seconds, first.late_seconds) == (10, None)
    assert (second.waiting_seconds, second.late_seconds) == (None, 10)
    idle = [sample(0, [5, 5]), sample(60, [5, 5])]
    assert [(row.waiting_seconds, row.late_seconds) for row in rows_of_samples(idle)] == [(None, None)] * 2
    both = Sample(3, {(0, "mc2"): 9, (0, "naive"): 100})
    assert rows_of_samples([Sample(1, {(0, "mc2"): 5, (0, "naive"): 100}), both])[0].strategy == "mc2"


class Metrics(BaseHTTPRequestHandler):
    text: ClassVar[bytes] = b""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/metrics" else 404)
        self.end_headers()
        self.wfile.write(self.text if self.path == "/metrics" else b"")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Metrics) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def exported(steps: int, of_vllm: bool = True) -> bytes:
    """/metrics as prometheus_client writes it."""
    registry = CollectorRegistry()
    if of_vllm:
        Counter("vllm:prompt_tokens", "theirs", registry=registry)
    for name in ("steps", "tokens", "sent_bytes"):
        counter = Counter(f"vllm_npu:moe_{name}", "ours", ("strategy", "rank"), registry=registry)
        for rank in range(2 if steps else 0):
            counter.labels("mc2", str(rank)).inc(steps)
    fallbacks = Counter("vllm_npu:moe_fallbacks", "ours", ("requested", "strategy", "rank"), registry=registry)
    fallbacks.labels("mc2", "naive", "0").inc()
    return generate_latest(registry)


def test_of_a_server(server):
    source = source_of(server)
    Metrics.text = exported(4)
    assert [(row.rank, row.step, row.tokens) for row in source.rows()] == [(0, 4, None), (1, 4, None)]
    Metrics.text = exported(8)
    rows = source.rows()
    assert [row.step for row in rows] == [8, 8]
    assert min(row.tokens for row in rows) > 0


def test_the_command_prints_a_table_and_writes_rows(tmp_path):
    traces = tmp_path / "traces"
    traces.mkdir()
    record_a_late_rank(traces)
    time.sleep(1.1)
    shown = vllm_npu("top", str(traces), "--once", "--json", str(tmp_path / "rows.json"), COLUMNS="160")
    assert shown.returncode == 0, shown.stderr
    assert "all2all" in shown.stdout
    assert "waiting since" in shown.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["rank"] for row in rows if row["late_seconds"]] == [1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"go away", "is not the /metrics of a vLLM server"),
        (exported(0), "shows no steps of vllm_npu"),
        (exported(3, of_vllm=False), "is not the /metrics of a vLLM server"),
        (b"vllm:x{ 1 1 1", "no text of Prometheus's format"),
    ],
)
def test_a_server_that_is_none_is_refused(server, text, expected):
    Metrics.text = text
    refused = vllm_npu("top", server, "--once")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
    assert expected in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_place_that_is_none_is_refused(tmp_path):
    for place, expected in {
        str(tmp_path / "nowhere"): "is no folder here and no http:// address",
        str(tmp_path): "no traces in",
        "http://127.0.0.1:9": "no answer from http://127.0.0.1:9/metrics",
    }.items():
        refused = vllm_npu("top", place)
        assert refused.returncode == 1
        assert expected in refused.stderr
        assert refused.stderr.count("\n") == 1
