"""`vllm-npu serve MODEL ...`: vLLM's OpenAI-compatible server with this plugin on; everything else is vLLM's."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

from vllm_npu.cli.outputs import in_a_folder
from vllm_npu.envs import METRICS, MOE_COMM, PROMETHEUS_FOLDER, SOCKET_FOLDER
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin.entry_points import PLUGIN_NAME
from vllm_npu.tools.engines.engine_processes import folder_for_sockets, require_vllm
from vllm_npu.tools.engines.process_tree import ProcessTree

FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
HEADLESS = "--headless"
LEFTOVER_SECONDS: Final = 5.0  # for vLLM's helpers to end after the server has
# vLLM 0.32 loses a SIGTERM, and two SIGINT, that come while its engines start (zmq_socket_ctx of utils/network_utils.py), and
# waits for ten minutes then; it ignores SIGINT where a shell started this in the background. So SIGTERM follows until the
# engines are gone: the server takes them down in less than this.
REPEAT_SECONDS: Final = 6.0

HELP = """\
Usage: vllm-npu serve MODEL [--moe-comm NAME] [--json PATH] [any option of vLLM's server]

  vLLM's OpenAI-compatible server with this plugin on. What is not listed here goes to vLLM untouched, and so does
  --help after a MODEL.

  --moe-comm NAME  Strategy: auto, or a name that `vllm-npu serve MODEL --moe-comm ?` lists.
                   Where --additional-config names one as well, that one counts.
  --json PATH      When the server has ended, write the command, its exit status and its seconds to this file.

  --headless is vLLM's too: the ranks of a further host, without a server of their own (docs/multi_node.md).

  Signals reach the server; its exit status is returned (128 + N if signal N ended it).
"""


def serve(arguments: Sequence[str]) -> None:
    """Run the server until it ends, then exit with its status.

    Raises UnsupportedConfigError for an unknown strategy, or without a model or vLLM.
    """
    if not arguments or arguments[0] in ("--help", "-h"):
        print(HELP, end="")
        sys.exit(0)
    rest, moe_comm = _take_option(arguments, "--moe-comm")
    rest, report_name = _take_option(rest, "--json")
    report_path = in_a_folder(Path(report_name) if report_name is not None else None)
    if moe_comm is not None:
        _check_moe_comm(moe_comm)
    named = _name_model(rest)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *named]
    if HEADLESS in rest:  # ranks without an API server: a part of vLLM's serve command alone
        command = [sys.executable, "-m", "vllm_npu.plugin.serve_command", *rest]
    require_vllm()

    started = time.monotonic()
    with _folders() as folders:
        status = _run(command, _server_environment(moe_comm) | folders)
    if report_path is not None:
        report = {
            "command": command,
            "moe_comm": moe_comm,
            "exit_status": status,
            "seconds": round(time.monotonic() - started, 1),
        }
        report_path.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(status)


@contextmanager
def _folders() -> Iterator[dict[str, str]]:
    """Variables that name folders of this run, removed after it: for vLLM's sockets, and for what processes count for /metrics,
    if that is wanted. Those that are set stay."""
    wanted = {SOCKET_FOLDER: folder_for_sockets()}
    if METRICS.read_flag():
        wanted[PROMETHEUS_FOLDER] = tempfile.gettempdir()
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-npu-", dir=place))
            for name, place in wanted.items()
            if not os.environ.get(name)
        }


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Run the server in a session of its own, so that a Ctrl-C reaches it once, through us; returns its exit status."""
    tree = ProcessTree(command, environment=environment)
    stopped_while_starting = False

    def forward(signum: int, frame: FrameType | None) -> None:
        nonlocal stopped_while_starting
        if tree.process.poll() is None:
            stopped_while_starting |= signum in (signal.SIGINT, signal.SIGTERM) and not _listens(tree.process.pid)
            tree.process.send_signal(signum)

    previous = {signum: signal.signal(signum, forward) for signum in FORWARDED_SIGNALS}
    try:
        while (status := _status_within(REPEAT_SECONDS, tree)) is None:
            if stopped_while_starting and _has_engines(tree):
                tree.terminate()
        tree.stop(grace_seconds=LEFTOVER_SECONDS)
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    return status if status >= 0 else 128 - status


def _status_within(seconds: float, tree: ProcessTree) -> int | None:
    """The exit status of the tree's first process; None where it has not ended by then."""
    try:
        return tree.process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _listens(pid: int) -> bool:
    """Whether the server takes TCP connections: it is up, or it waits for the engines of other hosts. Ranks without a server
    never do; they ignore a second signal at any time."""
    import psutil  # vLLM's requirement

    try:
        connections = psutil.net_connections("tcp")
    except psutil.Error:
        return True  # not ours to look into: its own signals alone
    return any(each.pid == pid and each.status == psutil.CONN_LISTEN for each in connections)


def _has_engines(tree: ProcessTree) -> bool:
    """Whether the server still has processes of its own beside multiprocessing's, which stay until its very end."""
    for pid in tree.members():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue  # gone meanwhile
        if pid != tree.process.pid and b"resource_tracker" not in command:
            return True
    return False


def _take_option(arguments: Sequence[str], name: str) -> tuple[list[str], str | None]:
    """`arguments` without `name VALUE` or `name=VALUE`, and the last such value; nothing after `--` is ours."""
    rest: list[str] = []
    value: str | None = None
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--":
            return [*rest, argument, *remaining], value
        if argument == name:
            value = next(remaining, None)
            if value is None:
                raise UnsupportedConfigError(f"{name} needs a value; see vllm-npu serve --help")
        elif argument.startswith(f"{name}="):
            value = argument.partition("=")[2]
        else:
            rest.append(argument)
    return rest, value


def _name_model(arguments: list[str]) -> list[str]:
    """vLLM's own arguments, with a leading MODEL as `--model MODEL`."""
    if arguments and not arguments[0].startswith("-"):
        return ["--model", *arguments]
    if any(argument.partition("=")[0] in ("--model", "--config", "--help", "-h") for argument in arguments):
        return arguments
    raise UnsupportedConfigError("no model: put it first, as in vllm-npu serve MODEL --port 8000")


def _check_moe_comm(name: str) -> None:
    from vllm_npu.strategies.table import AUTO, STRATEGIES

    if name not in (AUTO, *STRATEGIES):
        rows = "\n".join(f"  {known:<10} {row.summary}" for known, row in STRATEGIES.items())
        raise UnsupportedConfigError(
            f"unknown --moe-comm {name!r}; there are:\n  {AUTO:<10} chosen per step from what all ranks know\n{rows}"
        )


def _server_environment(moe_comm: str | None) -> dict[str, str]:
    """os.environ with the plugin on, and the strategy where one is named."""
    environment = dict(os.environ)
    plugins = environment.get("VLLM_PLUGINS")  # unset: all that are installed
    if plugins is not None and PLUGIN_NAME not in plugins.split(","):
        environment["VLLM_PLUGINS"] = ",".join(filter(None, [plugins, PLUGIN_NAME]))
    if moe_comm is not None:
        environment[MOE_COMM.name] = moe_comm
    return environment
