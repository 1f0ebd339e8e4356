"""A pytest plugin that writes each test's outcome to a file at once, so that the file is whole even if the process is killed.

Only judge.py uses it, with `-p`. The variable VLLM_NPU_JUDGE_RECORD names the file: one JSON object a line. A test that the
file has already is left out, so a second process goes on where a killed one stopped.

With VLLM_NPU_JUDGE_CONTROL, pytest stops after it has imported conftest.py, and forks a process for each file that judge.py
asks for. The forked process goes on as a pytest that was started for this file, which would have begun with the same imports.
"""

import ctypes
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from vllm_npu.emulator import fork_server, forked_spawn

RECORD_VARIABLE = "VLLM_NPU_JUDGE_RECORD"
CONTROL_VARIABLE = "VLLM_NPU_JUDGE_CONTROL"  # the file descriptor of the fork server's socket
FORK_VARIABLE = "VLLM_NPU_JUDGE_FORK"  # 1: processes that a test spawns are forked
DETAIL_CHARACTERS = 2000
REASON_CHARACTERS = 300


def read(record: Path) -> list[dict[str, str]]:
    """All lines of the record that were written to their end."""
    if not record.exists():
        return []
    return [json.loads(line) for line in record.read_text().splitlines(keepends=True) if line.endswith("\n")]


def write(event: str, test: str = "", **more: str) -> None:
    with open(os.environ[RECORD_VARIABLE], "a") as file:
        file.write(json.dumps({"event": event, "test": test, **more}) + "\n")


def name_in_file(nodeid: str) -> str:
    """TestX::test_y of the node id path/test_z.py::TestX::test_y. Empty for the file itself."""
    return nodeid.partition("::")[2]


def reason_of(report: Any) -> str:
    """The first line of the error's message, or why the test was skipped."""
    longrepr = report.longrepr
    if isinstance(longrepr, tuple):  # of a skip: file, line, reason
        text = str(longrepr[2])
    elif hasattr(longrepr, "reprcrash") and longrepr.reprcrash is not None:
        text = longrepr.reprcrash.message
    else:
        # An error during the import of a file: pytest marks the lines of the exception with E.
        lines = str(longrepr).strip().splitlines()
        text = next((line[1:] for line in lines if line.startswith("E  ")), lines[-1] if lines else "")
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")[:REASON_CHARACTERS]


def write_report(report: Any, outcome: str) -> None:
    detail = str(report.longrepr)[-DETAIL_CHARACTERS:] if outcome in {"failed", "error"} else ""
    write("outcome", name_in_file(report.nodeid), outcome=outcome, reason=reason_of(report), detail=detail)


@dataclass(frozen=True, slots=True)
class Served:
    """What pytest had after it imported conftest.py."""

    config: Any
    search_path: list[str]


served: Served | None = None  # in a fork server, and in the processes that it forks


def pytest_cmdline_main(config: Any) -> int | None:
    """Called before pytest's own hook of this name, which runs the tests: pytest calls the hooks of late plugins first."""
    if CONTROL_VARIABLE not in os.environ:
        return None
    global served
    served = Served(config, list(sys.path))
    fork_server.serve_on(int(os.environ[CONTROL_VARIABLE]))
    return 0


def run_forked_file(file: str) -> NoReturn:
    """In a process that fork_server forked: run the tests of a file, and end as an interpreter ends."""
    assert served is not None
    config = served.config
    sys.path[:] = served.search_path
    sys.argv[-1] = file
    config.args = config.option.file_or_dir = [file]
    # Forked processes share the file to which pytest redirects output, and pytest puts back the server's output. Begin anew.
    outputs = [os.dup(number) for number in (1, 2)]
    capture = config.pluginmanager.getplugin("capturemanager")
    capture.stop_global_capturing()
    for number, output in enumerate(outputs, 1):
        os.dup2(output, number)
        os.close(output)
    capture.start_global_capturing()
    capture.suspend_global_capture()
    try:
        code = int(config.hook.pytest_cmdline_main(config=config))
    finally:
        config._ensure_unconfigure()
    ctypes.pythonapi.Py_Exit(code)  # with all that an interpreter does at its end, where a process may crash
    raise AssertionError("Py_Exit returned")


def pytest_configure() -> None:
    if os.environ.get(FORK_VARIABLE) == "1":
        forked_spawn.fork_spawned_processes()


def pytest_collectreport(report: Any) -> None:
    if report.outcome != "passed":
        write_report(report, "error" if report.failed else "skipped")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    done = {line["test"] for line in read(Path(os.environ[RECORD_VARIABLE])) if line["event"] in {"start", "outcome"}}
    items[:] = [item for item in items if name_in_file(item.nodeid) not in done]


def pytest_collection_finish(session: Any) -> None:
    for item in session.items:
        write("collected", name_in_file(item.nodeid))


def pytest_runtest_logstart(nodeid: str) -> None:
    write("start", name_in_file(nodeid))


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed:
        write_report(report, "failed" if report.when == "call" else "error")
    elif report.skipped and hasattr(report, "wasxfail"):  # it failed, as its authors expect
        write("outcome", name_in_file(report.nodeid), outcome="passed")
    elif report.skipped and not hasattr(report, "context"):  # a part of a test that skips itself has a context
        write_report(report, "skipped")
    elif report.when == "call":
        write("outcome", name_in_file(report.nodeid), outcome="passed")


def pytest_runtest_logfinish(nodeid: str) -> None:
    write("finish", name_in_file(nodeid))


def pytest_sessionfinish() -> None:
    write("end")
