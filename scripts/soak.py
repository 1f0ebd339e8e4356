"""Serves a tiny model over DP2×EP on the CPU under random load, and watches memory.

Usage: $PY scripts/soak.py [--minutes 30]    with the python of scripts/setup.sh

Eight clients send requests to real vLLM, with pauses of random length, so that ranks are busy, idle and unequal in turn. Every
prompt must always get the same answer. The first fifth of the time is a warm-up. After it, the memory of all processes of the
server is measured. The median of the last third may exceed the median of the first third by 2 % or 16 MiB, whichever is more.
Exit status 1 if memory grows more, or an answer is wrong.

Two things that vLLM keeps would hide a leak, so the load bounds them (measured in docs/benchmarks/2026-11-28-soak-cpu.md).
vLLM's linear layers keep oneDNN's kernels of each number of tokens: a step has at most 32 tokens. A reader of vLLM's queue in
shared memory collects notices until it is idle for a second: all clients rest for 5 of every 60 seconds.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vllm_npu.child_processes import free_port
from vllm_npu.envs import MOE_COMM
from vllm_npu.plugin.entry_points import PLUGIN_NAME
from vllm_npu.tools.engines.engine_processes import folder_for_sockets
from vllm_npu.tools.engines.http_engine import ask_server, wait_for_health
from vllm_npu.tools.engines.process_tree import ProcessTree
from vllm_npu.tools.engines.tiny_models import DEMO_MAX_TOKENS, QWEN3_MOE, demo_prompts, write_tiny_model

START_SECONDS = ANSWER_SECONDS = 1800.0  # the machine may be busy with other programs
SAMPLE_SECONDS, SAMPLES_A_LINE = 10.0, 30
CLIENTS = 8
WARM_UP_SHARE = 0.2
REST_SECONDS, REST_PERIOD_SECONDS = 5.0, 60.0
ALLOWED_GROWTH, ALLOWED_MIB = 0.02, 16
SERVER_OPTIONS = [
    *("--served-model-name", "tiny", "--data-parallel-size", "2", "--enable-expert-parallel", "--dtype", "float32"),
    *("--max-model-len", "256", "--max-num-seqs", "8", "--max-num-batched-tokens", "32"),
    *("--kv-cache-memory-bytes", str(64 << 20), "--enforce-eager"),
    *("--no-enable-prefix-caching", "--host", "127.0.0.1", "--disable-uvicorn-access-log"),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The server's processes at one moment. Numbers of MiB are sums over processes."""

    seconds: float
    anonymous_mib: float
    by_process_mib: dict[str, float]  # the same for each process
    shared_memory_mib: float  # resident shared pages; a page counts once for each process
    processes: int
    threads: int
    open_files: int
    answers: int


class Load:
    """Clients that send random prompts with random lengths until they are stopped."""

    def __init__(self, port: int, seed: int) -> None:
        self._port, self._seed = port, seed
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._known: dict[int, list[int]] = {}  # the longest answer to each prompt so far
        self.answers = self.tokens = 0
        self.faults: list[str] = []
        self._threads = [
            threading.Thread(target=self._ask_on, args=(client,), daemon=True) for client in range(CLIENTS)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(60)

    def _ask_on(self, client: int) -> None:
        draw = random.Random(f"{self._seed} {client}")
        prompts = demo_prompts()
        while not self._stopped.is_set():
            which = draw.randrange(len(prompts))
            try:
                answer = self._ask(prompts[which], draw.randint(1, DEMO_MAX_TOKENS[which]))
            except (OSError, KeyError, ValueError) as error:
                with self._lock:
                    self.faults.append(f"client {client}: {type(error).__name__}: {error}")
                return
            with self._lock:
                self.answers += 1
                self.tokens += len(answer)
                known = self._known.setdefault(which, answer)
                both = min(len(known), len(answer))
                if known[:both] != answer[:both]:
                    self.faults.append(f"prompt {which}: {answer}, and before {known}")
                self._known[which] = max(known, answer, key=len)
            self._stopped.wait(draw.choice([0.0, 0.0, 0.05, 0.2, 2.0]))
            self._stopped.wait(rest_left(time.monotonic()))

    def _ask(self, prompt: list[int], max_tokens: int) -> list[int]:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        token_ids = json.loads(ask_server(self._port, "/v1/completions", body, ANSWER_SECONDS))["choices"][0][
            "token_ids"
        ]
        if len(token_ids) != max_tokens:
            raise ValueError(f"{len(token_ids)} tokens for {max_tokens}")
        return [int(token) for token in token_ids]


def rest_left(now: float) -> float:
    """The seconds that all clients still rest at `now`, a time of the monotonic clock in seconds. 0 outside of a rest."""
    return max(0.0, REST_SECONDS - now % REST_PERIOD_SECONDS)


def sample(tree: ProcessTree, started: float, answers: int) -> Sample:
    anonymous = shared = threads = files = 0
    members = tree.members()
    by_process = {}
    for pid in members:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            files += len(os.listdir(f"/proc/{pid}/fd"))
        except OSError:
            continue  # the process has ended
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        own = int(fields.get("RssAnon", "0 kB").split()[0])
        anonymous += own
        by_process[f"{fields['Name'].strip()} {pid}"] = round(own / 1024, 1)
        shared += int(fields.get("RssShmem", "0 kB").split()[0])
        threads += int(fields["Threads"])
    return Sample(
        seconds=round(time.monotonic() - started, 1),
        anonymous_mib=round(anonymous / 1024, 1),
        by_process_mib=by_process,
        shared_memory_mib=round(shared / 1024, 1),
        processes=len(members),
        threads=threads,
        open_files=files,
        answers=answers,
    )


def wait_until_healthy(tree: ProcessTree, port: int) -> None:
    def check_process() -> None:
        if tree.process.poll() is not None:
            raise SystemExit("soak: the server ended while starting; see its log")

    try:
        wait_for_health(port, START_SECONDS, check_process)
    except TimeoutError as error:
        raise SystemExit(f"soak: {error}; see its log") from None


def growth(samples: Sequence[Sample], field: str) -> tuple[float, float]:
    """Medians of the first third and of the last third after the warm-up."""
    values = [getattr(each, field) for each in samples[int(len(samples) * WARM_UP_SHARE) :]]
    third = max(1, len(values) // 3)
    return statistics.median(values[:third]), statistics.median(values[-third:])


def mib_per_hour(samples: Sequence[Sample]) -> float:
    """The slope of a straight line through the anonymous memory after the warm-up."""
    warm = samples[int(len(samples) * WARM_UP_SHARE) :]
    if len(warm) < 2:
        return 0.0
    line = statistics.linear_regression([each.seconds / 3600 for each in warm], [each.anonymous_mib for each in warm])
    return round(line.slope, 2)


def grew(first: float, last: float) -> bool:
    return last - first > max(ALLOWED_GROWTH * first, ALLOWED_MIB)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--moe-comm", default="all2all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("soak.log"), help="the server's output")
    parser.add_argument("--json", type=Path, dest="json_path")
    options = parser.parse_args()
    port = free_port()
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory(prefix="soak-", dir=folder_for_sockets()) as name, options.log.open("wb") as log:
        model = write_tiny_model(QWEN3_MOE, Path(name) / "model")
        # `vllm-npu serve` would give the server another session, and ProcessTree.members would not find its processes.
        command = [sys.executable, "-m", "vllm_npu.plugin.serve_command", str(model), *SERVER_OPTIONS]
        command += ["--port", str(port)]
        environment = os.environ | {"TMPDIR": name, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        environment |= {"VLLM_PLUGINS": PLUGIN_NAME, MOE_COMM.name: options.moe_comm}
        server = ProcessTree(command, environment=environment, stdout=log, stderr=log)
        try:
            wait_until_healthy(server, port)
            load = Load(port, options.seed)
            started = time.monotonic()
            load.start()
            while (
                time.monotonic() - started < options.minutes * 60 and server.process.poll() is None and not load.faults
            ):
                time.sleep(SAMPLE_SECONDS)
                samples.append(sample(server, started, load.answers))
                if len(samples) % SAMPLES_A_LINE == 0:
                    now = samples[-1]
                    minutes = now.seconds / 60
                    print(f"{minutes:.0f} min: {now.anonymous_mib} MiB, {now.answers} answers", file=sys.stderr)
            load.stop()
            alive = server.process.poll() is None
        finally:
            server.terminate()
            server.stop(grace_seconds=30)
    faults = load.faults + ([] if alive else ["the server ended"])
    grown = {field: growth(samples, field) for field in ("anonymous_mib", "shared_memory_mib", "threads", "open_files")}
    faults += [
        f"{field} grew from {first:g} to {last:g}" for field, (first, last) in grown.items() if grew(first, last)
    ]
    warm, last = samples[int(len(samples) * WARM_UP_SHARE)].by_process_mib, samples[-1].by_process_mib
    report = {
        "minutes": round(samples[-1].seconds / 60, 1),
        "moe_comm": options.moe_comm,
        "seed": options.seed,
        "answers": load.answers,
        "tokens": load.tokens,
        "medians_of_first_and_last_third": grown,
        "anonymous_mib_per_hour_after_warm_up": mib_per_hour(samples),
        "mib_of_processes_after_warm_up_and_at_the_end": {name: (warm.get(name), mib) for name, mib in last.items()},
        "faults": faults,
    }
    if options.json_path is not None:
        whole = report | {"samples": [asdict(each) for each in samples]}
        options.json_path.write_text(json.dumps(whole, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
