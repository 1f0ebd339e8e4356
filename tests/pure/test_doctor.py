"""`vllm-npu doctor`: findings, remedies, exit status, and that it works where torch cannot be imported."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from vllm_npu import envs
from vllm_npu.cli import doctor
from vllm_npu.emulator import shared_memory
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin import compat
from vllm_npu.strategies import STRATEGIES

BROKEN_TORCH = "raise ImportError('libtorch_cpu.so: this torch is broken')\n"
# What torch does with torch_npu in its environment and CANN absent.
TORCH_THAT_LOADS_TORCH_NPU = """
import os
if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1":
    import torch_npu
__version__ = "2.13.0"
"""
TORCH_NPU_WITHOUT_CANN = "raise ImportError('libhccl.so: cannot open shared object file')\n"
CLEAN = {"VLLM_TARGET_DEVICE", "VLLM_PLUGINS", "OMP_NUM_THREADS", "PYTHONPATH", "LD_LIBRARY_PATH"}


def run_doctor(folder: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, str]]]:
    """Runs the command in the folder; nothing of pytest's environment that it looks at reaches it."""
    kept = {name: text for name, text in os.environ.items() if name not in CLEAN and not name.startswith("VLLM_NPU_")}
    written = folder / "findings.json"
    done = subprocess.run(
        [sys.executable, "-m", "vllm_npu.cli", "doctor", "--json", str(written)],
        cwd=folder,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert written.exists(), done.stderr
    return done, json.loads(written.read_text())["findings"]


def write_packages(folder: Path, **sources: str) -> str:
    """Packages by their name, in a folder for PYTHONPATH."""
    for name, source in sources.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(source)
    return str(folder)


def of_check(findings: list[dict[str, str]], check: str) -> list[dict[str, str]]:
    return [finding for finding in findings if finding["check"] == check]


def test_a_sound_environment_has_no_problem(tmp_path):
    done, findings = run_doctor(tmp_path)
    assert done.returncode == 0, done.stdout
    assert {finding["status"] for finding in findings} <= {"ok", "warning"}
    assert of_check(findings, "torch")[0]["what"].startswith(metadata.version("torch"))
    assert of_check(findings, "import torch")[0]["status"] == "ok"
    assert of_check(findings, "plugins")[0]["status"] == "ok"
    assert done.stdout.splitlines()[-1].endswith(", 0 problems")


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], list[dict[str, str]], Path]:
    """A run in which much is wrong at once."""
    folder = tmp_path_factory.mktemp("broken")
    packages = write_packages(folder / "packages", torch=BROKEN_TORCH)
    info = folder / "packages" / "other_platform-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-platform\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vllm.platform_plugins]\nother = other_platform:register\n")
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    left = shared_memory.FOLDER / f"{shared_memory.PREFIX}0.{ended.pid}.0.1"
    in_use = shared_memory.FOLDER / f"{shared_memory.PREFIX}0.{os.getpid()}.0.1"
    try:
        left.touch()
        in_use.touch()
        done, findings = run_doctor(
            folder,
            PYTHONPATH=packages,
            VLLM_TARGET_DEVICE="CPU",
            VLLM_NPU_MOE_COM="mc2",
            VLLM_NPU_MOE_COMM="mc3",
            VLLM_NPU_EMULATOR_SOC="A3",
            VLLM_NPU_EMULATOR_DEVICES="4k",
            VLLM_NPU_TRANSPORT_TIMEOUT="",
            OMP_NUM_THREADS="100000",
        )
        assert left.exists(), "doctor looks, and removes nothing"
    finally:
        left.unlink(missing_ok=True)
        in_use.unlink(missing_ok=True)
    return done, findings, left


def test_it_works_where_torch_cannot_be_imported(broken):
    done, findings, _ = broken
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    [finding] = of_check(findings, "import torch")
    assert finding["status"] == "problem"
    assert "libtorch_cpu.so: this torch is broken" in finding["what"]
    assert "packages/torch/__init__.py" in finding["what"]
    assert "PYTHONPATH" in finding["remedy"]


def test_leftovers_are_named_with_the_command_that_removes_them(broken):
    _, findings, left = broken
    [finding] = [each for each in of_check(findings, str(shared_memory.FOLDER)) if "left behind" in each["what"]]
    assert (finding["status"], left.name in finding["what"]) == ("warning", True)
    assert f".{os.getpid()}." not in finding["what"], "a file in use is none"
    assert finding["remedy"].endswith("-m vllm_npu.emulator clean")


@pytest.mark.parametrize(
    ("name", "status", "what", "remedy"),
    [
        ("VLLM_NPU_MOE_COM", "warning", "nothing reads it", "did you mean VLLM_NPU_MOE_COMM?"),
        ("VLLM_NPU_MOE_COMM", "problem", "'mc3'", "set it to auto, mc2, all2all, allgather or naive"),
        ("VLLM_NPU_EMULATOR_SOC", "ok", "'A3'", ""),
        ("VLLM_NPU_EMULATOR_DEVICES", "problem", "'4k'", "set it to a whole number from 0 to 1024"),
        ("VLLM_NPU_TRANSPORT_TIMEOUT", "ok", "''", ""),  # empty stands for the default
        ("VLLM_TARGET_DEVICE", "problem", "ignores platforms that are not its own", "unset VLLM_TARGET_DEVICE"),
        ("plugins", "warning", "other = other_platform:register", "VLLM_PLUGINS=vllm_npu"),
        ("cores", "warning", "OMP_NUM_THREADS=100000 is more than", "divided by the number of ranks"),
    ],
)
def test_a_finding_and_its_remedy(broken, name, status, what, remedy):
    [finding] = of_check(broken[1], name)
    assert finding["status"] == status
    assert what in finding["what"]
    assert remedy in finding["remedy"]


def test_every_problem_and_warning_has_a_remedy_and_all_is_printed(broken):
    done, findings, _ = broken
    for finding in findings:
        assert finding["status"] == "ok" or finding["remedy"], finding
        assert f"{finding['status']:<8} {finding['check']}: {finding['what']}\n" in done.stdout
        assert f"-> {finding['remedy']}\n" in done.stdout or not finding["remedy"]
    count = [sum(finding["status"] == status for finding in findings) for status in ("warning", "problem")]
    assert done.stdout.endswith(f"{len(findings)} findings, {count[0]} warnings, {count[1]} problems\n")


def test_torch_that_loads_torch_npu_without_cann_gets_the_hook_as_remedy(tmp_path):
    packages = write_packages(tmp_path / "packages", torch=TORCH_THAT_LOADS_TORCH_NPU, torch_npu=TORCH_NPU_WITHOUT_CANN)
    done, findings = run_doctor(tmp_path, PYTHONPATH=packages, TORCH_DEVICE_BACKEND_AUTOLOAD="1")
    assert done.returncode == 1
    [finding] = of_check(findings, "import torch")
    assert "torch loads torch_npu by itself, which fails without CANN: ImportError: libhccl.so" in finding["what"]
    assert " -m vllm_npu.emulator hook > " in finding["remedy"]
    assert ".pth" in finding["remedy"]


def test_the_emulated_device_beside_cann_is_a_problem(tmp_path):
    home = {"ASCEND_HOME_PATH": "/somewhere"}
    _, findings = run_doctor(tmp_path, **home)
    assert of_check(findings, "CANN") == [
        {"check": "CANN", "status": "ok", "what": "ASCEND_HOME_PATH=/somewhere", "remedy": ""}
    ]
    enabled = "import os; os.environ['VLLM_NPU_EMULATOR'] = '1'; from vllm_npu.cli import doctor as d; "
    command = [sys.executable, "-c", enabled + "print(next(d.check_cann()).status)"]
    alone = subprocess.run(command, env={**os.environ, **home}, capture_output=True, text=True, check=True)
    assert alone.stdout == "problem\n"


def test_plugins_that_vllm_is_told_to_leave_out(tmp_path):
    _, findings = run_doctor(tmp_path, VLLM_PLUGINS="other")
    [finding] = of_check(findings, "plugins")
    assert (finding["status"], finding["what"]) == ("warning", "VLLM_PLUGINS=other keeps vllm_npu out")


def test_starting_it_imports_neither_torch_nor_vllm():
    code = "import sys, vllm_npu.cli.doctor; sys.exit(bool({'torch', 'vllm', 'torch_npu'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_every_variable_has_a_rule_that_takes_its_default():
    assert set(doctor.VALUES) == set(envs.VARIABLES)
    for variable, fault in doctor.VALUES.items():
        assert variable.default == "" or fault(variable.default) is None


@pytest.mark.parametrize("text", ["0", "1", "2", "true", "0.5", "nan", "60", "-1", "soon", "1e3"])
def test_switches_and_seconds_are_judged_as_they_are_read(text, monkeypatch):
    for variable, read in (
        (envs.CUDA_PLATFORM, envs.Variable.read_flag),
        (envs.COUNT_COLLECTIVES, envs.Variable.read_flag),
        (envs.TRANSPORT_TIMEOUT, envs.Variable.read_seconds),
    ):
        monkeypatch.setenv(variable.name, text)
        try:
            read(variable)
            is_read = True
        except UnsupportedConfigError:
            is_read = False
        assert (doctor.VALUES[variable](text) is None) == is_read


def test_tables_are_read_without_importing_them():
    assert doctor.keys_of_table("plugin/compat/__init__.py", "SUPPORTED") == list(compat.SUPPORTED)
    assert doctor.keys_of_table("strategies.py", "STRATEGIES") == list(STRATEGIES)


@pytest.mark.parametrize(
    ("distribution", "version", "status"),
    [
        ("torch", "2.13.0+cpu", "ok"),
        ("torch", "2.10.0", "ok"),  # the extra ascend
        ("torch", "2.12.1", "warning"),
        ("torch", "2.9.1+cpu", "problem"),
        ("vllm-ascend", "0.23.0.post1", "ok"),
        ("vllm-ascend", "0.23.0", "warning"),
    ],
)
def test_versions_are_judged_by_the_pins_of_the_extras(distribution, version, status):
    finding = doctor.judged_version(distribution, version)
    assert finding.status == status
    assert (finding.remedy == "") == (status == "ok")


def test_an_unsupported_vllm_is_a_problem():
    problems = [finding for finding in doctor.check_pairs(["0.31.2"]) if finding.check == "vllm"]
    assert problems[0].what == "the plugin does not support vLLM 0.31.2"
    assert "0.32.*" in problems[0].remedy
    assert not [finding for finding in doctor.check_pairs(["0.32.1+cpu"]) if finding.check == "vllm"]
