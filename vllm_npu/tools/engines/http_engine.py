"""vLLM's OpenAI-compatible server as a process of ours, asked for tokens over HTTP, led from strategy to strategy."""

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_npu.tools.engines.engine_processes import (
    EngineFailedError,
    EngineProcesses,
    Parallelism,
    end_of,
    engine_environment,
    free_port,
)
from vllm_npu.tools.engines.process_tree import ProcessTree
from vllm_npu.tools.engines.stop_signals import StopSignals

START_SECONDS = 600.0
ANSWER_SECONDS = 300.0
STOP_SECONDS = 20.0
POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What came over HTTP with one strategy."""

    tokens: list[list[int]]  # one list a prompt
    seconds: float
    smallest_margin: (
        float | None
    )  # least gap in log-probability between best and second-best token; None: not asked for


class HttpEngine(EngineProcesses):
    """One server on 127.0.0.1."""

    def __init__(
        self,
        model: Path,
        parallelism: Parallelism,
        *options: str,  # of the server, beyond those that all have
        plugins: str,  # VLLM_PLUGINS
        moe_comm: str,
        dtype: str,
        folder: Path,  # for the log
        caches: Path,  # of vLLM, shared or not
        stop_signals: StopSignals,
        environment: Mapping[str, str],  # on top of os.environ
    ) -> None:
        own = {
            "VLLM_PLUGINS": plugins,
            "VLLM_SERVER_DEV_MODE": "1",  # /collective_rpc
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "TORCHDYNAMO_DISABLE": "1",
        }
        super().__init__(folder, {**engine_environment(caches, vanilla=False), **environment, **own}, stop_signals)
        self._name = f"{model.name} {parallelism} moe_comm={moe_comm}"
        self.log = folder / "server.log"
        self._port = free_port()
        self._command = [
            *(sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(model), "--served-model-name", "tiny", "--dtype", dtype),
            *("--tensor-parallel-size", str(parallelism.tensor_parallel_size)),
            *("--data-parallel-size", str(parallelism.data_parallel_size)),
            *(["--enable-expert-parallel"] if parallelism.expert_parallel else []),
            *("--max-model-len", "256", "--max-num-seqs", "8", "--max-num-batched-tokens", "256"),
            *("--gpu-memory-utilization", "0.3", "--enforce-eager", "--no-enable-prefix-caching", "--seed", "0"),
            *("--host", "127.0.0.1", "--port", str(self._port)),
            *("--additional-config", json.dumps({"vllm_npu": {"moe_comm": moe_comm}})),
            *options,
        ]
        self._tree: ProcessTree | None = None

    def _start(self) -> None:
        with self._stop_signals.held(), self.log.open("wb") as log:
            self._tree = ProcessTree(self._command, environment=self._environment, stdout=log, stderr=log)

    def _stop(self, *, orderly: bool) -> None:
        if self._tree is not None:
            self._tree.terminate()  # its orderly way to end, too
            self._tree.stop(grace_seconds=STOP_SECONDS)

    def wait_until_ready(self) -> None:
        """Wait for /health. Raises EngineFailedError where the server ends before, or takes too long."""
        assert self._tree is not None
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                ask_server(self._port, "/health", None, 5.0)
            except (urllib.error.URLError, OSError):
                if self._tree.process.poll() is not None:
                    raise self._failure(
                        f"ended with exit status {self._tree.process.returncode} while starting"
                    ) from None
                if time.monotonic() > deadline:
                    raise self._failure(f"was not ready after {START_SECONDS:.0f} s") from None
                time.sleep(POLL_SECONDS)
            else:
                self._tree.note_shared_memory()
                return

    def set_moe_comm(self, name: str) -> None:
        """Change the strategy of all engines. Raises EngineFailedError where a worker refuses."""
        self._rpc("set_moe_comm", name)

    def take_counters(self) -> list[dict[str, Any]]:
        """moe_comm_counters of the workers of the first data-parallel rank; vLLM returns no others'."""
        results: list[dict[str, Any]] = self._rpc("moe_comm_counters")["results"]
        return results

    def generate(
        self, prompts: Sequence[list[int]], max_tokens: Sequence[int], *, measure_margin: bool = False
    ) -> Served:
        """All prompts at once, greedily. Raises EngineFailedError."""
        started = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            choices = list(pool.map(self._complete, prompts, max_tokens, [measure_margin] * len(prompts)))
        gaps = [
            top[0] - top[1]
            for choice in choices
            if measure_margin
            for each in choice["logprobs"]["top_logprobs"]
            if len(top := sorted(each.values(), reverse=True)) > 1
        ]
        return Served(
            tokens=[choice["token_ids"] for choice in choices],
            seconds=time.perf_counter() - started,
            smallest_margin=min(gaps) if gaps else None,
        )

    def _complete(self, prompt: list[int], max_tokens: int, measure_margin: bool) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        if measure_margin:
            body["logprobs"] = 2
            body["return_tokens_as_token_ids"] = True  # two tokens of the same text would share a key
        choice: dict[str, Any] = self._ask("/v1/completions", body)["choices"][0]
        return choice

    def _rpc(self, method: str, *args: str) -> dict[str, Any]:
        return self._ask("/collective_rpc", {"method": method, "args": list(args)})

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = json.loads(ask_server(self._port, path, body, ANSWER_SECONDS) or "{}")
        except urllib.error.HTTPError as error:
            raise self._failure(
                f"answered {path} with {error.code}: {error.read().decode(errors='replace')}"
            ) from error
        except (urllib.error.URLError, OSError) as error:
            raise self._failure(f"did not answer {path}: {error}") from error
        return answer

    def _failure(self, what: str) -> EngineFailedError:
        return EngineFailedError(f"{self._name}: the server {what}\n{end_of(self.log)}")


def ask_server(port: int, path: str, body: dict[str, Any] | None, timeout: float) -> str:
    """The answer of a server on 127.0.0.1: to a POST of `body`, or to a GET where it is None. `timeout` in seconds. Raises
    urllib's errors."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        text: str = answer.read().decode()
    return text
