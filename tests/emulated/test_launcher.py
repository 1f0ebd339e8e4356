"""The loader and the launcher: ranks, exit codes, refusals, cleaning."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_npu import envs
from vllm_npu.emulator import build, loader, shared_memory, soc
from vllm_npu.emulator.launcher import STARTUP_FOLDER
from vllm_npu.errors import EmulatorBuildError, UnsupportedConfigError

pytestmark = pytest.mark.emulated

ROOT = Path(__file__).resolve().parents[2]
ALL_REDUCE = """
import os, sys, torch, torch_npu
torch.npu.set_device(int(os.environ["LOCAL_RANK"]))
torch.distributed.init_process_group("hccl")
x = torch.ones(1, device="npu")
torch.distributed.all_reduce(x)
sys.stderr.write(f"sum {x.item()} on {torch.npu.get_device_name()}\\n")
torch.distributed.destroy_process_group()
"""


def emulator(
    *arguments: str, env: dict[str, str | None] | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **(env or {})}
    return subprocess.run(
        [sys.executable, "-m", "vllm_npu.emulator", *arguments],
        cwd=cwd,
        env={name: value for name, value in environment.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_each_rank_gets_torchruns_variables(launch_script):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    line = f"' '.join(os.environ[name] for name in {names})"
    outcome = launch_script(f"import os; os.write(1, ({line} + '\\n').encode())", 3)  # at once: ranks share the pipe
    lines = sorted(outcome.output.split("\n")[:-1])
    assert outcome.code == 0
    port = lines[0].split()[-1]
    assert lines == [f"{rank} {rank} 3 3 127.0.0.1 {port}" for rank in range(3)]


def test_arguments_and_modules(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; print(sys.argv[1:])")
    assert emulator("run", str(script), "--nproc", "9", "-m").stdout == "['--nproc', '9', '-m']\n"
    assert emulator("run", "-m", "json.tool", "--help").stdout.startswith("usage: ")


def test_a_program_without_an_import_of_torch_npu_finds_the_device_if_the_user_wants_it(tmp_path):
    """Programs of torch.accelerator name no device. On a machine with CANN, torch imports torch_npu by itself."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\n"
        "found = torch.accelerator.is_available()\n"
        "print(found, 'torch_npu' in sys.modules, torch.ones(2, device='npu').tolist() if found else None)\n"
    )
    wanted = emulator("run", str(script), env={loader.AUTOLOAD_VARIABLE: "1"})
    assert wanted.stdout.endswith("True True [1.0, 1.0]\n"), wanted.stderr
    assert emulator("run", str(script), env={loader.AUTOLOAD_VARIABLE: None}).stdout == "False False None\n"


@pytest.mark.parametrize("version", [None, "9.1.0"])
def test_the_version_of_cann_is_that_of_the_emulated_one_everywhere(tmp_path, version):
    """torch_npu takes a version from any file of that name in the working directory, as it would from CANN's folder."""
    (tmp_path / "ascend_toolkit_install.info").write_text("version=1.2.3\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, torch_npu\n"
        "from torch_npu.utils import collect_env\n"
        "print(torch.version.cann, collect_env.get_cann_version(), torch_npu.npu.utils.get_cann_version())\n"
    )
    environment = {"VLLM_NPU_EMULATOR_CANN": version, "ASCEND_HOME_PATH": None}
    printed = emulator("run", str(script), env=environment, cwd=tmp_path).stdout
    assert printed.splitlines()[-1].split() == [version or "8.5.0"] * 3


def test_a_failing_rank_ends_the_others_and_gives_its_exit_code(launch_script):
    start = time.monotonic()
    outcome = launch_script("import os, sys, time; sys.exit(7) if os.environ['RANK'] == '1' else time.sleep(600)", 3)
    assert outcome.code == 7
    assert "rank 1 ended with exit code 7; ending the others" in outcome.output
    assert time.monotonic() - start < 60


def test_grandchildren_end_too(launch_script, tmp_path):
    script = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
sys.exit(3)
"""
    assert launch_script(script, 1).code == 3
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_interrupting_the_launcher_ends_the_ranks(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, time; open({str(tmp_path)!r} + '/pid', 'w').write(str(os.getpid())); time.sleep(600)"
    )
    launcher = subprocess.Popen([sys.executable, "-m", "vllm_npu.emulator", "run", str(script)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) == 128 + signal.SIGTERM
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_shared_memory_is_its_owners_alone_and_that_of_killed_ranks_is_removed(launch_script):
    leave = """
import ctypes, os, signal, threading, time
folder = os.environ["VLLM_NPU_EMULATOR_LIBRARIES"]
hccl, acl = (ctypes.CDLL(os.path.join(folder, name)) for name in ("libhccl.so", "libascendcl.so"))
root, group = ctypes.create_string_buffer(4108), ctypes.c_void_p()
hccl.HcclGetRootInfo(root)
segment = "/dev/shm" + root.value.decode()

def wait_for_another_rank():
    acl.aclrtSetDevice(0)
    hccl.HcclCommInitRootInfo(2, root, 0, ctypes.byref(group))

os.umask(0)
threading.Thread(target=wait_for_another_rank, daemon=True).start()
while not os.path.exists(segment):
    time.sleep(0.01)
print(root.value.decode(), oct(os.stat(segment).st_mode & 0o777), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    outcome = launch_script(leave, 1)
    name, rights = outcome.output.splitlines()[0].removeprefix("/").split()
    assert name.startswith(shared_memory.PREFIX)
    assert rights == "0o600"
    assert outcome.code == 128 + signal.SIGKILL
    assert not (shared_memory.FOLDER / name).exists()


def test_clean_removes_only_what_dead_processes_left(tmp_path):
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    stale = shared_memory.FOLDER / f"{shared_memory.PREFIX}0.{ended.pid}.0.1"
    alive = shared_memory.FOLDER / f"{shared_memory.PREFIX}0.{os.getpid()}.0.1"
    try:
        stale.touch()
        alive.touch()
        assert f"removed {stale}" in emulator("clean").stdout
        assert not stale.exists()
        assert alive.exists()
    finally:
        stale.unlink(missing_ok=True)
        alive.unlink(missing_ok=True)


@pytest.mark.parametrize("variable", ["ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"])
def test_refuses_where_a_real_cann_is_named(variable):
    refused = emulator("run", "-m", "this", env={variable: "/somewhere"})
    assert refused.returncode == 2
    assert f"a real CANN is here ({variable}=/somewhere)" in refused.stderr


def test_refuses_where_a_real_library_would_be_found(tmp_path):
    (tmp_path / "libascendcl.so").touch()
    refused = emulator("run", "-m", "this", env={"LD_LIBRARY_PATH": f"/nowhere:{tmp_path}"})
    assert refused.returncode == 2
    assert str(tmp_path / "libascendcl.so") in refused.stderr


def test_a_missing_compiler_is_named(tmp_path):
    hidden = {
        envs.EMULATOR_LIBRARIES.name: None,
        "VLLM_NPU_ENV_HOME": str(tmp_path),
        "CXX": None,
        "PATH": str(tmp_path),
    }
    refused = emulator("build", env=hidden)
    assert refused.returncode == 2
    assert "needs a C++ compiler, and there is no c++, g++, clang++ on PATH" in refused.stderr


def test_a_failing_build_names_its_log(tmp_path):
    broken = tmp_path / "compiler"
    broken.write_text("#!/bin/sh\necho 'this compiler is broken' >&2\nexit 1\n")
    broken.chmod(0o755)
    env = {envs.EMULATOR_LIBRARIES.name: None, "VLLM_NPU_ENV_HOME": str(tmp_path), "CXX": str(broken)}
    refused = emulator("build", env=env)
    assert refused.returncode == 2
    [log] = tmp_path.glob("emulator-*.log")
    assert f"report it with the whole log, {log}, whose end is:" in refused.stderr
    assert "this compiler is broken" in refused.stderr
    assert not list(tmp_path.glob("*/lib")), "nothing half built stays"


@pytest.mark.parametrize(
    ("broken", "text"),
    [(False, "holds no libascendcl.so; unset it"), (True, "run `python -m vllm_npu.emulator build`")],
)
def test_libraries_that_cannot_be_used(tmp_path, monkeypatch, broken, text):
    monkeypatch.setenv(envs.EMULATOR_LIBRARIES.name, str(tmp_path))
    if broken:
        (tmp_path / "libascendcl.so").write_text("no library")
    with pytest.raises(EmulatorBuildError, match=text):
        loader.load_library(build.build(), "libascendcl.so")


def test_chips_and_families():
    assert soc.resolve("A3") == "Ascend910_9391"
    assert soc.resolve("a2") == "Ascend910B1"
    assert soc.resolve("Ascend910B3") == "Ascend910B3"
    with pytest.raises(
        UnsupportedConfigError, match=r"soc 'Ascend910A' is not emulated; use one of A2 \(Ascend910B1\*"
    ):
        soc.resolve("Ascend910A")
    assert "soc 'H100' is not emulated" in emulator("run", "--soc", "H100", "-m", "this").stderr
    by_environment = emulator("run", "-m", "this", env={"VLLM_NPU_EMULATOR_SOC": "H200"})
    assert "soc 'H200' is not emulated" in by_environment.stderr


def test_trace_lists_the_calls(launch_script):
    outcome = launch_script(ALL_REDUCE, 2, options=["--trace"])
    assert outcome.code == 0
    for rank in (0, 1):
        assert f"npu[{rank}] aclrtMallocAlign32 device={rank} bytes=" in outcome.output
        assert f"npu[{rank}] HcclAllReduce group=" in outcome.output


def test_torchrun(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ALL_REDUCE)
    env = {**os.environ, "VLLM_NPU_EMULATOR": "1", "VLLM_NPU_EMULATOR_SOC": "A3", "PYTHONPATH": str(STARTUP_FOLDER)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    torchrun += ["--log-dir", str(tmp_path), str(script)]  # else its folder stays in /tmp
    done = subprocess.run(torchrun, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("sum 2.0 on Ascend910_9391") == 2


def test_enable_in_a_script_and_a_plain_import_of_torch(tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_NPU_EMULATOR", "TORCH_"))}
    if envs.EMULATOR_LIBRARIES.name in os.environ:
        env[envs.EMULATOR_LIBRARIES.name] = os.environ[envs.EMULATOR_LIBRARIES.name]
    script = (
        "import vllm_npu.emulator as e; e.enable('310P'); import torch, torch_npu; print(torch.npu.get_device_name())"
    )
    enabled = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert enabled.stdout.splitlines()[-1] == "Ascend310P3"
    env["PYTHONPATH"] = str(STARTUP_FOLDER)  # what the line of `hook` does in an environment's site-packages
    plain = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.ones(2).sum().item())"],
        env=env, capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert plain.stdout == "2.0\n", plain.stderr
