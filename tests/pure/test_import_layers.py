"""scripts/check_import_layers.py: each rule catches what it is for, and the real tree keeps them all."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "check_import_layers.py"


def load_script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("check_import_layers", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


check = load_script().check


def run_check(*arguments: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def write_tree(root: Path, files: dict[str, str]) -> None:
    """Files of a small vllm_npu/ under root, by their path in the package."""
    for name, source in {"__init__.py": '__version__ = "0"\n', **files}.items():
        path = root / "vllm_npu" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")


def test_the_real_tree_keeps_the_rules():
    result = run_check(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert run_check().stdout == result.stdout, "without an argument the script checks its own checkout"


def test_a_tree_that_keeps_the_rules_passes(tmp_path):
    write_tree(
        tmp_path,
        {
            "errors.py": "from vllm_npu import __version__\n",
            "core/routing.py": "import torch\nfrom .. import errors\nfrom .topology import X\n",
            "core/topology.py": "from vllm_npu.core import routing\n",
            "transport/gloo.py": "import torch.distributed as dist\nfrom ..core.routing import X\n",
            "transport/hccl_direct/library.py": "import torch_npu\nfrom vllm_npu import native_build\n",
            "device/npu_ops.py": "from vllm_npu.transport import base\ndef load():\n    import torch_npu\n",
            "trust/mailboxes.py": "import socketserver\nfrom vllm_npu.transport import base\n",
            "native_build.py": "import subprocess\nfrom vllm_npu import errors\n",
            "child_processes.py": "import ctypes\n",
            "strategies/select.py": (
                "from typing import TYPE_CHECKING\n"
                "if TYPE_CHECKING:\n    from torch.distributed import ProcessGroup\n    import vllm\n"
                "from vllm_npu.transport import gloo\n"
            ),
            "all2all/agrs.py": "import torch.distributed\nfrom vllm_npu.strategies import select\n",
            "plugin/__init__.py": "import vllm_ascend\nfrom vllm.platforms import Platform\nfrom .cpu import experts\n",
            "plugin/cpu/experts.py": "from vllm_npu.plugin.cpu import eplb\nfrom vllm_npu.plugin import options\n",
            "plugin/compat/v0_32.py": "from vllm_npu.plugin.cpu import eplb\n",
            "tools/engines/offline_engine.py": "def f():\n    from vllm import LLM\n",
            "tools/doctor/machine_checks.py": "from vllm_npu import emulator, plugin\n",
            "emulator/__init__.py": "import ctypes\nfrom vllm_npu import envs\ndef enable():\n    import torch_npu\n",
            "emulator/build.py": "from vllm_npu import child_processes, native_build\n",
            "emulator/pytest_plugin.py": "import pytest\n",
            "emulator/rank_program.py": "def f():\n    import torch\n    torch.distributed.barrier()\n",
            "cli/__init__.py": "from vllm_npu import emulator, tools\nimport vllm_npu.plugin\n",
        },
    )
    assert check(tmp_path) == (22, [])


CAUGHT = {
    "upwards, absolute": ("core/routing.py", "\nfrom vllm_npu.plugin import options\n", 2, "core imports plugin"),
    "upwards, plain import": ("transport/base.py", "import vllm_npu.device.npu_ops\n", 1, "transport imports device"),
    "upwards, from the root": ("errors.py", "from vllm_npu import cli\n", 1, "errors imports cli"),
    "upwards, two dots": ("core/limits.py", "from ..strategies import pipeline\n", 1, "core imports strategies"),
    "upwards, three dots": ("transport/kernels/a.py", "from ...trust import trace\n", 1, "transport imports trust"),
    "upwards, in a function": ("envs.py", "def f():\n    from .core import topology\n", 2, "envs imports core"),
    "upwards, for types only": (
        "transport/base.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import vllm_npu.cli\n",
        3,
        "transport imports cli",
    ),
    "upwards, by name at run time": (
        "device/a.py",
        "import importlib\nimportlib.import_module('vllm_npu.plugin')\n",
        2,
        "device imports plugin",
    ),
    "tools in service": (
        "plugin/ascend/output_comparison.py",
        "def f():\n    from vllm_npu.tools.verification import cases\n",
        2,
        "plugin runs in service and imports tools, which never does",
    ),
    "a platform in a shared file of the plugin": (
        "plugin/groups.py",
        "def f():\n    from .cpu import experts\n",
        2,
        "imports plugin/cpu, which only it",
    ),
    "a platform in another": (
        "plugin/ascend/worker.py",
        "from vllm_npu.plugin import options\nfrom vllm_npu.plugin import gpu\n",
        2,
        "imports plugin/gpu, which only it",
    ),
    "the root imports the package": ("__init__.py", "from .errors import X\n", 1, "the package's root imports errors"),
    "vllm outside plugin": (
        "cli/demo.py",
        "def f():\n    from vllm import LLM\n",
        2,
        "imports vllm, which only plugin/",
    ),
    "vllm in another tool": ("tools/engines/a.py", "import vllm\n", 1, "imports vllm, which only plugin/"),
    "vllm_ascend outside plugin": ("device/a.py", "import vllm_ascend.ops\n", 1, "imports vllm_ascend, which"),
    "torch_npu in another device file": ("device/portable_ops.py", "import torch_npu\n", 1, "imports torch_npu, which"),
    "torch_npu for types only": (
        "plugin/a.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch_npu\n",
        3,
        "imports torch_npu, which",
    ),
    "torch.distributed imported": ("plugin/a.py", "import torch.distributed as dist\n", 1, "imports torch.distributed"),
    "torch.distributed from torch": ("core/a.py", "from torch import distributed\n", 1, "imports torch.distributed"),
    "torch.distributed by attribute": (
        "core/routing.py",
        "import torch\ndef f():\n    return torch.distributed.get_rank()\n",
        3,
        "imports torch.distributed",
    ),
    "torch.distributed elsewhere in trust": (
        "trust/agreement.py",
        "import torch.distributed\n",
        1,
        "imports torch.distributed",
    ),
    "torch in the root": ("__init__.py", "import torch\n", 1, "imports torch, and must be usable before torch"),
    "torch in errors": ("errors.py", "from torch import Tensor\n", 1, "imports torch, and must be usable before"),
    "torch in envs": ("envs.py", "def f():\n    import torch\n", 2, "imports torch, and must be usable before"),
    "torch in child_processes": ("child_processes.py", "import torch\n", 1, "imports torch, and must be usable before"),
    "torch in trace": ("trust/trace.py", "import torch\n", 1, "imports torch, and must be usable before"),
    "emulator imports the package": ("emulator/a.py", "from ..core import X\n", 1, "the emulator imports core"),
    "emulator imports a package": ("emulator/a.py", "import numpy\n", 1, "the emulator imports numpy"),
    "emulator imports pytest": ("emulator/a.py", "import pytest\n", 1, "the emulator imports pytest"),
    "emulator talks": ("emulator/a.py", "def f():\n    import torch.distributed\n", 2, "imports torch.distributed"),
    "emulator imports torch early": ("emulator/a.py", "import torch\n", 1, "imports torch at the top of the file"),
    "emulator is imported": (
        "plugin/a.py",
        "import vllm_npu.emulator\n",
        1,
        "imports the emulator, which only cli and tools may",
    ),
    "unknown module": ("helpers.py", "", 1, "helpers is in no layer; add it to LAYERS"),
    "unknown folder": ("extras/a.py", "", 1, "extras is in no layer; add it to LAYERS"),
    "a name that does not exist": ("core/limits.py", "import vllm_npu.nowhere.x\n", 1, "which does not exist"),
    "syntax": ("core/limits.py", "\ndef f(:\n", 2, "does not parse"),
}


@pytest.mark.parametrize(("file", "source", "line", "what"), CAUGHT.values(), ids=CAUGHT.keys())
def test_a_fault_is_reported_where_it_is(tmp_path, file, source, line, what):
    write_tree(tmp_path, {file: source})
    _, [report] = check(tmp_path)
    assert report.startswith(f"vllm_npu/{file}:{line}: ")
    assert what in report
    assert "; " in report, "the report says what to do"


def test_the_command_reports_every_fault_and_fails(tmp_path):
    write_tree(
        tmp_path, {"errors.py": "import torch\nimport vllm\n", "helpers.py": "", "core/routing.py": "import vllm\n"}
    )
    result = run_check(tmp_path)
    assert result.returncode == 1
    assert [line.split(": ")[0] for line in result.stdout.splitlines()] == [
        "vllm_npu/core/routing.py:1",
        "vllm_npu/errors.py:1",
        "vllm_npu/errors.py:2",
        "vllm_npu/helpers.py:1",
    ]


def test_a_folder_without_the_package_is_refused(tmp_path):
    result = run_check(tmp_path)
    assert result.returncode == 1
    assert "holds no Python file; give the folder that holds vllm_npu/" in result.stderr
