#!/usr/bin/env python3
"""Checks that files of vllm_npu/ import only from lower layers, and outside packages only where that is allowed.

Usage: check_import_layers.py [ROOT]    ROOT is the folder that holds vllm_npu/ (default: this checkout)

Prints "file:line: fault; remedy" for each fault and exits with status 1, or prints a summary and exits with status 0. It reads
the sources and imports nothing. It needs the standard library only. An import in a function counts like one at the top of the
file.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "vllm_npu"

# Never runs in service. The layers below it run in service, and must not import it.
TOOLS = "tools"

# The top layer comes first. Each layer may import itself and the layers below it.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("cli", "__main__"),
    (TOOLS,),
    ("plugin",),
    ("all2all",),
    ("strategies", "eplb"),
    ("trust",),
    ("device",),
    ("transport",),
    ("core",),
    ("native_build",),
    ("errors", "envs", "child_processes"),
)
LAYER_OF = {module: depth for depth, layer in enumerate(LAYERS) for module in layer}

# Each of these folders of the plugin runs on one platform. No file of another platform or of several platforms imports it. Two
# places may: vLLM's entry points, and the code that depends on vLLM's release line.
PLATFORM_FOLDERS = ("plugin/cpu/", "plugin/gpu/", "plugin/ascend/")
PLATFORM_IMPORTERS = ("plugin/__init__.py", "plugin/compat/")

# In no layer: it runs before torch is imported, so it may import only these modules, which need the standard library alone.
EMULATOR = "emulator"
EMULATOR_MAY_IMPORT = frozenset({EMULATOR, "native_build", "child_processes", "errors", "envs"})
EMULATOR_IMPORTS_LISTED = ", ".join(sorted(EMULATOR_MAY_IMPORT - {EMULATOR}))
EMULATOR_MAY_IMPORT_OUTSIDE = {"emulator/pytest_plugin.py": "pytest"}
# These modules may import torch at the top: the emulator imports them in functions, after torch_npu has been imported.
EMULATOR_AFTER_TORCH = frozenset(
    f"emulator/ascend_stack/{name}.py"
    for name in ("aclnn", "custom_ops", "draft_inputs", "kv_blocks", "lora_ops", "slot_mapping")
)
EMULATOR_IMPORTERS = frozenset({"cli", TOOLS, "__main__", EMULATOR})


@dataclass(frozen=True, slots=True)
class Confined:
    """An outside package that only some files of the package may import."""

    places: tuple[str, ...]  # folders and files, relative to the package
    allowed_for_type_checking: bool


CONFINED = {
    "vllm": Confined(
        (
            "plugin/",
            "tools/engines/offline_engine.py",
            "tools/families/registry.py",
            "tools/hardware_checks.py",
            "tools/vllm_eplb.py",
        ),
        allowed_for_type_checking=True,
    ),
    "vllm_ascend": Confined(("plugin/",), allowed_for_type_checking=True),
    "torch_npu": Confined(
        ("device/npu_ops.py", "transport/hccl_direct/", "emulator/", "tools/hardware_checks.py"),
        allowed_for_type_checking=False,
    ),
    "torch.distributed": Confined(
        ("transport/", "eplb/", "all2all/", "tools/", "emulator/rank_program.py"),
        allowed_for_type_checking=True,
    ),
    "torch._C._distributed_c10d": Confined(("transport/", "eplb/", "all2all/"), allowed_for_type_checking=True),
}

# doctor imports these files, and starts where torch cannot be imported.
WITHOUT_TORCH = frozenset(
    {
        "__init__.py",
        "child_processes.py",
        "envs.py",
        "errors.py",
        "native_build.py",
        "strategies/__init__.py",
        "strategies/table.py",
        "transport/__init__.py",
        "transport/hccl_direct/__init__.py",
        "transport/hccl_direct/build.py",
        "trust/__init__.py",
        "trust/trace.py",
        "trust/trace_comparison.py",
    }
)


@dataclass(frozen=True, slots=True)
class Import:
    """One import: the absolute dotted name, and where it is."""

    name: str
    line: int
    for_type_checking: bool
    in_function: bool


class ImportCollector(ast.NodeVisitor):
    """Collects the imports of a file: statements, import_module("literal"), and attributes such as torch.distributed.x."""

    def __init__(self, package_of_file: list[str]) -> None:
        self.package_of_file = package_of_file  # a relative import with one dot begins here
        self.imports: list[Import] = []
        self._type_checking_depth = 0
        self._function_depth = 0

    def _add(self, name: str, line: int) -> None:
        self.imports.append(Import(name, line, self._type_checking_depth > 0, self._function_depth > 0))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level:
            parents = self.package_of_file[: len(self.package_of_file) - (node.level - 1)]
            module = ".".join([*parents, *([node.module] if node.module else [])])
        else:
            module = node.module or ""
        for alias in node.names:
            # "from torch import distributed" imports torch.distributed; "from vllm_npu import cli" the module cli.
            self._add(module if alias.name == "*" else f"{module}.{alias.name}", node.lineno)

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in {"import_module", "__import__"} and node.args:
            target = node.args[0]
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                self._add(target.value, node.lineno)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = dotted_name(node)
        if name is None:
            self.generic_visit(node)
        elif name.startswith("torch."):
            self._add(name, node.lineno)

    def visit_If(self, node: ast.If) -> None:
        condition = dotted_name(node.test)
        only_for_types = condition in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
        self._type_checking_depth += only_for_types
        for statement in node.body:
            self.visit(statement)
        self._type_checking_depth -= only_for_types
        self.visit(node.test)
        for statement in node.orelse:
            self.visit(statement)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._visit_function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._visit_function(node)

    def _visit_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._function_depth += 1
        self.generic_visit(node)
        self._function_depth -= 1


def dotted_name(node: ast.expr) -> str | None:
    """The text `a.b.c` of an expression that is such a chain of names; None for any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = dotted_name(node.value)
        return None if owner is None else f"{owner}.{node.attr}"
    return None


def is_within(name: str, package: str) -> bool:
    """Whether the dotted name is the package or a part of it."""
    return name == package or name.startswith(f"{package}.")


def layer_name(module: str) -> str:
    return ", ".join(LAYERS[LAYER_OF[module]])


def fault_of_own_import(importer: str, imported: str) -> str | None:
    """Why the top-level module `importer` may not import the top-level module `imported`; None: it may."""
    if importer == "__init__":
        return f"the package's root imports {imported}; it holds the version only, import {imported} where it is used"
    if imported == EMULATOR and importer not in EMULATOR_IMPORTERS:
        return "imports the emulator, which only cli and tools may; the rest of the package must run without it"
    if importer == EMULATOR and imported not in EMULATOR_MAY_IMPORT:
        return (
            f"the emulator imports {imported}, and may import only {EMULATOR_IMPORTS_LISTED} of this package; "
            "move the code that needs it out of emulator/"
        )
    if EMULATOR in (importer, imported) or LAYER_OF[imported] >= LAYER_OF[importer]:
        return None
    if imported == TOOLS:
        return f"{importer} runs in service and imports tools, which never does; move the code that both need to a lower layer"
    return (
        f"{importer} imports {imported} from a layer above its own ({layer_name(imported)} is above "
        f"{layer_name(importer)}); move the code down, or pass the object in"
    )


def fault_of_platform_import(file: str, imported: str) -> str | None:
    """What is wrong with a file of the plugin importing the dotted name, which may belong to another platform than the file."""
    for folder in PLATFORM_FOLDERS:
        if not is_within(imported, f"{PACKAGE}.{folder.rstrip('/').replace('/', '.')}"):
            continue
        if not file.startswith("plugin/") or file.startswith((folder, *PLATFORM_IMPORTERS)):
            return None
        return (
            f"imports {folder.rstrip('/')}, which only it, {' and '.join(PLATFORM_IMPORTERS)} may in plugin/; move the code to "
            "a file of all platforms, or pass the object in"
        )
    return None


def fault_of_outside_import(file: str, found: Import) -> str | None:
    """Why a file may not import a name from outside the package; None: it may. `file` is relative to the package."""
    for package, confined in CONFINED.items():
        if not is_within(found.name, package) or file.startswith(confined.places):
            continue
        if found.for_type_checking and confined.allowed_for_type_checking:
            continue
        remedy = "; move the code there, or pass the object in"
        if confined.allowed_for_type_checking:
            remedy += " (an import under TYPE_CHECKING is allowed)"
        return f"imports {package}, which only {', '.join(confined.places)} may{remedy}"
    if file in WITHOUT_TORCH and is_within(found.name, "torch"):
        return "imports torch, and must be usable before torch; move the code to a module that may import it"
    if file.startswith(f"{EMULATOR}/"):
        top = found.name.partition(".")[0]
        if top in {"torch", "torch_npu"} and not found.in_function and file not in EMULATOR_AFTER_TORCH:
            return f"imports {top} at the top of the file; the emulator loads before torch, import it in a function"
        allowed = {"torch", "torch_npu", EMULATOR_MAY_IMPORT_OUTSIDE.get(file)}
        if top not in allowed and top not in sys.stdlib_module_names:
            return f"the emulator imports {top}; it may import the standard library and {EMULATOR_IMPORTS_LISTED} only"
    return None


def faults_of_file(path: Path, package_root: Path) -> Iterator[tuple[int, str]]:
    relative = path.relative_to(package_root)
    importer = relative.parts[0].removesuffix(".py")
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except SyntaxError as error:
        yield error.lineno or 1, f"does not parse ({error.msg}); mend the syntax"
        return
    collector = ImportCollector([PACKAGE, *relative.parts[:-1]])
    collector.visit(tree)
    reported = set()
    for found in collector.imports:
        if found.name == PACKAGE:
            continue  # the root holds the version, which every file may read
        if is_within(found.name, PACKAGE):
            imported = found.name.split(".")[1]
            if imported not in LAYER_OF and imported != EMULATOR:
                if is_module(package_root, imported):
                    continue  # check() reports the unknown module once
                if found.name.count(".") == 1:
                    continue  # a name in the root: from vllm_npu import __version__
                fault: str | None = f"imports {found.name}, which does not exist; correct the name"
            else:
                fault = fault_of_own_import(importer, imported) or fault_of_platform_import(
                    relative.as_posix(), found.name
                )
        else:
            fault = fault_of_outside_import(relative.as_posix(), found)
        if fault is not None and (found.line, fault) not in reported:
            reported.add((found.line, fault))
            yield found.line, fault


def is_module(package_root: Path, name: str) -> bool:
    return (package_root / f"{name}.py").is_file() or any((package_root / name).rglob("*.py"))


def check(root: Path) -> tuple[int, list[str]]:
    """Return the number of files that were read, and one line for each fault."""
    package_root = root / PACKAGE
    files = sorted(path for path in package_root.rglob("*.py") if "__pycache__" not in path.parts)
    if not files:
        raise SystemExit(f"{package_root} holds no Python file; give the folder that holds {PACKAGE}/ as the argument")
    lines = []
    unknown: set[str] = set()
    for path in files:
        shown = path.relative_to(root).as_posix()
        module = path.relative_to(package_root).parts[0].removesuffix(".py")
        if module not in LAYER_OF and module not in {EMULATOR, "__init__"}:
            if module not in unknown:
                unknown.add(module)
                lines.append(f"{shown}:1: {module} is in no layer; add it to LAYERS in scripts/check_import_layers.py")
            continue
        lines += [f"{shown}:{line}: {fault}" for line, fault in faults_of_file(path, package_root)]
    return len(files), lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).resolve().parent.parent)
    root = parser.parse_args().root
    number_of_files, lines = check(root)
    if lines:
        print("\n".join(lines))
        print(f"{len(lines)} fault(s) in {number_of_files} files", file=sys.stderr)
        return 1
    print(f"import layers: {number_of_files} files, no fault")
    return 0


if __name__ == "__main__":
    sys.exit(main())
