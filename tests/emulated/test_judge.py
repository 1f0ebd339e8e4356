"""`python -m vllm_npu.emulator judge`: other projects' tests on the emulated device. The suite here has every fault."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from tests.emulated.test_launcher import is_running
from tests.time_limits import wait_until
from vllm_npu import envs
from vllm_npu.emulator import judge
from vllm_npu.emulator.build import library_folder

pytestmark = pytest.mark.emulated

TORCH_NPU = judge.installed_version("torch_npu")
FILES = {
    "test_outcomes.py": """
        import unittest, torch, torch_npu
        class TestAll(unittest.TestCase):
            def test_passes(self):
                self.assertEqual((torch.ones(2, device="npu") + 1).tolist(), [2, 2])
            def test_fails(self):
                self.assertEqual(1, 2)
            def test_fails_too(self):
                self.assertEqual(3, 4)
            @unittest.skip("needs two hands")
            def test_skips(self):
                pass
            @unittest.expectedFailure
            def test_fails_as_expected(self):
                raise RuntimeError
            def test_part_fails(self):
                for i in range(2):
                    with self.subTest(i=i):
                        self.assertEqual(i, 0)
        class TestSetUp(unittest.TestCase):
            @classmethod
            def setUpClass(cls):
                raise RuntimeError("no set-up today")
            def test_never(self):
                pass
        """,
    "test_kills.py": """
        import os, signal
        def test_before(): pass
        def test_segfault(): os.kill(os.getpid(), signal.SIGSEGV)
        def test_between(): pass
        def test_exit(): os._exit(0)
        def test_after(): pass
        """,
    "test_hangs.py": """
        import time
        def test_hang(): time.sleep(3600)
        def test_after(): pass
        """,
    "test_asks.py": """
        import subprocess, sys
        def test_asks(): input("your name? ")
        def test_child_asks(): subprocess.run([sys.executable, "-S", "-c", "input()"], check=True)
        """,
    "below/test_import.py": "import no_such_package\n",
    "below/test_exits.py": "import os\nos._exit(3)\n",
    "below/test_dies_at_exit.py": """
        import atexit, os, signal
        def test_it(): atexit.register(os.kill, os.getpid(), signal.SIGABRT)
        """,
}
FAILS_IN = {
    "test_outcomes.py": {
        "TestAll::test_passes": "passed",
        "TestAll::test_fails": "failed",
        "TestAll::test_fails_too": "failed",
        "TestAll::test_skips": "skipped",
        "TestAll::test_fails_as_expected": "passed",
        "TestAll::test_part_fails": "failed",
        "TestSetUp::test_never": "error",
    },
    "test_kills.py": {
        "test_before": "passed",
        "test_segfault": "killed",
        "test_between": "passed",
        "test_exit": "killed",
        "test_after": "passed",
    },
    "test_hangs.py": {"test_hang": "killed", "test_after": "passed"},
    "test_asks.py": {"test_asks": "failed", "test_child_asks": "failed"},
    "below/test_import.py": {"": "error"},
    "below/test_exits.py": {judge.PROCESS: "killed"},
    "below/test_dies_at_exit.py": {"test_it": "passed", judge.PROCESS: "killed"},
}


def write_suite(folder: Path) -> Path:
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(line.removeprefix("        ") for line in text.splitlines()))
    return folder


JUDGE = [sys.executable, "-m", "vllm_npu.emulator", "judge"]


def environment() -> dict[str, str]:
    return {**os.environ, envs.EMULATOR_LIBRARIES.name: str(library_folder())}


def run_judge(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*JUDGE, *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def test_a_suite_with_every_fault_has_every_outcome(tmp_path):
    suite, result = write_suite(tmp_path / "suite"), tmp_path / "result.json"
    arguments = ("--suite", suite, "--json", result, "--jobs", 2, "--test-seconds", 20)
    first = run_judge(*arguments)
    assert first.returncode == 1, first.stderr
    read = json.loads(result.read_text())
    outcomes = {
        file: {name: test["outcome"] for name, test in made["tests"].items()} for file, made in read["files"].items()
    }
    assert outcomes == FAILS_IN
    reasons = {
        f"{file}::{name}": test["reason"]
        for file, made in read["files"].items()
        for name, test in made["tests"].items()
    }
    assert reasons["test_kills.py::test_segfault"] == "ended by SIGSEGV"
    assert reasons["test_kills.py::test_exit"] == "ended with exit code 0"
    assert reasons["test_hangs.py::test_hang"] == "time limit of 20 s for a test"
    assert reasons["below/test_dies_at_exit.py::(the process itself)"] == "ended by SIGABRT"
    assert "no_such_package" in reasons["below/test_import.py::"]
    assert "[7/7]" in first.stderr
    assert "   3 × AssertionError: N != N" in first.stdout  # equal causes with other numbers are one reason
    counts = Counter(outcome for tests in FAILS_IN.values() for outcome in tests.values())
    totals = [str(counts[outcome]) for outcome in ("passed", "skipped", "failed", "error", "killed")]
    assert ["7", "files", *totals] in [line.split() for line in first.stdout.splitlines()]

    # What the result has is not run again. A mended file that is asked for is, and the comparison names both changes.
    older = tmp_path / "older.json"
    older.write_text(result.read_text())
    (suite / "test_kills.py").write_text("def test_before(): assert False\ndef test_segfault(): pass\n")
    second = run_judge(*arguments)
    assert "7 files are in" in second.stderr
    assert "[1/" not in second.stderr
    third = run_judge(*arguments, "--only", "test_kills.py", "--again", "--compare", older)
    assert "[1/1] test_kills.py: 1 passed, 1 failed" in third.stderr
    assert "1 new failures\n  test_kills.py::test_before: assert False" in third.stdout
    assert "1 mended\n  test_kills.py::test_segfault" in third.stdout


def job_of(folder: Path) -> judge.Job:
    return judge.Job(
        suite=str(folder),
        folder=None,
        only=(),
        skip=(),
        jobs=1,
        json=folder / "result.json",
        compare=None,
        soc_name="A2",
        test_seconds=20,  # a process starts in less, also on a busy host
        file_seconds=60,
        again=False,
    )


@pytest.mark.parametrize(("processes_per_core", "outcome"), [(0, "killed"), (1000, "passed")])
def test_time_limits_follow_the_load(tmp_path, monkeypatch, processes_per_core, outcome):
    """A load average is told to `judge`, because a true one takes minutes to rise and others would pay for it."""
    load = processes_per_core * len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    (tmp_path / "test_a.py").write_text("import time\ndef test_waits(): time.sleep(30)\n")
    job = job_of(tmp_path)
    with judge.processes_of(job, tmp_path, None) as processes:
        made = judge.run_file(job, processes, tmp_path / "test_a.py", tmp_path, threading.Event())
    assert made.tests["test_waits"].outcome == outcome, made
    assert set(made.tests) == {"test_waits"}


@pytest.mark.parametrize("named", [None, "7"])
def test_hccl_has_its_own_time_out_where_none_is_named(tmp_path, monkeypatch, named):
    """torch_npu computes its watchdog's time-out from it, and tests of torch_npu compare that."""
    monkeypatch.delenv("HCCL_EXEC_TIMEOUT", raising=False)
    if named:
        monkeypatch.setenv("HCCL_EXEC_TIMEOUT", named)
    with judge.processes_of(job_of(tmp_path), tmp_path, None) as processes:
        assert processes.environment["HCCL_EXEC_TIMEOUT"] == (named or "1836")


CONFTEST = """
import os, pathlib, subprocess, sys
import torch, torch_npu
subprocess.run(["npu-smi", "info"], check=True)
with open(pathlib.Path(__file__).with_name("imports"), "a") as file:
    file.write(f"{os.getpid()}\\n")
"""
FORKED_FILES = FILES | {
    "test_leaves_traces.py": """
        import os, sys, types
        os.environ["LEFT_BEHIND"] = "1"
        sys.modules["left_behind"] = types.ModuleType("left_behind")
        def test_device(): import torch; torch.ones(1, device="npu")
        """,
    "test_own_process.py": """
        import os, sys
        def test_no_traces(): assert "LEFT_BEHIND" not in os.environ and "left_behind" not in sys.modules
        def test_arguments(): assert sys.argv[-1].endswith("test_own_process.py")
        def test_folder(): assert os.path.isfile("version.txt")
        def test_device(): import torch; assert not torch.npu.is_initialized()
        def test_output(capfd):
            os.write(1, b"mine")
            assert capfd.readouterr().out == "mine"
        def test_group(): assert os.getpgrp() == os.getpid()
        """,
}
PASSED_IN_OWN_PROCESS = ("test_no_traces", "test_arguments", "test_folder", "test_device", "test_output", "test_group")


def test_processes_forked_after_a_conftest_are_as_new_interpreters(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys.modules[__name__], "FILES", FORKED_FILES)
    tests = write_suite(tmp_path / "tests")
    (tests / "conftest.py").write_text(CONFTEST)
    (tmp_path / "version.txt").write_text(TORCH_NPU)
    suite = judge.Suite(
        "torch_npu", "tests", ("**/test_*.py",), "", "version.txt", r"^\S+$", "", conftest="conftest.py"
    )
    monkeypatch.setitem(judge.SUITES, "forked", suite)
    monkeypatch.setenv(envs.EMULATOR_LIBRARIES.name, str(library_folder()))
    job = judge.Job(
        suite="forked",
        folder=tmp_path,
        only=(),
        skip=(),
        jobs=2,
        json=tmp_path / "result.json",
        compare=None,
        soc_name="A2",
        test_seconds=20,
        file_seconds=200,
        again=False,
    )
    assert judge.judge(job) == 1
    made = judge.load(job.json)
    outcomes = {file: {name: test.outcome for name, test in each.tests.items()} for file, each in made.files.items()}
    wanted = FAILS_IN | {
        "test_leaves_traces.py": {"test_device": "passed"},
        "test_own_process.py": dict.fromkeys(PASSED_IN_OWN_PROCESS, "passed"),
    }
    assert outcomes == wanted, capfd.readouterr().err
    assert len((tests / "imports").read_text().split()) == 1, "the files of the suite share one import of conftest.py"


SPAWNING = """
import atexit, multiprocessing, os, pathlib, signal, sys
import torch, torch_npu

def talk(queue, event, tensor):
    queue.put({
        "sum": (tensor.npu() + 3).tolist(),
        "variables": [os.environ.get("MASTER_PORT"), os.environ.get("TORCH_LOGS_OUT")],
        "folder": os.getcwd(),
        "module": __name__,
        "own parent": os.getppid() == multiprocessing.parent_process().pid,
    })
    event.wait()
    sys.exit(7)

def end_by(number): os.kill(os.getpid(), number)
def end_late_by(number): atexit.register(end_by, number)
def fail(message): raise ValueError(message)

def start(function, *arguments):
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    return process

def hear(variable):
    context = multiprocessing.get_context("spawn")
    queue, event = context.Queue(), context.Event()
    process = start(talk, queue, event, torch.ones(2))
    told = queue.get(timeout=200)
    assert process.is_alive() and process.exitcode is None
    event.set()
    assert multiprocessing.connection.wait([process.sentinel], 100) == [process.sentinel]
    process.join()
    assert process.exitcode == 7
    process.close()
    with pathlib.Path(os.environ["HEARD"]).open("a") as file:
        file.write(f"{told.pop('own parent')}\\n")
    assert told == {"sum": [4.0, 4.0], "variables": variable, "folder": os.getcwd(), "module": __name__}

def test_arguments_and_results(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "12345")
    hear(["12345", None])

def test_variable_that_the_imports_may_read(monkeypatch):
    monkeypatch.setenv("TORCH_LOGS_OUT", "x")
    hear([None, "x"])

def test_ends(capfd):
    for function, argument, code in (
        (end_by, signal.SIGKILL, -signal.SIGKILL), (end_late_by, signal.SIGABRT, -signal.SIGABRT), (fail, "on purpose", 1),
    ):
        process = start(function, argument)
        process.join()
        assert process.exitcode == code
    assert "ValueError: on purpose" in capfd.readouterr().err

def test_ended_from_outside():
    event = multiprocessing.get_context("spawn").Event()
    process = start(event.wait)
    process.terminate()
    process.join()
    assert process.exitcode == -signal.SIGTERM

def test_spawn_of_torch():
    try:
        torch.multiprocessing.spawn(fail, nprocs=2)
    except torch.multiprocessing.ProcessRaisedException as error:
        assert "fail() " not in str(error) and "ValueError" in str(error)
    else:
        raise AssertionError
"""


@pytest.mark.parametrize(
    "fork", [True, pytest.param(False, marks=pytest.mark.nightly)]
)  # spawned ones take a minute or two
def test_processes_that_a_test_spawns_are_the_same_where_they_are_forked(tmp_path, monkeypatch, fork):
    (tmp_path / "test_spawning.py").write_text(SPAWNING)
    monkeypatch.setenv("HEARD", str(tmp_path / "heard"))
    judged = run_judge("--suite", tmp_path, "--json", tmp_path / "result.json", *([] if fork else ["--no-fork"]))
    assert "5 passed (" in judged.stderr, judged.stdout
    # Of a forked process, the parent is the server.
    assert (tmp_path / "heard").read_text().split() == [str(not fork)] * 2


def test_a_judged_process_finds_npu_smi_and_torchrun(tmp_path):
    """vllm-ascend's tests ask `npu-smi info` whether there is a device, and mock torch_npu where it fails."""
    script = tmp_path / "script.py"
    script.write_text("import sys, torch, torch_npu; print(sys.executable, torch.ones(1, device='npu').item())")
    (tmp_path / "test_a.py").write_text(
        "import subprocess\n"
        "def test_info(): subprocess.run(['npu-smi', 'info'], check=True)\n"
        "def test_other():\n"
        "    refused = subprocess.run(['npu-smi', 'info', '-m'], capture_output=True, text=True)\n"
        "    assert refused.returncode == 1 and 'npu-smi info -m: not emulated' in refused.stderr\n"
        "def test_torchrun():\n"
        f"    run = subprocess.run(['torchrun', {str(script)!r}], check=True, capture_output=True, text=True)\n"
        "    import sys; assert f'{sys.executable} 1.0' in run.stdout\n"
    )
    judged = run_judge("--suite", tmp_path, "--json", tmp_path / "result.json")
    assert judged.returncode == 0, judged.stdout


def test_a_stopped_run_ends_what_it_started_and_keeps_what_is_done(tmp_path):
    (tmp_path / "test_a.py").write_text("def test_a(): pass\n")
    pid = tmp_path / "pid"
    start_child = "subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(3600)'])"
    (tmp_path / "test_b.py").write_text(
        "import os, pathlib, subprocess, sys\n"
        f"def test_b():\n    child = {start_child}\n"
        f"    pathlib.Path({str(pid)!r} + '.new').write_text(str(child.pid))\n"
        f"    os.rename({str(pid)!r} + '.new', {str(pid)!r})\n    child.wait()\n"
    )
    result = tmp_path / "result.json"
    command = [*JUDGE, "--suite", str(tmp_path), "--json", str(result)]
    process = subprocess.Popen(command, env=environment())
    wait_until(pid.exists, "the judged file starts")
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    wait_until(lambda: not is_running(int(pid.read_text())), "the judged process ends")
    assert list(json.loads(result.read_text())["files"]) == ["test_a.py"]


@pytest.mark.parametrize(
    ("made", "arguments", "message"),
    [
        ({}, ["--suite", "nowhere"], "neither a folder nor one of torch-npu, vllm-ascend"),
        ({"readme.txt": ""}, ["--suite", "{folder}"], "no test file in {folder} is named **/test_*.py"),
        ({"test_a.py": ""}, ["--suite", "{folder}", "--only", "b*"], "no test file in {folder} is named b*"),
        (
            {"test_a.py": ""},
            ["--suite", "{folder}", "--skip", "test_a*"],
            "no test file in {folder} is named **/test_*.py",
        ),
        ({"test_a.py": ""}, ["--suite", "{folder}", "--folder", "{folder}"], "--folder is the folder of a named suite"),
        ({}, ["--suite", "torch-npu"], "needs --folder, a copy of its sources; get it by: git clone"),
        ({"test_a.py": ""}, ["--suite", "torch-npu", "--folder", "{folder}"], "{folder} has no test/, so it is no"),
        (
            {"test/npu/test_a.py": "", "version.txt": "# versions\n2.15.0\n2.14.0\n"},
            ["--suite", "torch-npu", "--folder", "{folder}"],
            f"are for torch_npu 2.15.0 or 2.14.0, and {TORCH_NPU} is installed; get the right ones by: git clone --depth 1 "
            f"--branch {judge.SUITES['torch-npu'].tags[TORCH_NPU]}",
        ),
        ({"test_a.py": ""}, ["--suite", "{folder}", "--json", "{folder}/test_a.py"], "is no result of an earlier"),
        ({"test_a.py": ""}, ["--suite", "{folder}", "--json", "{folder}/none/a.json"], "its folder does not exist"),
        ({"test_a.py": ""}, ["--suite", "{folder}", "--compare", "{folder}/none"], "{folder}/none is no result of an"),
        (
            {"test_a.py": ""},
            ["--suite", "{folder}", "--with-plugin"],
            "--with-plugin is for --suite vllm-ascend, not for --suite {folder}",
        ),
        ({"test_a.py": ""}, ["--suite", "{folder}", "--soc", "A9"], "soc 'A9' is not emulated"),
        (
            {"test_a.py": "", "r.json": '{"about": {"soc": "Ascend910_9391"}, "files": {}}'},
            ["--suite", "{folder}", "--json", "{folder}/r.json"],
            "r.json is about {{'soc': 'Ascend910_9391'}}, and this run about",
        ),
    ],
)
def test_a_run_that_cannot_be_is_refused_by_name(tmp_path, made, arguments, message):
    for name, text in made.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    refused = run_judge("--json", tmp_path / "result.json", *arguments)
    assert refused.returncode == 2
    assert message.format(folder=tmp_path) in refused.stderr
    assert not (tmp_path / "result.json").exists()
