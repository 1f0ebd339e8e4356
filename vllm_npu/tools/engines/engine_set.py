"""The engines of one topology: one vLLM process for each data-parallel rank. They run one strategy after another.

offline_engine.py is the program at the other end of the pipes.
"""

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vllm_npu.child_processes import free_port
from vllm_npu.tools.engines.engine_processes import (
    EngineFailedError,
    EngineProcesses,
    Parallelism,
    end_of,
    engine_environment,
)
from vllm_npu.tools.engines.offline_engine import EngineRequest, StrategyResult
from vllm_npu.tools.engines.process_tree import ProcessTree
from vllm_npu.tools.engines.stop_signals import StopSignals

START_SECONDS = 420.0  # longest wait until an engine has loaded and compiled the model
STRATEGY_SECONDS = 180.0  # longest wait for the answers of one strategy
ORDERLY_STOP_SECONDS = 20.0  # idle engines get this time to end by themselves
FORCED_STOP_SECONDS = 3.0  # interrupted and failing engines get this time; then they are killed
T = TypeVar("T")
OFFLINE_ENGINE = "vllm_npu.tools.engines.offline_engine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The tokens that all ranks of one topology generated with one strategy, and the counters of their workers."""

    strategy: str | None  # the requested one; None: vLLM's own communication
    tokens: list[list[int]]  # token ids; one list for each prompt, in the order of the prompts
    seconds: float  # time of the slowest rank
    counters: list[dict[str, Any]]  # one for each worker of every rank
    smallest_margin: float | None  # see StrategyResult
    prompt_logprobs: list[list[float]] | None  # see StrategyResult; in the order of the prompts


class EngineSet(EngineProcesses):
    """Engines for one model and topology.

    Prompt i goes to data-parallel rank i modulo the number of ranks. Each call of `generate` takes the next one of
    `strategies`. `[None]` starts vanilla vLLM, without the plugin of this package.
    """

    def __init__(
        self,
        model: Path,
        parallelism: Parallelism,
        *,
        strategies: Sequence[str | None],
        prompts: Sequence[list[int]],
        max_tokens: Sequence[int],  # one for each prompt
        folder: Path,  # of the logs; the caller removes it
        caches: Path,  # of vLLM; engine sets may share it; the caller removes it
        compiled: bool = False,
        dtype: str = "float32",
        measure_margins: bool = False,
        measure_prompts: bool = False,
        stop_signals: StopSignals | None = None,
        environment: Mapping[str, str] | None = None,  # added to os.environ
        engine_args: Mapping[str, Any] | None = None,  # further vllm.EngineArgs, by their Python names
        module: str = OFFLINE_ENGINE,  # that each engine runs, or one that prepares vLLM and then calls its main()
    ) -> None:
        own = engine_environment(caches, vanilla=not any(strategies))
        super().__init__(folder, {**own, **(environment or {})}, stop_signals or StopSignals())
        self.parallelism = parallelism
        self._name = f"{model.name} {parallelism}"
        if not compiled:
            # Even an eager vLLM compiles small functions (for the shard of a vocabulary, the ranks of log-probabilities).
            # That takes 15 s and more before the first token.
            self._environment["TORCHDYNAMO_DISABLE"] = "1"
        self._module = module
        self._remaining = list(strategies)
        self._ranks: list[_Rank] = []
        ranks = parallelism.data_parallel_size
        port = free_port() if ranks > 1 else 0
        self._requests = [
            EngineRequest(
                model=str(model),
                prompts=list(prompts[rank::ranks]),
                max_tokens=list(max_tokens[rank::ranks]),
                strategies=list(strategies),
                tensor_parallel_size=parallelism.tensor_parallel_size,
                data_parallel_size=ranks,
                data_parallel_rank=rank,
                data_parallel_port=port,
                enable_expert_parallel=parallelism.expert_parallel,
                dtype=dtype,
                enforce_eager=not compiled,
                await_go=True,
                measure_margins=measure_margins,
                measure_prompts=measure_prompts,
                engine_args=dict(engine_args or {}),
            )
            for rank in range(ranks)
        ]

    def _start(self) -> None:
        for request in self._requests:
            with self._stop_signals.held():
                self._ranks.append(_Rank(request, self._environment, self._folder, self._module))

    @property
    def trees(self) -> list[ProcessTree]:
        """The process tree of every rank, in rank order."""
        return [rank.tree for rank in self._ranks]

    def wait_until_ready(self) -> float:
        """Wait until every engine has loaded. Return the seconds of the slowest one. Raises EngineFailedError."""
        events = self._collect("ready", START_SECONDS, doing="starting")
        return max(float(event["seconds"]) for event in events)

    def generate(self) -> Generation:
        """Let all ranks generate with the next strategy, and join their answers. Raises EngineFailedError."""
        strategy = self._remaining.pop(0)
        for rank in self._ranks:
            rank.go()
        doing = f"generating with {strategy or 'vanilla vLLM'}"
        results = [
            StrategyResult.from_event(event) for event in self._collect("finished", STRATEGY_SECONDS, doing=doing)
        ]
        margins = [result.smallest_margin for result in results if result.smallest_margin is not None]
        logprobs = [result.prompt_logprobs for result in results]
        return Generation(
            strategy=strategy,
            tokens=_in_order([result.tokens for result in results]),
            seconds=max(result.seconds for result in results),
            counters=[counters for result in results for counters in result.counters],
            smallest_margin=min(margins, default=None),
            prompt_logprobs=_in_order(of_prompts) if (of_prompts := [each for each in logprobs if each]) else None,
        )

    def _stop(self, *, orderly: bool) -> None:
        for rank in self._ranks:
            rank.hang_up()
            if not orderly:
                rank.tree.terminate()
        deadline = time.monotonic() + (ORDERLY_STOP_SECONDS if orderly else FORCED_STOP_SECONDS)
        for rank in self._ranks:
            rank.tree.stop(grace_seconds=max(0.0, deadline - time.monotonic()))

    def _collect(self, event: str, timeout: float, *, doing: str) -> list[dict[str, Any]]:
        """Wait for one answer of the kind `event` from every rank, and return them in rank order."""
        deadline = time.monotonic() + timeout
        received: dict[int, dict[str, Any]] = {}
        with selectors.DefaultSelector() as selector:
            for index, rank in enumerate(self._ranks):
                selector.register(rank.answers, selectors.EVENT_READ, index)
            while len(received) < len(self._ranks):
                readable = selector.select(max(0.0, deadline - time.monotonic()))
                if not readable:
                    silent = [i for i in range(len(self._ranks)) if i not in received]
                    raise self._failure(silent, doing, f"gave no answer for {timeout:.0f} s")
                for key, _ in readable:
                    line = self._ranks[key.data].read_line()
                    if line is None:
                        status = self._ranks[key.data].tree.process.wait()
                        raise self._failure([key.data], doing, f"ended with exit status {status}")
                    if line:
                        answer = json.loads(line)
                        if answer["event"] != event:
                            raise self._failure([key.data], doing, f"answered {answer['event']!r}, not {event!r}")
                        received[key.data] = answer
        for rank in self._ranks:
            rank.tree.note_shared_memory()
        return [received[index] for index in range(len(self._ranks))]

    def _failure(self, indices: list[int], doing: str, what: str) -> EngineFailedError:
        logs = "\n".join(end_of(self._ranks[i].log) for i in indices)
        which = " and ".join(f"rank {i}" for i in indices)
        return EngineFailedError(f"{self._name}: the engine of {which} {what} while {doing}.\n{logs}")


def _in_order(of_ranks: Sequence[Sequence[T]]) -> list[T]:
    """One value for each prompt, in the order of the prompts, from the values of each rank's prompts."""
    num_prompts = sum(map(len, of_ranks))
    return [of_ranks[i % len(of_ranks)][i // len(of_ranks)] for i in range(num_prompts)]


class _Rank:
    """One engine process, its two pipes and its log."""

    def __init__(self, request: EngineRequest, environment: Mapping[str, str], folder: Path, module: str) -> None:
        self.log = folder / f"rank{request.data_parallel_rank}.log"
        with self.log.open("wb") as log:
            self.tree = ProcessTree(
                [sys.executable, "-m", module],
                environment=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self.tree.process.stdin is not None
        assert self.tree.process.stdout is not None
        self._orders = self.tree.process.stdin
        self.answers = self.tree.process.stdout
        self._pending = b""
        self._order(request.to_json())

    def go(self) -> None:
        """Let the engine start with its next strategy."""
        self._order("go")

    def hang_up(self) -> None:
        """Close the pipe of orders. An engine that waits for an order then ends by itself."""
        try:
            self._orders.close()
        except BrokenPipeError:
            return  # the engine ended before it had read all orders

    def read_line(self) -> str | None:
        """Read the bytes that have arrived. Return a complete line, "" if there is none yet, or None at the end."""
        chunk = os.read(self.answers.fileno(), 1 << 16)
        if not chunk:
            return None
        self._pending += chunk
        line, newline, rest = self._pending.partition(b"\n")
        if not newline:
            return ""
        self._pending = rest
        return line.decode()

    def _order(self, line: str) -> None:
        try:
            self._orders.write(line.encode() + b"\n")
            self._orders.flush()
        except BrokenPipeError:
            return  # the engine has ended, and the next read of its answers reports that
