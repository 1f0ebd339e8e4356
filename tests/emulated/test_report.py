"""The faithfulness report: what it says of known functions, and that it reads the libraries rather than a list."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_npu import envs
from vllm_npu.emulator import build, report

pytestmark = pytest.mark.emulated

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "emulator.md"


def run_report(folder: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    written = folder / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "vllm_npu.emulator", "report", "--json", str(written)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done, json.loads(written.read_text()) if written.exists() else {}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], dict]:
    done, read = run_report(tmp_path_factory.mktemp("report"))
    assert done.returncode == 0, done.stderr
    return done, read


def needed(read: dict) -> dict[str, str]:
    return {name: state for names in read["needed"].values() for name, state in names.items()}


NEEDED = {
    "aclrtMalloc": "emulated",
    "aclrtMemcpyAsync": "emulated",
    "aclopSetAttrString": "no effect",
    "MsprofReportApi": "refused",  # a generated stub that returns an error
    "rtKernelLaunch": "refused",
    "aclmdlSetDump": "refused",
    "_ZN3atb13CreateContextEPPNS_7ContextE": "emulated",
}
LOOKED_UP = {
    "HcclAllReduce": "emulated",
    "HcclSetConfig": "no effect",
    "aclrtMallocAlign32": "emulated",
    "aclmdlRICaptureBegin": "emulated",
    "HcclCommResume": "absent",
    "aclnnMoeDistributeDispatchV4": "emulated",
    "aclnnMoeDistributeDispatchV4GetWorkspaceSize": "emulated",
    "aclnnThnnFusedLstmCell": "absent",
}
OPERATORS = {
    "npu::npu_moe_distribute_dispatch_v2": "provided",
    "npu::npu_moe_token_permute": "provided",
    "npu::npu_grouped_matmul": "in part",  # V4 and V5 of five versions
    "npu::npu_mla_prolog_v2": "not known from its name",
    "npu::npu_apply_adam_w": "absent",
}


@pytest.mark.parametrize(("name", "state"), NEEDED.items())
def test_what_is_needed_to_load(made, name, state):
    assert needed(made[1])[name] == state


@pytest.mark.parametrize(("name", "state"), LOOKED_UP.items())
def test_what_is_looked_up(made, name, state):
    assert made[1]["looked_up"][name] == state


@pytest.mark.parametrize(("name", "state"), OPERATORS.items())
def test_what_operators_can_run(made, name, state):
    assert made[1]["operators"][name]["state"] == state


def test_an_operators_functions_are_named(made):
    functions = made[1]["operators"]["npu::npu_grouped_matmul"]["functions"]
    assert functions["aclnnGroupedMatmulV5"] == "emulated"
    assert functions["aclnnGroupedMatmul"] == "absent"


CALL = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.aclGetRecentErrMsg.restype = ctypes.c_char_p
print("returned", getattr(library, sys.argv[2])(*[None] * 8), library.aclGetRecentErrMsg().decode())
"""


def test_what_is_reported_as_refused_fails_by_its_name_when_it_is_called(made):
    refused = [name for name, state in needed(made[1]).items() if state == "refused"]
    assert len(refused) > 10
    library = str(build.library_folder() / "libascendcl.so")
    for name in refused:
        command = [sys.executable, "-S", "-c", CALL, library, name]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert name in done.stdout + done.stderr, (name, done)
        assert "returned 0" not in done.stdout, (name, done)


def test_no_symbol_of_the_system_is_taken_for_one_of_cann(made):
    assert not {
        name for name in needed(made[1]) if name.startswith(("pthread_", "dl", "Py", "mem", "_ZN3c10", "_ZNSt"))
    }


def test_the_table_counts_what_the_json_lists(made):
    done, read = made
    library = read["needed"]["libtorch_npu.so"]
    row = next(line for line in done.stdout.splitlines() if line.startswith("needed by libtorch_npu.so"))
    states = [str(state) for state in report.State]
    assert row.split()[3:] == [str(len(library)), *(str(list(library.values()).count(state)) for state in states)]
    row = next(line for line in done.stdout.splitlines() if line.startswith("npu::*"))
    assert row.split()[-5] == str(len(read["operators"]))
    assert done.stdout.startswith(f"torch_npu {read['torch_npu']} with torch {read['torch']}, on ")
    assert "npu_grouped_matmul" in next(line for line in done.stdout.splitlines() if line.startswith("in part: "))


def test_the_document_has_the_counts_of_the_installed_torch_npu(made):
    done, read = made
    text = DOCUMENT.read_text(encoding="utf-8")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    documented = {row[1]: row[2:] for row in cells if row[0] == read["torch_npu"] and len(row) == 7}
    assert len(documented) >= 6, f"docs/emulator.md has no table of torch_npu {read['torch_npu']}"
    for label, counts in documented.items():
        row = next(line for line in done.stdout.splitlines() if line.startswith(label))
        assert row.removeprefix(label).split() == counts, f"docs/emulator.md: {label}: write what the report says"


def test_the_document_lists_every_variable_with_its_default():
    text = DOCUMENT.read_text(encoding="utf-8")
    for variable in envs.VARIABLES:
        if variable.name.startswith(envs.EMULATOR.name):
            assert f"| `{variable.name}` | {variable.default or 'empty'} | {variable.meaning} |\n" in text


def with_renamed_symbol(folder: Path, library: str, symbol: str) -> Path:
    """A copy of the libraries of which one has another name for a symbol."""
    shutil.copytree(build.library_folder(), folder)
    path = folder / library
    old = f"\0{symbol}\0".encode()
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, b"\0X" + old[2:]))
    return folder


def test_a_function_that_a_library_lacks_is_absent(tmp_path):
    libraries = with_renamed_symbol(tmp_path / "lib", "libhccl.so", "HcclAllReduce")
    done, read = run_report(tmp_path, **{envs.EMULATOR_LIBRARIES.name: str(libraries)})
    assert done.returncode == 0, done.stderr
    assert read["libraries"] == str(libraries)
    assert read["looked_up"]["HcclAllReduce"] == "absent"
    assert read["looked_up"]["HcclAllGather"] == "emulated"


def test_a_needed_function_that_is_absent_makes_it_fail(tmp_path):
    libraries = with_renamed_symbol(tmp_path / "lib", "libascendcl.so", "aclrtGetSocName")
    done, read = run_report(tmp_path, **{envs.EMULATOR_LIBRARIES.name: str(libraries)})
    assert needed(read)["aclrtGetSocName"] == "absent"
    assert "absent although libtorch_npu.so needs it, which therefore fails: aclrtGetSocName" in done.stdout
    assert (done.returncode, read["operators"]) == (1, {})
    assert "torch_npu cannot be imported on the emulated device" in read["import_fault"]


def test_missing_binutils_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    done, _ = run_report(tmp_path, PATH=str(tmp_path / "empty"))
    assert done.returncode == 2
    assert re.search("reads libraries with (nm|objdump), which is not on PATH; install the GNU binutils", done.stderr)
