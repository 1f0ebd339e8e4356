"""Data and expert parallelism over two hosts, by vLLM's own multi-node launch, and what happens when their link is cut.

Usage: $PY scripts/two_hosts.py [--logs FOLDER]    with the python of scripts/setup.sh

The hosts are two network namespaces of this machine with a cable (a veth pair) between them: nothing else leads from one to
the other. A runs the API server and data-parallel rank 0, B rank 1, headless. In order:

1. two hosts: tokens;
2. the cable is cut while they generate: both hosts end with an error that names the collective, and leave nothing behind;
3. the cable is back, both hosts are started again: the same tokens;
4. one host alone, both ranks on it: the same tokens.

Needs iproute2, and the privilege to make network namespaces (root, or user namespaces). Without it: exit status 77 and what is
missing. Exit status 1 where something is not as it should be.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from vllm_npu.tools.engines.engine_processes import require_vllm
from vllm_npu.tools.engines.http_engine import ask_server, wait_for_health
from vllm_npu.tools.engines.process_tree import ProcessTree
from vllm_npu.tools.engines.tiny_models import QWEN3_MOE, write_tiny_model

INSIDE = "TWO_HOSTS_INSIDE"  # set where this process has a network namespace of its own
CANNOT = 77
LINK = "veth0"  # the end of the cable, on either host
ADDRESS_A, ADDRESS_B = "10.77.0.1", "10.77.0.2"
HTTP_PORT, RPC_PORT = 8077, 13377
START_SECONDS = 900.0
COLLECTIVE_SECONDS = 120  # after which vLLM's groups give a collective up, and a rank waits for the others at the start
STOP_SECONDS = 60.0
END_SECONDS = COLLECTIVE_SECONDS + 120.0
PROMPTS = [[5, 17, 200, 3], [9], [40, 41, 42, 43, 44, 45, 46, 47, 48], [300, 2], [7, 7, 7, 7, 7], [81, 9, 100]]
MAX_TOKENS = [12, 20, 6, 15, 9, 18]
# A collective of MoE layers names ranks; one of vLLM's own, where the cut may as well fall, carries gloo's text.
COLLECTIVE_FAILED = r"\w+ on group '[\w-]+' failed on rank \d+: .+|gloo/transport/\S+ .+"
LONG = 240  # tokens, for the cut to come in between


class NotAsItShouldBeError(Exception):
    """What was found, and where to look."""


@dataclass(frozen=True)
class Host:
    """A network namespace."""

    name: str
    address: str
    holder: int  # process that keeps it open
    enter: tuple[str, ...]  # in front of a command that is to run there

    def run(self, *command: str) -> None:
        subprocess.run([*self.enter, *command], check=True)

    def processes(self) -> list[str]:
        """What runs in the namespace, but for what holds it open and this program."""
        namespace = os.stat(f"/proc/{self.holder}/ns/net").st_ino
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if (process / "ns/net").stat().st_ino == namespace:
                    found.append((int(process.name), (process / "cmdline").read_text().replace("\0", " ")))
            except OSError:
                continue  # it has ended meanwhile
        return [f"{pid}: {command}" for pid, command in found if pid not in (self.holder, os.getpid())]


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """This process's namespace and another one, connected. Both end with the processes in them."""
    holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
    try:
        while os.stat(f"/proc/{holder.pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino:
            time.sleep(0.05)
        a = Host("A", ADDRESS_A, os.getpid(), ())
        b = Host("B", ADDRESS_B, holder.pid, ("nsenter", "--target", str(holder.pid), "--net"))
        a.run("ip", "link", "add", LINK, "type", "veth", "peer", "name", LINK, "netns", str(holder.pid))
        for host in (a, b):
            host.run("ip", "address", "add", f"{host.address}/24", "dev", LINK)
            host.run("ip", "link", "set", "lo", "up")
            host.run("ip", "link", "set", LINK, "up")
        yield a, b
    finally:
        holder.kill()
        holder.wait()


def launch(host: Host, model: Path, log: Path, sockets: str, *options: str) -> ProcessTree:
    """vLLM's server on a host, with options of vLLM's own; `vllm-npu serve` adds none but the strategy."""
    command = [
        *host.enter,
        *(sys.executable, "-W", "ignore", "-m", "vllm_npu.cli", "serve", str(model), "--moe-comm", "all2all"),
        *("--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager", "--no-enable-prefix-caching"),
        *("--max-model-len", "256", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(64 << 20)),
        *("--data-parallel-size", "2", "--enable-expert-parallel"),
        *("--distributed-timeout-seconds", str(COLLECTIVE_SECONDS)),
        *("--cpu-distributed-timeout-seconds", str(COLLECTIVE_SECONDS)),
        *options,
    ]
    environment = {
        **os.environ,
        "VLLM_HOST_IP": host.address,
        "GLOO_SOCKET_IFNAME": LINK,  # gloo's own guess is the host's name, which leads nowhere here
        "TMPDIR": sockets,
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the hosts share their cores, and each would take the first ones
        "VLLM_NPU_SHARED_WINDOW": "0",  # which two hosts do not have
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    with log.open("wb") as output:
        return ProcessTree(command, environment=environment, stdout=output, stderr=output)


API_SERVER = ("--host", "127.0.0.1", "--port", str(HTTP_PORT))


def on_two(a: Host, b: Host, model: Path, logs: Path, sockets: str, title: str) -> list[tuple[ProcessTree, Path]]:
    """The launch that vLLM documents for several nodes: the address of the first one, and headless others."""
    shared = ("--data-parallel-size-local", "1", "--data-parallel-address", a.address)
    shared += ("--data-parallel-rpc-port", str(RPC_PORT))
    started = []
    for host, options in ((a, API_SERVER), (b, ("--headless", "--data-parallel-start-rank", "1"))):
        log = logs / f"{title}-{host.name}.log"
        started.append((launch(host, model, log, sockets, *shared, *options), log))
    return started


def ask(path: str, body: dict[str, object] | None = None, timeout: float = 300.0) -> str:
    return ask_server(HTTP_PORT, path, body, timeout)


def complete(prompt: list[int], max_tokens: int) -> list[int]:
    body: dict[str, object] = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True}
    tokens: list[int] = json.loads(ask("/v1/completions", body))["choices"][0]["token_ids"]
    return tokens


def wait_until_ready(servers: list[tuple[ProcessTree, Path]]) -> None:
    def check_processes() -> None:
        for tree, log in servers:
            if tree.process.poll() is not None:
                raise NotAsItShouldBeError(f"{log} ended while starting:\n{tail(log)}")

    try:
        wait_for_health(HTTP_PORT, START_SECONDS, check_processes)
    except TimeoutError:
        raise NotAsItShouldBeError(f"not ready after {START_SECONDS:.0f} s; see {servers[0][1]}") from None
    for tree, _ in servers:
        tree.note_shared_memory()


def generate() -> list[list[int]]:
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(complete, PROMPTS, MAX_TOKENS))


def cut_and_watch(host: Host, servers: list[tuple[ProcessTree, Path]]) -> None:
    """Cut the cable while all ranks generate; each host must end by itself and say which collective failed."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = [pool.submit(complete, prompt, LONG) for prompt in PROMPTS]
        time.sleep(2.0)
        if any(answer.done() for answer in answers):
            raise NotAsItShouldBeError("the answers were there before the cable was cut; raise LONG")
        host.run("ip", "link", "set", LINK, "down")
        cut = time.monotonic()
        ended: dict[Path, float] = {}
        while len(ended) < len(servers) and time.monotonic() < cut + END_SECONDS:
            for tree, log in servers:
                if log not in ended and tree.process.poll() is not None:
                    ended[log] = time.monotonic() - cut
            time.sleep(0.2)
        for tree, log in servers:
            named = re.findall(COLLECTIVE_FAILED, log.read_text(errors="replace"))
            if log not in ended:
                tree.stop(grace_seconds=5.0)
                raise NotAsItShouldBeError(f"{log} did not end in {END_SECONDS:.0f} s:\n{tail(log)}")
            if not named:
                raise NotAsItShouldBeError(f"{log} ended without naming a collective:\n{tail(log)}")
            print(f"   {log.stem} ended after {ended[log]:.0f} s, status {tree.process.returncode}: {named[0][:160]}")
            tree.stop(grace_seconds=5.0)
        if not all(answer.exception() for answer in answers):
            raise NotAsItShouldBeError("a request was answered though the ranks could not reach each other")


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])


def check(what: str, got: list[list[int]], expected: list[list[int]]) -> None:
    same = sum(a == b for mine, theirs in zip(got, expected, strict=True) for a, b in zip(mine, theirs, strict=True))
    total = sum(map(len, expected))
    print(f"   {what}: {same}/{total} tokens as before", flush=True)
    if got != expected:
        raise NotAsItShouldBeError(f"{what}: {got}\nbefore: {expected}")


def run(logs: Path, sockets: str) -> None:
    model = write_tiny_model(QWEN3_MOE, logs / "model")
    with two_hosts() as (a, b), ExitStack() as stack:

        def stop_at_the_end(servers: list[tuple[ProcessTree, Path]]) -> list[tuple[ProcessTree, Path]]:
            stack.callback(stop, servers)
            return servers

        def stop(servers: list[tuple[ProcessTree, Path]]) -> None:
            for tree, _ in servers:
                tree.terminate()
            for tree, _ in servers:
                tree.stop(grace_seconds=STOP_SECONDS)

        print("1. two hosts", flush=True)
        pair = stop_at_the_end(on_two(a, b, model, logs, sockets, "two"))
        wait_until_ready(pair)
        tokens = generate()
        print(f"   {sum(map(len, tokens))} tokens", flush=True)

        print("2. the cable is cut", flush=True)
        cut_and_watch(a, pair)
        left = a.processes() + b.processes()
        if left:
            raise NotAsItShouldBeError(f"processes are left behind: {left}")

        print("3. the cable is back", flush=True)
        a.run("ip", "link", "set", LINK, "up")
        again = stop_at_the_end(on_two(a, b, model, logs, sockets, "again"))
        wait_until_ready(again)
        check("two hosts again", generate(), tokens)
        stop(again)

        print("4. one host", flush=True)
        log = logs / "one-A.log"
        alone = stop_at_the_end([(launch(a, model, log, sockets, *API_SERVER), log)])
        wait_until_ready(alone)
        check("one host", generate(), tokens)
        stop(alone)


def lacks() -> str | None:
    """What this machine does not let us do."""
    for tool in ("ip", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            return f"needs the command {tool} (iproute2, util-linux)"
    tried = subprocess.run([*unshared(), "ip", "link", "set", "lo", "up"], capture_output=True, text=True, check=False)
    return f"needs the privilege to make network namespaces: {tried.stderr.strip()}" if tried.returncode else None


def unshared() -> list[str]:
    """A namespace of its own for a command; as root without a new user."""
    return ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=Path, help="Keep the logs here.")
    logs = parser.parse_args().logs
    require_vllm()
    missing = lacks()
    if missing is not None:
        print(f"two hosts: {missing}", file=sys.stderr)
        return CANNOT
    if INSIDE not in os.environ:
        os.environ[INSIDE] = "1"
        command = [*unshared(), sys.executable, *sys.argv]
        os.execvp(command[0], command)
    with tempfile.TemporaryDirectory(prefix="two-", dir="/tmp") as folder:
        if logs is not None:
            logs.mkdir(parents=True, exist_ok=True)
        try:
            run(logs or Path(folder), folder)
        except NotAsItShouldBeError as error:
            print(f"two hosts: {error}", file=sys.stderr)
            return 1
    print("two hosts: as it should be")
    return 0


if __name__ == "__main__":
    sys.exit(main())
