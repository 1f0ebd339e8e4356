"""Test of data and expert parallelism over two hosts, with vLLM's own multi-node launch, and of a cut of their link.

Usage: $PY scripts/two_hosts.py [--logs FOLDER]    with the python of scripts/setup.sh

The hosts are two network namespaces of this machine. A cable (a veth pair) is the only connection between them. Host A runs the
API server and data-parallel rank 0, host B runs rank 1 without a server. The steps are:

1. Two hosts generate tokens.
2. The cable is cut while they generate. Both hosts end with an error that names the collective, and no process is left.
3. The cable is back, and both hosts start again. They generate the same tokens.
4. One host runs both ranks. It generates the same tokens.

Needs iproute2, and the privilege to make network namespaces (root, or user namespaces). If they are missing, the script says so
and ends with exit status 77. Exit status 1 if a step fails.
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

INSIDE = "TWO_HOSTS_INSIDE"  # set if this process has its own network namespace
CANNOT = 77
LINK = "veth0"  # the end of the cable on each host
ADDRESS_A, ADDRESS_B = "10.77.0.1", "10.77.0.2"
HTTP_PORT, RPC_PORT = 8077, 13377
START_SECONDS = 900.0
COLLECTIVE_SECONDS = 120  # time-out of collectives of vLLM's groups, and of the wait for other ranks at the start
STOP_SECONDS = 60.0
END_SECONDS = COLLECTIVE_SECONDS + 120.0
PROMPTS = [[5, 17, 200, 3], [9], [40, 41, 42, 43, 44, 45, 46, 47, 48], [300, 2], [7, 7, 7, 7, 7], [81, 9, 100]]
MAX_TOKENS = [12, 20, 6, 15, 9, 18]
# The error of an MoE layer's collective names ranks. The cut may also hit a collective of vLLM, whose error has gloo's text.
COLLECTIVE_FAILED = r"\w+ on group '[\w-]+' failed on rank \d+: .+|gloo/transport/\S+ .+"
LONG = 240  # tokens to generate, so that the cut comes before the end


class NotAsItShouldBeError(Exception):
    """A step failed. The message says what was found, and which log to read."""


@dataclass(frozen=True)
class Host:
    """A network namespace."""

    name: str
    address: str
    holder: int  # id of the process that keeps the namespace open
    enter: tuple[str, ...]  # prefix of a command that runs in the namespace

    def run(self, *command: str) -> None:
        subprocess.run([*self.enter, *command], check=True)

    def processes(self) -> list[str]:
        """The processes in the namespace, without its holder and this program."""
        namespace = os.stat(f"/proc/{self.holder}/ns/net").st_ino
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if (process / "ns/net").stat().st_ino == namespace:
                    found.append((int(process.name), (process / "cmdline").read_text().replace("\0", " ")))
            except OSError:
                continue  # the process has ended
        return [f"{pid}: {command}" for pid, command in found if pid not in (self.holder, os.getpid())]


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """The namespace of this process and a new one, with a cable between them. A namespace ends with its last process."""
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
    """vLLM's server on a host, with options of vLLM. `vllm-npu serve` adds the strategy only."""
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
        "GLOO_SOCKET_IFNAME": LINK,  # by default gloo uses the host's name, which has no address in this namespace
        "TMPDIR": sockets,
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the hosts share their cores, and each host would use the first ones
        "VLLM_NPU_SHARED_WINDOW": "0",  # two hosts have no shared memory
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    with log.open("wb") as output:
        return ProcessTree(command, environment=environment, stdout=output, stderr=output)


API_SERVER = ("--host", "127.0.0.1", "--port", str(HTTP_PORT))


def on_two(a: Host, b: Host, model: Path, logs: Path, sockets: str, title: str) -> list[tuple[ProcessTree, Path]]:
    """The launch that vLLM documents for several nodes: all get the address of the first node, and the others are headless."""
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
    """Cut the cable while all ranks generate. Each host must end by itself and name the collective that failed."""
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
    """The tool or privilege that is missing on this machine, or None."""
    for tool in ("ip", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            return f"needs the command {tool} (iproute2, util-linux)"
    tried = subprocess.run([*unshared(), "ip", "link", "set", "lo", "up"], capture_output=True, text=True, check=False)
    return f"needs the privilege to make network namespaces: {tried.stderr.strip()}" if tried.returncode else None


def unshared() -> list[str]:
    """Prefix of a command that runs in a new network namespace. Without root, it runs in a new user namespace too."""
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
