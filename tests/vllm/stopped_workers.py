"""A server under load whose workers are stopped with SIGSTOP and continued, and what its clients see of that.

As a program it measures: python -m tests.vllm.stopped_workers --stops 10 --ranks 2
"""

import argparse
import itertools
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.time_limits import PATIENCE_SECONDS
from tests.vllm.processes import processes_of
from vllm_npu import envs

DEADLINE = 4.0  # seconds for a collective
BEYOND = (1.0, 10.0)  # seconds for which a stop outlasts the deadline, at least and at most
QUIET_SECONDS = 3.0  # between two stops, so that a request of each client ends
MAX_TOKENS = 60
CLIENTS = 4
ENVIRONMENT = {envs.COLLECTIVE_DEADLINE.name: str(DEADLINE), "VLLM_SERVER_DEV_MODE": "1"}  # for /reset_prefix_cache
PROMPTS = [f"{number:02} {'experts meet at the gate ' * 3}{number * 7919}" for number in range(24)]
"""Each has blocks that no other prompt has, so a step that breaks may be the first to fill them."""


def options(ranks: int = 2) -> list[str]:
    """Beside those of starting_server. Prefixes are cached in small blocks, so that one that a broken step left empty shows."""
    section = {"vllm_npu": {"fault_tolerance": "retry"}}
    return [
        *("--data-parallel-size", str(ranks)),
        "--enable-prefix-caching",
        *("--block-size", "32"),
        *("--additional-config", json.dumps(section)),
    ]


@dataclass
class Answer:
    """What a client got for one prompt."""

    prompt: str
    sent_at: float
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # of each token
    finish_reason: str | None = None
    error: str | None = None


def ask(port: int, prompt: str, answers: list[Answer] | None = None, **wanted: Any) -> Answer:
    """Stream one completion. `answers` gets it at once, and its tokens as they come. `wanted`: more fields of the request."""
    answer = Answer(prompt, time.monotonic())
    if answers is not None:
        answers.append(answer)
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "return_token_ids": True,
        **wanted,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            for line in response:
                text = line.decode().removeprefix("data: ").strip()
                if not text or text == "[DONE]":
                    continue
                chunk = json.loads(text)
                if "error" in chunk:
                    answer.error = str(chunk["error"])
                    continue
                for choice in chunk["choices"]:
                    new = choice.get("token_ids") or []
                    answer.tokens += new
                    answer.times += [time.monotonic()] * len(new)
                    answer.finish_reason = choice["finish_reason"] or answer.finish_reason
    except OSError as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer


class Load:
    """Clients that each ask for one prompt after another."""

    def __init__(self, port: int, clients: int = CLIENTS) -> None:
        self.answers: list[Answer] = []
        self._port = port
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(client,), daemon=True) for client in range(clients)]

    def _ask(self, client: int) -> None:
        turns = itertools.count(client, CLIENTS)
        while not self._end.is_set():
            ask(self._port, PROMPTS[next(turns) % len(PROMPTS)], self.answers)

    @contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._end.set()
            for thread in self._threads:
                thread.join(180)


@dataclass(frozen=True)
class Stop:
    """One stop of a worker."""

    worker: int
    stopped_at: float
    continued_at: float


def workers_of(folder: Path) -> list[int]:
    """Process ids of the workers, by data-parallel rank."""
    return list(_titled(folder, "::Worker").values())


def sockets(folder: Path) -> dict[str, int]:
    """How many sockets each worker and each engine core has, by the title of the process."""
    found = _titled(folder, "::Worker") | _titled(folder, "::EngineCore")
    return {title: _sockets_of(pid) for title, pid in found.items()}


def _titled(folder: Path, part: str) -> dict[str, int]:
    """Process ids by title, in its order, of those whose titles have this part."""
    found: dict[str, int] = {}
    for pid in processes_of(folder):
        title = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode(errors="replace")
        if part in title:
            found[title] = pid
    return {title: found[title] for title in sorted(found)}


def _sockets_of(pid: int) -> int:
    count = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            count += descriptor.readlink().name.startswith("socket:")
    return count


def stop(pid: int, worker: int, seconds: float) -> Stop:
    """SIGSTOP, and SIGCONT after so many seconds."""
    began = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        os.kill(pid, signal.SIGCONT)
    return Stop(worker, began, time.monotonic())


def pauses(stops: list[Stop], answers: list[Answer]) -> list[float]:
    """Seconds from each SIGCONT to the first token after it."""
    times = sorted(each for answer in answers for each in answer.times)
    return [
        next((each for each in times if each > stop.continued_at), float("inf")) - stop.continued_at for stop in stops
    ]


@dataclass(frozen=True)
class Outcome:
    """Of all stops."""

    stops: list[Stop]
    pauses: list[float]  # seconds from each SIGCONT to the first token after it
    answers: list[Answer]
    wrong: list[Answer]  # with a token that differs from those before the first stop
    failed: list[Answer]  # without all their tokens

    def __str__(self) -> str:
        finished, lengths = (
            len(self.answers) - len(self.failed),
            [each.continued_at - each.stopped_at for each in self.stops],
        )
        return (
            f"{len(self.stops)} stops of {min(lengths):.1f} to {max(lengths):.1f} s: {finished} of {len(self.answers)} "
            f"requests finished, {len(self.wrong)} with wrong tokens; seconds from SIGCONT to the next token: "
            f"{statistics.median(self.pauses):.2f} (median), {max(self.pauses):.2f} (worst)"
        )


def expected_tokens(port: int) -> dict[str, list[int]]:
    """What the server answers before the first stop. It then forgets all prefixes."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(lambda prompt: ask(port, prompt), PROMPTS))
    assert all(len(answer.tokens) == MAX_TOKENS for answer in answers)
    urllib.request.urlopen(
        urllib.request.Request(f"http://127.0.0.1:{port}/reset_prefix_cache", method="POST"), timeout=60
    ).close()
    return {answer.prompt: answer.tokens for answer in answers}


def stop_workers(port: int, folder: Path, number: int, *, twice: bool = False, seed: int = 0) -> Outcome:
    """Stop a random worker under load, `number` times, and compare all tokens with those from before.

    twice: stop a random worker again within a second after each stop, while the ranks recover.
    """
    expected, chosen = expected_tokens(port), random.Random(seed)
    load, stops = Load(port), []
    with load.running():
        for _ in range(number):
            time.sleep(QUIET_SECONDS + chosen.random())
            pids = workers_of(folder)
            for again in range(1 + twice):
                time.sleep(chosen.uniform(0.1, 1.0) * again)
                worker = chosen.randrange(len(pids))
                stops.append(stop(pids[worker], worker, DEADLINE + chosen.uniform(*BEYOND)))
            while pauses(stops[-1:], load.answers)[0] == float("inf"):
                assert time.monotonic() - stops[-1].continued_at < PATIENCE_SECONDS, "no token comes any more"
                time.sleep(0.2)
        time.sleep(QUIET_SECONDS)
    answers = load.answers
    return Outcome(
        stops,
        pauses(stops[twice :: 1 + twice], answers),  # a second stop lies in the pause after the first
        answers,
        [each for each in answers if each.tokens != expected[each.prompt][: len(each.tokens)]],
        [each for each in answers if len(each.tokens) < MAX_TOKENS],
    )


def epochs(log: str) -> int:
    """The number of the last epoch that began."""
    return max([0, *map(int, re.findall(r"Epoch (\d+) begins", log))])


def main() -> None:
    from tests.vllm.test_serve import Server, starting_server, wait_until_healthy
    from vllm_npu.child_processes import free_port
    from vllm_npu.tools.engines.tiny_models import QWEN3_MOE, write_tiny_model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=0, help="stops after which another one follows within a second")
    parser.add_argument("--api-servers", type=int, help="vLLM starts one for each rank, which takes minutes on 2 cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path)
    arguments = parser.parse_args()
    os.environ |= ENVIRONMENT
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that the server ends too
    port = free_port()
    own = ["--port", str(port), *options(arguments.ranks)]
    if arguments.api_servers:
        own += ["--api-server-count", str(arguments.api_servers)]
    with tempfile.TemporaryDirectory(prefix="t-") as name:
        folder = Path(name)
        model = write_tiny_model(QWEN3_MOE, folder / "model")
        server: Server
        with starting_server(model, folder / "caches", folder, *own) as server:
            try:
                wait_until_healthy(port, server)
                for number, twice in ((arguments.stops, False), (arguments.pairs, True)):
                    if number:
                        before = epochs(server.log())
                        outcome = stop_workers(port, folder, number, twice=twice, seed=arguments.seed)
                        print(outcome, f"{epochs(server.log()) - before} epochs", sep="; ", flush=True)
                print("exit status", server.stop(signal.SIGTERM))
            finally:
                if arguments.log:
                    arguments.log.write_text(server.log())


if __name__ == "__main__":
    main()
