"""fault_tolerance=retry in a server: a stopped worker costs a pause, an exception costs the requests of its step."""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tests.time_limits import on_this_machine
from tests.vllm import raising_processor
from tests.vllm.processes import processes_of
from tests.vllm.stopped_workers import (
    DEADLINE,
    ENVIRONMENT,
    Answer,
    ask,
    epochs,
    options,
    pauses,
    sockets,
    stop,
    stop_workers,
    workers_of,
)
from tests.vllm.test_serve import (
    OWN_END_SECONDS,
    PATIENCE_SECONDS,
    STOP_SECONDS,
    sockets_and_folders_of_ours,
    starting_server,
    wait_until_healthy,
)
from tests.vllm.text_prompts import TEXT_MAX_TOKENS, TEXTS
from vllm_npu.child_processes import free_port
from vllm_npu.tools.engines.tiny_models import DEMO_MAX_TOKENS, QWEN3_MOE, TinyModel
from vllm_npu.trust.watchdog import FAILURE_SECONDS, GRACE_SECONDS

pytestmark = [pytest.mark.slow, pytest.mark.nightly]  # its start takes a minute on 2 cores, and each stop 10 s

STOPPED = 1  # rank
PAUSE_SECONDS = 10.0  # the longest pause after a stop on a quiet machine
CLOSING_SECONDS = 5.0  # for connections to mailboxes, and for gloo's threads
ROOT = str(Path(__file__).parents[2])  # the server imports the processor


def ask_all(port: int) -> list[Answer]:
    """All texts at once. Both ranks get some."""
    with ThreadPoolExecutor(len(TEXTS)) as pool:
        return list(pool.map(lambda text, limit: ask(port, text, max_tokens=limit), TEXTS, TEXT_MAX_TOKENS))


def test_a_stop_costs_a_pause_and_an_exception_costs_its_step(
    checkpoint: Callable[[TinyModel], Path],
    vanilla_tokens: Callable[[TinyModel], list[list[int]]],
    caches: Path,
    short_folder: Path,
    shared_memory_unchanged: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Vanilla vLLM's tokens are expected of requests that wait through a stop, and of the same requests after it."""
    expected = vanilla_tokens(QWEN3_MOE)[len(DEMO_MAX_TOKENS) :]
    for name, value in {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}.items():
        monkeypatch.setenv(name, value)
    port = free_port()
    own = ["--port", str(port), *options(), "--logits-processors", raising_processor.PATH]
    with starting_server(checkpoint(QWEN3_MOE), caches, short_folder, *own) as server:
        wait_until_healthy(port, server)
        assert ask(port, "the first step makes the groups").finish_reason == "length"

        with ThreadPoolExecutor(1) as pool:
            stopping = pool.submit(stop, workers_of(short_folder)[STOPPED], STOPPED, DEADLINE + 8)
            time.sleep(0.5)
            answers = ask_all(port)  # their first step breaks
            [pause] = pauses([stopping.result()], answers)
        assert [answer.tokens for answer in answers] == expected, server.log()
        assert "rank 1 is stopped: it accepts connections" in server.log(), server.log()
        assert pause < on_this_machine(PAUSE_SECONDS)
        assert [answer.tokens for answer in ask_all(port)] == expected, server.log()
        of_one_epoch = Counter(sockets(short_folder))

        outcome = stop_workers(port, short_folder, number=2)
        print(outcome)
        assert outcome.wrong == outcome.failed == [], server.log()
        assert max(outcome.pauses) < on_this_machine(PAUSE_SECONDS)
        assert epochs(server.log()) >= 3, "a stop was not noticed"

        with ThreadPoolExecutor(1) as pool:
            poison = pool.submit(ask, port, "raise", max_tokens=60, vllm_xargs={raising_processor.RAISE_AFTER: 20})
            beside = ask_all(port)
        assert (poison.result().finish_reason, len(poison.result().tokens)) == ("abort", 20), server.log()
        for answer, tokens in zip(beside, expected, strict=True):
            whole = answer.tokens == tokens
            assert whole or (answer.finish_reason == "abort" and answer.tokens == tokens[: len(answer.tokens)])
        assert "ValueError: this request asked for an exception" in server.log()
        assert [answer.tokens for answer in ask_all(port)] == expected, server.log()
        give_up = time.monotonic() + on_this_machine(CLOSING_SECONDS)
        while (more := Counter(sockets(short_folder)) - of_one_epoch) and time.monotonic() < give_up:
            time.sleep(0.2)
        assert not more, "sockets of old epochs stay open"

        assert server.stop(signal.SIGTERM) == 0, server.log()
    assert processes_of(short_folder) == []
    assert sockets_and_folders_of_ours(short_folder) == []


def test_a_worker_that_is_killed_ends_the_engines_soon(
    checkpoint: Callable[[TinyModel], Path],
    caches: Path,
    short_folder: Path,
    shared_memory_unchanged: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No rank comes for it, so nobody may wait as long as for a rank that is stopped."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    port = free_port()
    with starting_server(checkpoint(QWEN3_MOE), caches, short_folder, "--port", str(port), *options()) as server:
        wait_until_healthy(port, server)
        os.kill(workers_of(short_folder)[STOPPED], signal.SIGKILL)
        began = time.monotonic()
        assert server.process.wait(PATIENCE_SECONDS) == 1, server.log()
        limit = FAILURE_SECONDS + GRACE_SECONDS + OWN_END_SECONDS + STOP_SECONDS
        assert time.monotonic() - began < on_this_machine(limit), server.log()
    assert processes_of(short_folder) == []
    assert sockets_and_folders_of_ours(short_folder) == []
