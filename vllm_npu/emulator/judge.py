"""Runs the tests of other projects, unchanged, on the emulated device, and says what passed.

    python -m vllm_npu.emulator judge --suite torch-npu --folder CHECKOUT --json RESULT [--compare OLDER]

Each test file has a pytest process of its own. A process that crashes or hangs is ended, the test that it ran counts as killed,
and a new process runs the rest of the file. RESULT is written after each file. Files in RESULT are not run again.

Where all files of a suite begin with the imports of one conftest.py, their processes are forked from one that has done these
imports (judge_recorder.py), which take most of a file's time. Processes that a test spawns by multiprocessing are forked too
(forked_spawn.py). --no-fork starts an interpreter for each.
"""

import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vllm_npu import envs
from vllm_npu.emulator import build, fork_server, judge_recorder, launcher, shared_memory, soc
from vllm_npu.errors import UnsupportedConfigError

OUTCOMES = ("passed", "skipped", "failed", "error", "killed")  # from the best to the worst: the worst counts
FAILURES = ("failed", "error", "killed")
PROCESS = "(the process itself)"  # in place of a test's name, where the process died outside of every test
POLL_SECONDS = 0.1
HCCL_EXEC_TIMEOUT = "1836"  # HCCL's own default, in seconds
OUTPUT_CHARACTERS = 2000  # of a killed process, its last
OURS = "vllm_npu"  # the name of this package's entry points in vLLM's plugins
NPU_SMI = """#!/bin/sh
[ "$*" = info ] || { echo "npu-smi $*: not emulated; the emulated Ascend device answers 'npu-smi info' only" >&2; exit 1; }
echo "emulated Ascend device $VLLM_NPU_EMULATOR_SOC: no table of devices"
"""
SHOWN_TESTS = 40  # of each list in the comparison; --json has all


@dataclass(frozen=True, slots=True)
class Suite:
    """The tests of a project, as its own checkout or source distribution holds them."""

    distribution: str  # as pip names the package under test
    tests: str  # folder of the tests, below the folder that the user names
    only: tuple[str, ...]  # which files, unless the user says so
    run_from: str | None  # folder that its files are run from, below the folder that the user names; None: their own
    version_file: str  # states the versions that these tests are for
    version_pattern: str
    get: str  # how to get the right one; {version} and {tag} are filled in
    tags: Mapping[str, str] = field(default_factory=dict)  # by version of the distribution
    vllm_platform: str | None = None  # this distribution's entry point of vLLM's platforms, where it has one
    conftest: str | None = None  # in the tests' folder: each process may be forked after its imports

    def how_to_get(self, version: str) -> str:
        return self.get.format(version=version, tag=self.tags.get(version, f"v...-pytorch{version}"))


SUITES = {
    # Its version.txt lists all versions that a checkout can be built for.
    "torch-npu": Suite(
        "torch_npu",
        "test",
        ("npu/test_*.py",),
        None,
        "version.txt",
        r"^[0-9]\S*$",
        "git clone --depth 1 --branch {tag} https://gitcode.com/Ascend/pytorch.git",
        {"2.13.0": "v26.2.0-beta.1-pytorch2.13.0", "2.10.0.post4": "v26.1.0-pytorch2.10.0"},
    ),
    "vllm-ascend": Suite(
        "vllm-ascend",
        "tests/ut",
        ("**/test_*.py",),
        "",
        "PKG-INFO",
        r"(?<=^Version: )\S+$",
        "pip download --no-deps --no-build-isolation --no-binary :all: vllm-ascend=={version}, and unpack it",
        vllm_platform="ascend",
        conftest="conftest.py",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to run, and where."""

    suite: str  # a name in SUITES, or a folder
    folder: Path | None  # of a named suite
    only: tuple[str, ...]
    skip: tuple[str, ...]
    jobs: int
    json: Path
    compare: Path | None
    soc_name: str
    test_seconds: float  # on a machine without other load, as the next
    file_seconds: float
    again: bool
    fork: bool = True  # processes that tests spawn, and those of a suite with a conftest: after their imports
    with_plugin: bool = False  # of a suite with a platform of vLLM: with this package's platform in place of that one


@dataclass(frozen=True, slots=True)
class Test:
    outcome: str
    reason: str = ""  # one line
    detail: str = ""  # the end of the traceback, or of a killed process's output


@dataclass(frozen=True, slots=True)
class TestFile:
    """The outcome of each test of a file."""

    seconds: float
    tests: dict[str, Test]

    def count(self, outcome: str) -> int:
        return sum(test.outcome == outcome for test in self.tests.values())


@dataclass(frozen=True, slots=True)
class Result:
    """What --json holds."""

    about: dict[str, str]  # suite, chip and versions: results are one table only where these are equal
    files: dict[str, TestFile]

    def tests(self) -> Iterator[tuple[str, str, Test]]:
        for file, result in sorted(self.files.items()):
            for name, test in result.tests.items():
                yield file, name, test


# --- what to run ---


def installed_version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise UnsupportedConfigError(f"judge: {distribution} is not installed beside {sys.executable}") from None


def refuse_other_version(suite: Suite, folder: Path, version: str) -> None:
    """Raises UnsupportedConfigError where the tests in the folder are not for the installed version of the package."""
    file = folder / suite.version_file
    if not (folder / suite.tests).is_dir() or not file.is_file():
        missing = suite.version_file if (folder / suite.tests).is_dir() else f"{suite.tests}/"
        raise UnsupportedConfigError(
            f"judge: {folder} has no {missing}, so it is no complete copy of {suite.distribution}'s sources; "
            f"get it by: {suite.how_to_get(version)}"
        )
    versions = re.findall(suite.version_pattern, file.read_text(), re.MULTILINE)
    if version not in versions:
        raise UnsupportedConfigError(
            f"judge: the tests in {folder} are for {suite.distribution} {' or '.join(versions)}, and {version} is "
            f"installed; get the right ones by: {suite.how_to_get(version)}"
        )


def find_tests(job: Job) -> tuple[Path, Path | None, list[str]]:
    """The folder of the tests, the folder to run them from (None: each file's own) and the files in the first folder.

    Raises UnsupportedConfigError for a folder that is no test suite, or one for another version of the package.
    """
    suite = SUITES.get(job.suite)
    run_from: Path | None = None
    if suite is None:
        if job.folder is not None:
            raise UnsupportedConfigError(
                f"judge: --folder is the folder of a named suite ({', '.join(SUITES)}), not of --suite {job.suite}"
            )
        tests = Path(job.suite).resolve()
        if not tests.is_dir():
            raise UnsupportedConfigError(
                f"judge: --suite {job.suite} is neither a folder nor one of {', '.join(SUITES)}"
            )
        only = job.only or ("**/test_*.py",)
    else:
        version = installed_version(suite.distribution)
        if job.folder is None:
            raise UnsupportedConfigError(
                f"judge: --suite {job.suite} needs --folder, a copy of its sources; get it by: {suite.how_to_get(version)}"
            )
        refuse_other_version(suite, job.folder, version)
        tests = (job.folder / suite.tests).resolve()
        run_from = None if suite.run_from is None else (job.folder / suite.run_from).resolve()
        only = job.only or suite.only
    skipped = {path for pattern in job.skip for path in tests.glob(pattern)}
    found = {path for pattern in only for path in tests.glob(pattern) if path.is_file()} - skipped
    files = sorted(str(path.relative_to(tests)) for path in found)
    if not files:
        raise UnsupportedConfigError(f"judge: no test file in {tests} is named {' or '.join(only)}; --only names files")
    return tests, run_from, files


def about(job: Job) -> dict[str, str]:
    """Raises UnsupportedConfigError for --with-plugin of a suite without a platform of vLLM."""
    suite = SUITES.get(job.suite)
    packages = {"torch", "torch_npu"} | ({suite.distribution} if suite else set())
    made = {
        "suite": job.suite,
        "soc": soc.resolve(job.soc_name),
        **{package: installed_version(package) for package in sorted(packages)},
    }
    if suite is not None and suite.vllm_platform is not None:
        # The distribution of vLLM's build for CPUs has another name.
        [vllm] = set(importlib.metadata.packages_distributions().get("vllm", ["vllm"]))
        made |= {"vllm": installed_version(vllm), "platform": OURS if job.with_plugin else suite.distribution}
    elif job.with_plugin:
        suites = " or ".join(name for name, each in SUITES.items() if each.vllm_platform)
        raise UnsupportedConfigError(f"judge: --with-plugin is for --suite {suites}, not for --suite {job.suite}")
    return made


def vllm_plugins(job: Job) -> dict[str, str]:
    """The variable that lets vLLM load one of two platforms: the suite's own, or this package's. Empty for other suites."""
    suite = SUITES.get(job.suite)
    if suite is None or suite.vllm_platform is None:
        return {}
    groups = ("vllm.platform_plugins", "vllm.general_plugins")
    installed = {point.name for group in groups for point in importlib.metadata.entry_points(group=group)}
    return {"VLLM_PLUGINS": ",".join(sorted(installed - {suite.vllm_platform if job.with_plugin else OURS}))}


def write_programs(folder: Path) -> None:
    """Writes programs that tests call.

    Unless `npu-smi info` succeeds, vllm-ascend's tests replace torch_npu by a mock. The torchrun on the PATH may be that of
    another interpreter, because judge needs no activated environment.
    """
    torchrun = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"\n'
    for name, text in {"npu-smi": NPU_SMI, "torchrun": torchrun}.items():
        path = folder / name
        path.write_text(text)
        path.chmod(0o755)


# --- running ---


def outcomes(lines: Iterable[dict[str, str]]) -> dict[str, Test]:
    """The worst outcome of each test."""
    tests: dict[str, Test] = {}
    for line in lines:
        if line["event"] == "outcome":
            test = Test(line["outcome"], line.get("reason", ""), line.get("detail", ""))
            before = tests.get(line["test"])
            if before is None or OUTCOMES.index(test.outcome) > OUTCOMES.index(before.outcome):
                tests[line["test"]] = test
    return tests


def running_test(lines: Sequence[dict[str, str]]) -> str | None:
    """The test that has started and not finished."""
    finished = {line["test"] for line in lines if line["event"] == "finish"}
    started = [line["test"] for line in lines if line["event"] == "start"]
    return started[-1] if started and started[-1] not in finished else None


def how_it_ended(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


class Stopped(Exception):
    """The run was stopped from outside."""


PYTEST = ("-m", "pytest", "-q", "-p", judge_recorder.__name__, "-p", "no:cacheprovider")


@dataclass(frozen=True, slots=True)
class Processes:
    """Starts processes that run a file's tests."""

    environment: dict[str, str]  # of all processes
    server: fork_server.ForkServer | None  # of files that are run from `folder`

    def start(self, file: str, cwd: Path, environment: Mapping[str, str], output: int) -> launcher.RankProcess:
        """Runs `file`, below cwd, with standard output and error in the file descriptor `output`."""
        variables = {**self.environment, **environment}
        if self.server is not None:
            try:
                return self.server.fork(judge_recorder.run_forked_file, [file], variables, (output, output))
            except fork_server.ForkServerError as error:
                print(f"{file}: {error}; it gets an interpreter of its own", file=sys.stderr)
        return subprocess.Popen(
            [sys.executable, *PYTEST, file],
            cwd=cwd,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=launcher.end_with_parent,
        )


@contextlib.contextmanager
def processes_of(job: Job, tests: Path, run_from: Path | None) -> Iterator[Processes]:
    """What starts the processes of a run. It ends them all, at the latest with this process."""
    changes = {
        "TASK_QUEUE_ENABLE": os.environ.get("TASK_QUEUE_ENABLE", "1"),  # torch_npu's own default
        # torch_npu computes its watchdog's time-out from it, and tests compare that. `run` shortens it.
        "HCCL_EXEC_TIMEOUT": os.environ.get("HCCL_EXEC_TIMEOUT", HCCL_EXEC_TIMEOUT),
        envs.EMULATOR_LIBRARIES.name: str(build.build()),  # for all processes those of the run's start
        **vllm_plugins(job),
    }
    suite = SUITES.get(job.suite)
    with tempfile.TemporaryDirectory(prefix="vllm_npu_judge.") as name:
        write_programs(Path(name))
        environment = launcher.device_environment(job.soc_name, job.jobs, launcher.new_run_name(), changes)
        environment["PATH"] = os.pathsep.join((name, environment["PATH"]))
        environment[judge_recorder.FORK_VARIABLE] = str(int(job.fork))
        server = None
        if job.fork and suite is not None and suite.conftest is not None and run_from is not None:
            command = [*PYTEST, os.path.relpath(tests / suite.conftest, run_from)]
            try:
                server = fork_server.ForkServer(environment, command, judge_recorder.CONTROL_VARIABLE, run_from)
            except fork_server.ForkServerError as error:
                print(f"judge: no process can be forked: {error}; each gets an interpreter of its own", file=sys.stderr)
        try:
            yield Processes(environment, server)
        finally:
            if server is not None:
                server.close()


def wait_or_end(
    process: launcher.RankProcess, record: Path, job: Job, clock: launcher.QuietClock, stopping: threading.Event
) -> str:
    """Waits for the end of a file's process, and ends a process that is late by the file's clock. Returns how it ended.

    Raises Stopped after `stopping` is set. In every case the process and those that it started have ended.
    """
    size, changed = 0, clock.seconds()
    try:
        while (code := process.poll()) is None:
            now = clock.seconds()
            grown = record.stat().st_size if record.exists() else 0
            if grown != size:
                size, changed = grown, now
            if now > job.file_seconds:
                return f"time limit of {job.file_seconds:g} s for a file"
            if now - changed > job.test_seconds:
                return f"time limit of {job.test_seconds:g} s for a test"
            if stopping.wait(POLL_SECONDS):
                raise Stopped
        return how_it_ended(code)
    finally:
        launcher.end_all([process])


def run_file(job: Job, processes: Processes, file: Path, cwd: Path, stopping: threading.Event) -> TestFile:
    """Runs a file's tests, in a new process after each that is killed. Raises Stopped after `stopping` is set."""
    start, clock = time.monotonic(), launcher.QuietClock()
    run_name = launcher.new_run_name()
    killed: dict[str, Test] = {}
    with tempfile.TemporaryDirectory(prefix="vllm_npu_judge.") as name:
        record, output = Path(name, "record"), Path(name, "output")
        environment = {envs.EMULATOR_RUN.name: run_name, judge_recorder.RECORD_VARIABLE: str(record)}
        while True:
            with open(output, "wb") as written:
                process = processes.start(os.path.relpath(file, cwd), cwd, environment, written.fileno())
                try:
                    ended = wait_or_end(process, record, job, clock, stopping)
                finally:
                    shared_memory.clean_run(run_name)
            lines = judge_recorder.read(record)
            printed = output.read_text(errors="replace")[-OUTPUT_CHARACTERS:]
            running = running_test(lines)
            if running is None:
                if not any(line["event"] == "end" for line in lines) or process.poll() not in range(6):
                    killed[PROCESS] = Test("killed", ended, printed)
                break
            killed[running] = Test("killed", ended, printed)
            if clock.seconds() > job.file_seconds:
                break
            with open(record, "a") as marked:
                marked.write(json.dumps({"event": "finish", "test": running}) + "\n")
    collected = {line["test"] for line in lines if line["event"] == "collected"}
    tests = {
        **{name: Test("killed", "not run: the process had ended") for name in collected},
        **outcomes(lines),
        **killed,
    }
    return TestFile(round(time.monotonic() - start, 1), tests)


def run_all(job: Job, result: Result, tests: Path, run_from: Path | None, files: Sequence[str]) -> None:
    """Runs the files that the result does not have, and writes the result after each."""
    wanted = [file for file in files if job.again or file not in result.files]
    if len(wanted) < len(files):
        print(f"{len(files) - len(wanted)} files are in {job.json}; --again runs them again", file=sys.stderr)
    if not wanted:
        return
    stopping = threading.Event()
    with (
        launcher.stop_on_signals(),
        processes_of(job, tests, run_from) as processes,
        ThreadPoolExecutor(job.jobs) as pool,
    ):
        pending = {}
        for file in wanted:
            path = tests / file
            pending[pool.submit(run_file, job, processes, path, run_from or path.parent, stopping)] = file
        try:
            for number, future in enumerate(as_completed(pending), 1):
                file, made = pending[future], future.result()
                result.files[file] = made
                save(result, job.json)
                counts = ", ".join(f"{made.count(outcome)} {outcome}" for outcome in OUTCOMES if made.count(outcome))
                print(f"[{number}/{len(wanted)}] {file}: {counts or 'no test'} ({made.seconds} s)", file=sys.stderr)
        finally:
            stopping.set()
            pool.shutdown(cancel_futures=True)


# --- the result ---


def save(result: Result, path: Path) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(asdict(result), indent=1, sort_keys=True) + "\n")
    new.replace(path)


def load(path: Path) -> Result:
    """Raises UnsupportedConfigError for a file that `judge` did not write."""
    try:
        read = json.loads(path.read_text())
        files = {
            file: TestFile(made["seconds"], {name: Test(**test) for name, test in made["tests"].items()})
            for file, made in read["files"].items()
        }
        return Result(dict(read["about"]), files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedConfigError(f"judge: {path} is no result of an earlier `judge`: {error!r}") from error


def general_reason(test: Test) -> str:
    """The reason without numbers and addresses, so that equal causes have equal reasons."""
    return re.sub(r"\b(0x[0-9a-f]+|\d+(\.\d+)*)\b", "N", test.reason)


def table(result: Result) -> str:
    rows = [f"{'file':<60}" + "".join(f"{outcome:>9}" for outcome in OUTCOMES)]
    for file, made in sorted(result.files.items()):
        rows.append(f"{file:<60}" + "".join(f"{made.count(outcome):>9}" for outcome in OUTCOMES))
    totals = Counter(test.outcome for _, _, test in result.tests())
    rows.append(f"{f'{len(result.files)} files':<60}" + "".join(f"{totals[outcome]:>9}" for outcome in OUTCOMES))
    return "\n".join(rows)


def reasons(result: Result) -> str:
    """Every failure's reason, the most frequent first."""
    groups: dict[str, list[str]] = {}
    for file, name, test in result.tests():
        if test.outcome in FAILURES:
            groups.setdefault(general_reason(test), []).append(f"{file}::{name}")
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    return "\n".join(f"{len(tests):>4} × {reason}\n       e.g. {tests[0]}" for reason, tests in ordered)


def comparison(old: Result, new: Result) -> str:
    """New failures and mended ones, of the files that both have."""
    before = {(file, name): test.outcome in FAILURES for file, name, test in old.tests()}
    lists: dict[str, list[str]] = {"new failures": [], "mended": []}
    for file, name, test in new.tests():
        failed = test.outcome in FAILURES
        if failed and file in old.files and not before.get((file, name), False):
            lists["new failures"].append(f"{file}::{name}: {test.reason}")
        elif not failed and before.get((file, name), False):
            lists["mended"].append(f"{file}::{name}")
    parts = []
    for title, tests in lists.items():
        more = f"\n  and {len(tests) - SHOWN_TESTS} more" if len(tests) > SHOWN_TESTS else ""
        parts.append("\n".join([f"{len(tests)} {title}", *(f"  {test}" for test in tests[:SHOWN_TESTS])]) + more)
    return "\n".join(parts)


def judge(job: Job) -> int:
    """Runs the suite and prints its table. Returns 0 where no test failed, 1 otherwise.

    Raises UnsupportedConfigError for a folder, an earlier result or a version that cannot be used; then no test has run.
    """
    tests, run_from, files = find_tests(job)
    result = Result(about(job), {})
    if job.json.exists():
        earlier = load(job.json)
        if earlier.about != result.about:
            raise UnsupportedConfigError(
                f"judge: {job.json} is about {earlier.about}, and this run about {result.about}; name another file"
            )
        result = earlier
    elif not job.json.parent.is_dir():
        raise UnsupportedConfigError(f"judge: --json {job.json}: its folder does not exist")
    old = None if job.compare is None else load(job.compare)
    run_all(job, result, tests, run_from, files)
    print(table(result))
    print(reasons(result))
    if old is not None:
        print(comparison(old, result))
    return 1 if any(test.outcome in FAILURES for _, _, test in result.tests()) else 0
