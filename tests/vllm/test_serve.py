"""`vllm-npu serve` with two data-parallel ranks. OpenAI's own client asks it, and vanilla vLLM's tokens are expected."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.time_limits import PATIENCE_SECONDS, on_this_machine
from tests.vllm.processes import free_ports, kill_processes_of, processes_of
from tests.vllm.text_prompts import TEXT_MAX_TOKENS, TEXTS
from vllm_npu.child_processes import free_port
from vllm_npu.tools.engines.http_engine import ask_server, wait_for_health
from vllm_npu.tools.engines.start_watch import OWN_END_SECONDS
from vllm_npu.tools.engines.tiny_models import DEMO_MAX_TOKENS, QWEN3_MOE, TinyModel

pytestmark = pytest.mark.slow

STOP_SECONDS = 15  # the longest stop on a quiet machine
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
    """Eight streams of different lengths at once. Then SIGTERM must reach vLLM and end it in good order."""
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

        server.stop(signal.SIGTERM)
    results = json.loads(report.read_text())
    assert results["exit_status"] == server.process.returncode == 0
    assert results["moe_comm"] == "all2all"
    assert sockets_and_folders_of_ours(short_folder) == []


@pytest.mark.nightly  # its start of two servers takes minutes on 2 cores
def test_each_rank_gets_a_server_as_from_vllms_own_command(
    checkpoint: Callable[[TinyModel], Path], caches: Path, short_folder: Path, shared_memory_unchanged: None
) -> None:
    """`vllm serve` starts one API server for each data-parallel rank, on one port. Both must answer."""
    port = free_port()
    with starting_server(checkpoint(QWEN3_MOE), caches, short_folder, "--port", str(port)) as server:
        wait_until_healthy(port, server)
        give_up, answering = time.monotonic() + PATIENCE_SECONDS, set[str]()
        while len(answering) < 2 and time.monotonic() < give_up:
            answering.add(server_that_answers(port))
        assert answering == {"VLLM::APIServer_0", "VLLM::APIServer_1"}, server.log()
        assert len(complete(port)) == 8
        assert server.stop(signal.SIGTERM) == 0, server.log()
    assert processes_of(short_folder) == []
    assert sockets_and_folders_of_ours(short_folder) == []


@pytest.mark.nightly  # its start of two servers takes minutes on 2 cores
def test_an_external_load_balancer_gets_a_port_of_each_rank(
    checkpoint: Callable[[TinyModel], Path], caches: Path, short_folder: Path, shared_memory_unchanged: None
) -> None:
    """vLLM's supervisor starts a server for each rank, on ports one after another, and answers /health for all of them."""
    port, supervisor = free_ports(2), free_port()
    options = ["--data-parallel-multi-port-external-lb", "--data-parallel-size-local", "2", "--port", str(port)]
    options += ["--data-parallel-supervisor-port", str(supervisor), "--data-parallel-rpc-port", str(free_port())]
    with starting_server(checkpoint(QWEN3_MOE), caches, short_folder, *options) as server:
        wait_until_healthy(supervisor, server)
        assert complete(port) == complete(port + 1)
        server.stop(signal.SIGTERM)
    assert processes_of(short_folder) == []
    assert sockets_and_folders_of_ours(short_folder) == []


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The answer to one request on a connection of its own."""
    answer: dict[str, Any] = json.loads(ask_server(port, path, body, timeout=60))
    return answer


def complete(port: int) -> list[int]:
    """The ids of 8 tokens that the server generates greedily."""
    body = {"model": "tiny", "prompt": TEXTS[0], "max_tokens": 8, "temperature": 0}
    choice = ask(port, "/v1/completions", body | {"ignore_eos": True, "return_token_ids": True})["choices"][0]
    return [int(token) for token in choice["token_ids"]]


def server_that_answers(port: int) -> str:
    """Ask on a new connection, and return the name of the process at its other end. The lines of vLLM's log do not tell it."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("GET", "/v1/models")
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["data"][0]["id"]) == (200, "tiny")
        assert connection.sock is not None, "the server closed the connection"
        ends = ("127.0.0.1", port), connection.sock.getsockname()
        found = [
            each.pid
            for each in psutil.net_connections("tcp")
            if (each.laddr, each.raddr) == ends and each.pid is not None
        ]
        assert found, f"no process has the server's end of the connection to port {port}"
        return Path(f"/proc/{found[0]}/cmdline").read_text().partition("\0")[0].strip()


def wait_until_healthy(port: int, server: "Server") -> None:
    """Wait until the port answers /health. Fail with the server's log if the server ends before, or hangs."""
    wait_for_health(port, math.inf, server.check_alive)


def test_ctrl_c_while_the_engines_start_ends_the_server(
    checkpoint: Callable[[TinyModel], Path], caches: Path, short_folder: Path, shared_memory_unchanged: None
) -> None:
    """vLLM alone loses a signal that comes at this time. Then it waits ten minutes for engines that wait for it."""
    with starting_server(checkpoint(QWEN3_MOE), caches, short_folder, "--port", str(free_port())) as server:
        server.wait_for("Started DP Coordinator")
        ended_by = server.stop(signal.SIGINT) - 128
        assert ended_by == signal.SIGINT, server.log()
    assert processes_of(short_folder) == []
    assert sockets_and_folders_of_ours(short_folder) == []


@pytest.mark.nightly  # its start of two servers takes minutes on 2 cores
def test_a_worker_that_cannot_start_ends_the_command(
    checkpoint: Callable[[TinyModel], Path],
    caches: Path,
    tmp_path: Path,
    short_folder: Path,
    shared_memory_unchanged: None,
) -> None:
    """Half of the file of weights is missing: only workers read it. The command must end soon after, and show why."""
    model = shutil.copytree(checkpoint(QWEN3_MOE), tmp_path / "model")
    weights = next(model.glob("*.safetensors"))
    os.truncate(weights, weights.stat().st_size // 2)
    with starting_server(model, caches, short_folder, "--port", str(free_port())) as server:
        server.wait_for("WorkerProc failed to start")
        assert ends_with_an_error(server), server.log()
        assert "SafetensorError" in server.log(), server.log()
    assert processes_of(short_folder) == []
    assert sockets_and_folders_of_ours(short_folder) == []


@pytest.mark.nightly  # its start of two servers takes minutes on 2 cores
@pytest.mark.parametrize("kind", ["Worker_DP1", "EngineCore_DP1"])
def test_a_process_that_is_killed_while_it_starts_ends_the_command(
    kind: str,
    checkpoint: Callable[[TinyModel], Path],
    caches: Path,
    short_folder: Path,
    shared_memory_unchanged: None,
) -> None:
    """As the kernel does when memory runs out. The other rank waits for the killed one, and nobody may wait for both."""
    with starting_server(checkpoint(QWEN3_MOE), caches, short_folder, "--port", str(free_port())) as server:
        os.kill(wait_for_process(f"::{kind}", short_folder, server), signal.SIGKILL)
        assert ends_with_an_error(server), server.log()
    assert processes_of(short_folder) == []
    assert sockets_and_folders_of_ours(short_folder) == []


def ends_with_an_error(server: "Server") -> bool:
    """Wait for the end, and say whether it came in time and with the exit status of an error."""
    began = time.monotonic()
    status = server.process.wait(PATIENCE_SECONDS)
    return status == 1 and time.monotonic() - began < on_this_machine(OWN_END_SECONDS + STOP_SECONDS)


def wait_for_process(title: str, folder: Path, server: "Server") -> int:
    """The id of the process of the test whose name holds `title`, as soon as it has that name."""
    while True:
        server.check_alive()
        for pid in processes_of(folder):
            try:
                if title in Path(f"/proc/{pid}/cmdline").read_text(errors="replace"):
                    return pid
            except OSError:
                continue  # gone meanwhile
        time.sleep(0.05)


def sockets_and_folders_of_ours(folder: Path) -> list[str]:
    """vLLM's sockets and the folders of `vllm-npu serve` (for sockets, and for the counts of the processes)."""
    return [path.name for path in folder.iterdir() if path.is_socket() or path.name.startswith("vllm-npu-")]


def check_metrics(url: str, num_tokens: int) -> None:
    """The API server's endpoint shows the counts of both workers among vLLM's own series."""
    from prometheus_client.parser import text_string_to_metric_families

    def read() -> list[Any]:
        with urllib.request.urlopen(url, timeout=60) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            return [sample for family in families for sample in family.samples]

    def steps_of(samples: list[Any]) -> set[float]:
        return {sample.value for sample in samples if sample.name == "vllm_npu:moe_steps_total"}

    # The last step ends on one rank before the other: wait until both have counted it.
    give_up = time.monotonic() + PATIENCE_SECONDS
    while len(steps_of(samples := read())) != 1 and time.monotonic() < give_up:
        time.sleep(0.1)

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
    """`vllm-npu serve` as a process. A thread reads its log."""

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
        self._grew_at = time.monotonic()
        self._ended = False
        self._grown = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for(self, text: str) -> None:
        """Wait until the log holds `text`. Fail with the log if the server ends before that, or hangs."""
        with self._grown:
            while text not in self.log():
                assert not self._ended, f"ended without {text!r}:\n{self.log()}"
                self._check_grows()
                self._grown.wait(1.0)

    def check_alive(self) -> None:
        """Fail with the log if the server has ended, or hangs."""
        assert self.process.poll() is None, self.log()
        self._check_grows()

    def _check_grows(self) -> None:
        """Fail if no line came for so long that only a hang explains it. A whole start takes any time on a busy machine."""
        silent = time.monotonic() - self._grew_at
        assert silent < on_this_machine(PATIENCE_SECONDS), f"no line for {silent:.0f} s:\n{self.log()}"

    def stop(self, signum: signal.Signals) -> int:
        """Send `signum`, and wait for the end, which must come in time. Returns the exit status."""
        began = time.monotonic()
        self.process.send_signal(signum)
        status = self.process.wait(PATIENCE_SECONDS)
        assert time.monotonic() - began < on_this_machine(STOP_SECONDS), self.log()
        return status

    def log(self) -> str:
        return "".join(self._lines)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._grown:
                self._lines.append(line)
                self._grew_at = time.monotonic()
                self._grown.notify_all()
        with self._grown:
            self._ended = True
            self._grown.notify_all()


@contextmanager
def starting_server(model: Path, caches: Path, folder: Path, *options: str) -> Iterator[Server]:
    """Start the server with `folder` for its sockets. Kill it if the test fails."""
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
            server.process.wait(PATIENCE_SECONDS)
