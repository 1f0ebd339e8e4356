"""`vllm-npu serve MODEL ...`: vLLM's OpenAI-compatible server with this plugin on."""

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
from vllm_npu.tools.engines.start_watch import StartWatch
from vllm_npu.tools.engines.stop_signals import SignalScope

FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
HEADLESS = "--headless"
DEFAULT_PORT: Final = 8000  # vLLM's
POLL_SECONDS: Final = 0.25  # between two looks at a stop signal that has come
START_LOOK_SECONDS: Final = 2.0  # between two looks at the processes of a server that is not up
LEFTOVER_SECONDS: Final = 5.0  # for vLLM's other processes to end after the server
# vLLM 0.32 loses stop signals that come while its engines start: zmq_socket_ctx (utils/network_utils.py) swallows the exception
# that the signal raises, and an engine core under construction only logs the signal. The server then waits ten minutes for its
# engines. A server that is not up has no request to lose, so it is ended in three steps: the signal itself, SIGTERM to every
# process, SIGKILL. The two waits and LEFTOVER_SECONDS keep a stop below 15 s.
OWN_END_SECONDS: Final = 4.0  # between the signal and SIGTERM to every process
TERMINATED_END_SECONDS: Final = 3.0  # between SIGTERM to every process and SIGKILL

HELP = """\
Usage: vllm-npu serve MODEL [--moe-comm NAME] [--json PATH] [any option of `vllm serve`]

  vLLM's serve command with this plugin on. Options that are not listed here go to vLLM unchanged, and so does --help
  after a MODEL.

  --moe-comm NAME  Strategy: auto, or a name that `vllm-npu serve MODEL --moe-comm ?` lists.
                   A strategy in --additional-config comes first.
  --json PATH      When the server has ended, write the command, its exit status and its seconds to this file.

  --headless is vLLM's too: it starts the ranks of a further host, without a server (docs/multi_node.md).

  Signals go on to the server. A server that is not up yet ends within 15 s of Ctrl-C or SIGTERM.
  The exit status is the server's, or 128 + N if signal N ended it or came before it was up. It is 1 if an engine or a
  worker ended before the server was up.
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
    _require_model(rest)
    command = [sys.executable, "-m", "vllm_npu.plugin.serve_command", *rest]
    require_vllm()

    started = time.monotonic()
    with _Signals(http_port(rest)) as signals, _folders() as folders:
        status = _run(command, _server_environment(moe_comm) | folders, signals, headless=HEADLESS in rest)
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
    """Make folders for this run and yield the variables that name them; remove the folders in the end.

    One is for vLLM's sockets, and one, where VLLM_NPU_METRICS is on, for the counts behind /metrics. A variable that the user
    has set stays as it is.
    """
    wanted = {SOCKET_FOLDER: folder_for_sockets()}
    if METRICS.read_flag():
        wanted[PROMETHEUS_FOLDER] = tempfile.gettempdir()
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-npu-", dir=place))
            for name, place in wanted.items()
            if not os.environ.get(name)
        }


class _Signals(SignalScope):
    """While entered, signals to this program go to the server. The first stop signal to a server that is not up is noted."""

    signals = FORWARDED_SIGNALS

    def __init__(self, port: int | None) -> None:
        super().__init__()
        self._port = port  # of the first API server; see http_port
        self.stopped_by: int | None = None  # SIGINT or SIGTERM, if one came before the server was up
        self._tree: ProcessTree | None = None

    def send_to(self, tree: ProcessTree) -> None:
        """Send later signals to the first process of `tree`, and at once a stop signal that came before."""
        self._tree = tree
        if self.stopped_by is not None:
            tree.process.send_signal(self.stopped_by)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum in STOP_SIGNALS and self.stopped_by is None and not self.is_up():
            self.stopped_by = signum
        if self._tree is not None and self._tree.process.poll() is None:
            self._tree.process.send_signal(signum)

    def is_up(self) -> bool:
        """Whether the server takes requests, as far as the system shows it."""
        return self._tree is not None and _listens(self._tree, self._port)


def _run(command: list[str], environment: dict[str, str], signals: _Signals, *, headless: bool) -> int:
    """Run the server in a session of its own, so that a Ctrl-C reaches it once, through us. Returns its exit status."""
    tree = ProcessTree(command, environment=environment)
    signals.send_to(tree)
    watch = None if headless else StartWatch(tree)  # ranks without a server are never up
    failure, next_look = None, 0.0
    while (status := _status_within(POLL_SECONDS, tree)) is None and signals.stopped_by is None and failure is None:
        if watch is not None and (now := time.monotonic()) >= next_look:
            next_look = now + START_LOOK_SECONDS
            failure = watch.failure()
            if signals.is_up():
                watch = failure = None
    if failure is not None:
        print(f"vllm-npu serve: {failure}; their last lines above say why", file=sys.stderr)
        _end_all(tree)
        status = 1
    elif signals.stopped_by is not None and headless:
        status = _repeat_sigterm(tree)
    elif signals.stopped_by is not None:
        _end_before_it_is_up(tree)
        status = -signals.stopped_by  # also where vLLM ended with an error because its engines went first
    assert status is not None
    tree.stop(grace_seconds=LEFTOVER_SECONDS)
    return status if status >= 0 else 128 - status


def _end_before_it_is_up(tree: ProcessTree) -> None:
    """End a server that a stop signal has reached and that takes no requests yet."""
    tree.note_shared_memory()
    if _status_within(OWN_END_SECONDS, tree) is None:
        _end_all(tree)


def _end_all(tree: ProcessTree) -> None:
    """SIGTERM to every process, and later SIGKILL."""
    tree.terminate_all()
    if _status_within(TERMINATED_END_SECONDS, tree) is None:
        tree.stop(grace_seconds=0)


def _repeat_sigterm(tree: ProcessTree) -> int:
    """Send SIGTERM until ranks without a server have ended. Returns the status as subprocess has it.

    vLLM ignores SIGINT where a shell started it in the background. Such ranks never listen, and may have requests to finish, so
    they are not killed.
    """
    while (status := _status_within(OWN_END_SECONDS, tree)) is None:
        tree.terminate()
    return status


def _status_within(seconds: float, tree: ProcessTree) -> int | None:
    """The exit status of the tree's first process, or None if that process has not ended after `seconds`."""
    try:
        return tree.process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _listens(tree: ProcessTree, port: int | None) -> bool:
    """Whether a process of the tree takes TCP connections on `port`, or on any port if `port` is None.

    Several API servers are processes of their own. The port matters: while engines start, processes listen for each other on
    other ports.
    """
    import psutil

    try:
        connections = psutil.net_connections("tcp")
    except psutil.Error:
        return True  # the system hides its connections: the server may be up, so only its own signals reach it
    members = set(tree.members())
    return any(
        each.pid in members and each.status == psutil.CONN_LISTEN and port in (None, each.laddr.port)
        for each in connections
    )


def http_port(arguments: Sequence[str]) -> int | None:
    """The port of the API server by vLLM's arguments. None where a file or a Unix socket decides."""
    names = {argument.partition("=")[0] for argument in arguments}
    if names & {"--uds", "--config"}:
        return None
    if "--port" not in names:
        return DEFAULT_PORT
    _, port = _take_option(arguments, "--port")
    return int(port) if port is not None and port.isdecimal() else None


def _take_option(arguments: Sequence[str], name: str) -> tuple[list[str], str | None]:
    """Take `name VALUE` and `name=VALUE` out of the arguments before `--`. Returns the rest and the last VALUE."""
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


def _require_model(arguments: Sequence[str]) -> None:
    """Raise UnsupportedConfigError where no argument names a model."""
    if arguments and not arguments[0].startswith("-"):
        return
    if not any(argument.partition("=")[0] in ("--model", "--config", "--help", "-h") for argument in arguments):
        raise UnsupportedConfigError("no model: put it first, as in vllm-npu serve MODEL --port 8000")


def _check_moe_comm(name: str) -> None:
    from vllm_npu.strategies.table import AUTO, STRATEGIES

    if name not in (AUTO, *STRATEGIES):
        rows = "\n".join(f"  {known:<10} {row.summary}" for known, row in STRATEGIES.items())
        raise UnsupportedConfigError(
            f"unknown --moe-comm {name!r}; there are:\n  {AUTO:<10} chosen per step from what all ranks know\n{rows}"
        )


def _server_environment(moe_comm: str | None) -> dict[str, str]:
    """os.environ with the plugin turned on, and with the strategy if the user named one."""
    environment = dict(os.environ)
    plugins = environment.get("VLLM_PLUGINS")  # unset: all that are installed
    if plugins is not None and PLUGIN_NAME not in plugins.split(","):
        environment["VLLM_PLUGINS"] = ",".join(filter(None, [plugins, PLUGIN_NAME]))
    if moe_comm is not None:
        environment[MOE_COMM.name] = moe_comm
    return environment
