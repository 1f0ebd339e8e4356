"""One process of vLLM's OpenAI-compatible server: it generates tokens over HTTP, with one strategy after another."""

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_npu.child_processes import free_port
from vllm_npu.tools.engines.engine_processes import (
    EngineFailedError,
    EngineProcesses,
    Parallelism,
    end_of,
    engine_environment,
)
from vllm_npu.tools.engines.process_tree import ProcessTree
from vllm_npu.tools.engines.start_watch import StartWatch
from vllm_npu.tools.engines.stop_signals import StopSignals

CAPTURE_SIZES = (1, 2, 4, 8)  # tokens; the largest holds a decode step of all sequences
START_SECONDS = 600.0
ANSWER_SECONDS = 300.0
STOP_SECONDS = 20.0
POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The tokens that the server generated with one strategy."""

    tokens: list[list[int]]  # token ids; one list for each prompt
    seconds: float
    # Least gap in log-probability (nats) between the best and the second-best token; None: not measured.
    smallest_margin: float | None


class HttpEngine(EngineProcesses):
    """One server on a free port of 127.0.0.1, `port`."""

    def __init__(
        self,
        model: Path,
        parallelism: Parallelism,
        *options: str,  # further options of the server
        plugins: str,  # VLLM_PLUGINS
        moe_comm: str,
        additional_config: Mapping[str, Any] | None = None,  # beside the section of this package
        dtype: str,
        folder: Path,  # of the log
        caches: Path,  # of vLLM; servers may share it
        graph_mode: str | None = None,  # vLLM's cudagraph_mode; None: eager
        stop_signals: StopSignals,
        environment: Mapping[str, str],  # added to os.environ
    ) -> None:
        own = {
            "VLLM_PLUGINS": plugins,
            "VLLM_SERVER_DEV_MODE": "1",  # offers /collective_rpc
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            **({"TORCHDYNAMO_DISABLE": "1"} if graph_mode is None else {}),
        }
        super().__init__(folder, {**engine_environment(caches, vanilla=False), **environment, **own}, stop_signals)
        self._name = f"{model.name} {parallelism} moe_comm={moe_comm}"
        self.log = folder / "server.log"
        self.port = free_port()
        graphs = {"cudagraph_mode": graph_mode, "cudagraph_capture_sizes": CAPTURE_SIZES}
        self._command = [
            *(sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(model), "--served-model-name", "tiny", "--dtype", dtype),
            *("--tensor-parallel-size", str(parallelism.tensor_parallel_size)),
            *("--data-parallel-size", str(parallelism.data_parallel_size)),
            *(["--enable-expert-parallel"] if parallelism.expert_parallel else []),
            *("--max-model-len", "256", "--max-num-seqs", "8", "--max-num-batched-tokens", "256"),
            *("--gpu-memory-utilization", "0.3", "--no-enable-prefix-caching", "--seed", "0"),
            *(["--enforce-eager"] if graph_mode is None else ["--compilation-config", json.dumps(graphs)]),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--additional-config", json.dumps({**(additional_config or {}), "vllm_npu": {"moe_comm": moe_comm}})),
            *options,
        ]
        self._tree: ProcessTree | None = None

    def _start(self) -> None:
        with self._stop_signals.held(), self.log.open("wb") as log:
            self._tree = ProcessTree(self._command, environment=self._environment, stdout=log, stderr=log)

    def _stop(self, *, orderly: bool) -> None:
        if self._tree is not None:
            self._tree.terminate()  # SIGTERM is also the orderly way to end a server
            self._tree.stop(grace_seconds=STOP_SECONDS)

    def wait_until_ready(self, beside: Sequence["HttpEngine"] = ()) -> None:
        """Wait until the server answers /health. Raises EngineFailedError if the server ends first or takes too long.

        `beside`: servers that start meanwhile. If one of them ends before it is ready, an EngineFailedError says so at once.
        """
        starts = [each._start_check() for each in (self, *beside)]

        def check_processes() -> None:
            for check in starts:
                check()

        assert self._tree is not None
        try:
            wait_for_health(self.port, START_SECONDS, check_processes)
        except TimeoutError:
            raise self._failure(f"was not ready after {START_SECONDS:.0f} s") from None
        self._tree.note_shared_memory()

    def _start_check(self) -> Callable[[], None]:
        """A function that raises EngineFailedError if the server has ended while it starts."""
        assert self._tree is not None
        tree = self._tree
        watch = StartWatch(tree, self.log)

        def check_process() -> None:
            if tree.process.poll() is not None:
                raise self._failure(f"ended with exit status {tree.process.returncode} while starting")
            failure = watch.failure()
            if failure is not None and not self._is_up():  # a server that is up may end processes in good order
                raise self._failure(f"did not start: {failure}")

        return check_process

    def _is_up(self) -> bool:
        """Whether the server answers /health."""
        try:
            ask_server(self.port, "/health", None, POLL_SECONDS)
        except OSError:
            return False
        return True

    def set_moe_comm(self, name: str) -> None:
        """Change the strategy of all engines. Raises EngineFailedError if a worker refuses it."""
        self.rpc("set_moe_comm", name)

    def take_counters(self) -> list[dict[str, Any]]:
        """The counters of the workers of the first data-parallel rank, which start again at 0. vLLM returns no other rank's."""
        results: list[dict[str, Any]] = self.rpc("moe_comm_counters")["results"]
        return results

    def prefill(self, prompts: Sequence[list[int]]) -> list[dict[str, Any]]:
        """Compute all prompts at once, and keep their blocks of the KV cache for another server.

        Returns the `kv_transfer_params` of each prompt: where the other server finds its blocks. The request is that of
        vLLM's and vllm-ascend's proxies for a node with "kv_role": "kv_producer". Raises EngineFailedError.
        """
        wanted = {"kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False}, "min_tokens": 1}
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(lambda prompt: self._complete(prompt, 1, **wanted), prompts))
        if lacking := [number for number, answer in enumerate(answers) if not answer.get("kv_transfer_params")]:
            raise self._failure(f"keeps no blocks for another server, of the prompts {lacking}")
        return [answer["kv_transfer_params"] for answer in answers]

    def generate(
        self,
        prompts: Sequence[list[int]],
        max_tokens: Sequence[int],
        *,
        measure_margin: bool = False,
        kv_transfers: Sequence[Mapping[str, Any]] | None = None,
    ) -> Served:
        """Send all prompts at once and generate greedily. `kv_transfers`: what another server's `prefill` returned.

        Raises EngineFailedError.
        """
        started = time.perf_counter()
        # Keys of tokens are unique then, where two tokens have the same text.
        further = {"logprobs": 2, "return_tokens_as_token_ids": True} if measure_margin else {}

        def complete(prompt: list[int], limit: int, transfer: Mapping[str, Any] | None) -> dict[str, Any]:
            given = {"kv_transfer_params": transfer} if transfer else {}
            choice: dict[str, Any] = self._complete(prompt, limit, **further, **given)["choices"][0]
            return choice

        transfers = [None] * len(prompts) if kv_transfers is None else list(kv_transfers)
        with ThreadPoolExecutor(len(prompts)) as pool:
            choices = list(pool.map(complete, prompts, max_tokens, transfers))
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

    def _complete(self, prompt: list[int], max_tokens: int, **further: Any) -> dict[str, Any]:
        """The server's answer for one prompt. `further` are fields of the request."""
        body = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            **further,
        }
        return self._ask("/v1/completions", body)

    def rpc(self, method: str, *args: str, **kwargs: str) -> dict[str, Any]:
        """Call a method of every worker, and return what the first data-parallel rank answers. Raises EngineFailedError."""
        return self._ask("/collective_rpc", {"method": method, "args": list(args), "kwargs": kwargs})

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = json.loads(ask_server(self.port, path, body, ANSWER_SECONDS) or "{}")
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
    """Send a request to a server on 127.0.0.1 and return its answer. Raises urllib's errors.

    The request is a POST of `body`, or a GET if `body` is None. `timeout` is in seconds.
    """
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        text: str = answer.read().decode()
    return text


def wait_for_health(port: int, seconds: float, check_processes: Callable[[], None]) -> None:
    """Wait until the server on 127.0.0.1:`port` answers /health. Raises TimeoutError after `seconds`.

    `check_processes` is called after each refused request. It raises an error if the server has ended.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            ask_server(port, "/health", None, 5.0)
        except OSError:  # urllib's errors are OSErrors
            check_processes()
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server on port {port} did not answer /health in {seconds:.0f} s") from None
            time.sleep(POLL_SECONDS)
        else:
            return
