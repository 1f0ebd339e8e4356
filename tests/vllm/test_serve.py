"""`vllm-npu serve` with two data-parallel ranks, asked by OpenAI's own client, against vanilla vLLM's tokens."""

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.vllm.processes import kill_processes_of, processes_of
from tests.vllm.text_prompts import TEXT_MAX_TOKENS, TEXTS
from vllm_npu.child_processes import free_port
from vllm_npu.tools.engines.tiny_models import DEMO_MAX_TOKENS, QWEN3_MOE, TinyModel

pytestmark = pytest.mark.slow

START_SECONDS = 300
STOP_SECONDS = 60
VLLM_OPTIONS = [
    *("--served-model-name", "tiny"),
    *("--data-parallel-size", "2"),
    "--enable-expert-parallel",
    *("--dtype", "float32"),
    *("--max-model-len", "256"),
    *("--max-num-seqs", "8"),
    *("--kv-cache-memory-bytes", str(64 << 20)),
    "--enforce-eager",
    "--no-enable-prefix-caching",
    *("--host", "127.0.0.1"),
]


def test_concurrent_streams_get_vanilla_tokens(
    checkpoint: Callable[[TinyModel], Path],
    vanilla_tokens: Callable[[TinyModel], list[list[int]]],
    caches: Path,
    tmp_path: Path,
    short_folder: Path,
    shared_memory_unchanged: None,
) -> None:
    """Eight streams of different lengths at once; then SIGTERM, which must reach vLLM and end it in good order."""
    openai = pytest.importorskip("openai", reason="needs OpenAI's client: pip install openai")
    expected = vanilla_tokens(QWEN3_MOE)[len(DEMO_MAX_TOKENS) :]
    report = tmp_path / "report.json"
    port = free_port()
    options = ["--json", str(report), "--port", str(port)]
    with starting_server(checkpoint(QWEN3_MOE), caches, short_folder, *options) as server:
        server.wait_for("Application startup complete")
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

        def stream(text: str, max_tokens: int) -> list[int]:
            chunks = client.completions.create(
                model="tiny",
                prompt=text,
                max_tokens=max_tokens,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            return [token for chunk in chunks for choice in chunk.choices for token in choice.token_ids or []]

        with ThreadPoolExecutor(len(TEXTS)) as pool:
            assert list(pool.map(stream, TEXTS, TEXT_MAX_TOKENS)) == expected
        check_metrics(f"http://127.0.0.1:{port}/metrics", num_tokens=sum(map(len, expected)))
        log = server.log()
        assert "MoE communication: all2all" in log, log

        server.process.send_signal(signal.SIGTERM)
        server.process.wait(STOP_SECONDS)
    results = json.loads(report.read_text())
    assert results["exit_status"] == server.process.returncode == 0
    assert results["moe_comm"] == "all2all"
    left = [path.name for path in short_folder.iterdir() if path.is_socket() or path.name.startswith("vllm-npu-")]
    assert left == [], "sockets, and what the processes counted, go with the server"


def test_ctrl_c_while_the_engines_start_ends_the_server(
    checkpoint: Callable[[TinyModel], Path], caches: Path, short_folder: Path, shared_memory_unchanged: None
) -> None:
    """vLLM alone loses what comes at this time, and then waits for ten minutes for engines that wait for it."""
    with starting_server(checkpoint(QWEN3_MOE), caches, short_folder, "--port", str(free_port())) as server:
        server.wait_for("Started DP Coordinator")
        server.process.send_signal(signal.SIGINT)
        ended_by = server.process.wait(2 * STOP_SECONDS) - 128  # a fifth of what vLLM would wait
        # By Python's KeyboardInterrupt, or by the signal that follows, where it comes at the very end.
        assert ended_by in (signal.SIGINT, signal.SIGTERM), server.log()
    assert processes_of(short_folder) == []


def check_metrics(url: str, num_tokens: int) -> None:
    """What the two workers counted, at the API server's endpoint, among vLLM's own series."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(url, timeout=60) as answer:
        samples = [
            sample for family in text_string_to_metric_families(answer.read().decode()) for sample in family.samples
        ]

    def of(name: str) -> dict[tuple[str | None, str], float]:
        found = [sample for sample in samples if sample.name == f"vllm_npu:moe_{name}_total"]
        return {(sample.labels.get("strategy"), sample.labels["rank"]): sample.value for sample in found}

    ranks = {("all2all", "0"), ("all2all", "1")}
    steps = of("steps")
    assert set(steps) == ranks
    assert steps[("all2all", "0")] == steps[("all2all", "1")] > max(TEXT_MAX_TOKENS), "ranks step together"
    tokens = of("tokens")
    assert set(tokens) == ranks
    assert sum(tokens.values()) > num_tokens, "the prompts' tokens are counted as well"
    sent = of("sent_bytes")
    assert set(sent) == ranks
    assert all(count > tokens[rank] for rank, count in sent.items())
    assert of("agreement_failures") == {(None, "0"): 0, (None, "1"): 0}
    assert of("fallbacks") == {}
    own = {sample.name for sample in samples}
    assert {"vllm:generation_tokens_total", "vllm:num_requests_running"} <= own, "vLLM's own series are still there"


class Server:
    """`vllm-npu serve` as a process whose log is read as it comes."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vllm_npu.cli", "serve", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._lines: list[str] = []
        self._ended = False
        self._grown = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for(self, text: str) -> None:
        """Wait until the log says so; fail with it if the server ends before."""
        with self._grown:
            said = self._grown.wait_for(lambda: text in self.log() or self._ended, START_SECONDS)
        assert said, f"not {text!r} within {START_SECONDS} s:\n{self.log()}"
        assert text in self.log(), f"ended without {text!r}:\n{self.log()}"

    def log(self) -> str:
        return "".join(self._lines)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._grown:
                self._lines.append(line)
                self._grown.notify_all()
        with self._grown:
            self._ended = True
            self._grown.notify_all()


@contextmanager
def starting_server(model: Path, caches: Path, folder: Path, *options: str) -> Iterator[Server]:
    """The server, with `folder` for its sockets; killed if the test fails."""
    server = Server(
        [str(model), "--moe-comm", "all2all", *VLLM_OPTIONS, *options],
        os.environ
        | {
            "TMPDIR": str(folder),
            "VLLM_CACHE_ROOT": str(caches / "vllm"),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_NPU_METRICS": "1",
        },
    )
    try:
        yield server
    finally:
        if server.process.poll() is None:
            kill_processes_of(folder)
            server.process.wait(STOP_SECONDS)
