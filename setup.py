"""Packaging of vllm_npu. Names, ranges of versions and tool settings are in pyproject.toml.

Installing needs neither vLLM nor CANN nor CUDA: nothing is compiled, and the package is not imported.

VLLM_NPU_WHEEL_WITH_LIBRARIES=1 pip wheel --no-deps --no-build-isolation . makes a wheel for this kind of machine. It brings the
libraries of the emulated Ascend device and the token operators, built for the installed torch and torch_npu, and the .pth file
of `python -m vllm_npu.emulator hook`. With other versions of the two, they are built on the user's machine, as with a wheel
without libraries.
"""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
VERSION_FILE = ROOT / "vllm_npu" / "__init__.py"
WITH_LIBRARIES = os.environ.get("VLLM_NPU_WHEEL_WITH_LIBRARIES") == "1"
NATIVE_BUILDS = (["vllm_npu.emulator", "build"], ["vllm_npu.transport.hccl_direct.build"])  # each prints a folder
PTH_FILE = "zz_vllm_npu_emulator.pth"  # sorts after the .pth files of other environments' packages


def read_version() -> str:
    """The string assigned to __version__, the one place where the version is written; reads, does not import."""
    for statement in ast.parse(VERSION_FILE.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "__version__" for target in statement.targets
        ):
            return str(ast.literal_eval(statement.value))
    raise SystemExit(f'{VERSION_FILE} assigns no __version__; add the line __version__ = "X.Y.Z"')


def output_of(command: list[str]) -> str:
    """What a module of this source tree prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(
        [sys.executable, "-m", *command], env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(
            f"a wheel with libraries needs what `python -m {' '.join(command)}` needs; its message is above"
        )
    return done.stdout.strip()


class BuildWithNativeSources(build_py):
    """Puts the C++ sources into wheels: they are compiled on the user's machine, for its torch. With WITH_LIBRARIES, puts the
    built libraries there too."""

    def run(self):
        super().run()
        if not self.editable_mode:  # a checkout has them beside the package
            destination = Path(self.build_lib) / "vllm_npu" / "csrc_npu"
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / "csrc_npu", destination, ignore=ignored, dirs_exist_ok=True)
            if WITH_LIBRARIES:
                self.put_libraries(Path(self.build_lib))

    @staticmethod
    def put_libraries(destination):
        for command in NATIVE_BUILDS:
            built = Path(output_of(command))  # .../NAME-KEY/lib
            target = destination / "vllm_npu" / "libraries" / built.parent.name / built.name
            shutil.copytree(built, target, dirs_exist_ok=True)
        (destination / PTH_FILE).write_text(output_of(["vllm_npu.emulator", "hook"]) + "\n", encoding="utf-8")


class WheelOfThisMachine(bdist_wheel):
    """Names the wheel after the machine, if it has libraries. They need no Python of one version."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = not WITH_LIBRARIES

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2]) if WITH_LIBRARIES else super().get_tag()


def read_readme() -> str:
    """README.md, or nothing where a source tree was copied without it."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


setup(
    version=read_version(),
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["vllm_npu", "vllm_npu.*"]),
    package_data={
        "vllm_npu": ["py.typed", "tools/fabrics.toml", "emulator/cann_home/*.md", "emulator/cann_home/*/*.md"]
    },
    cmdclass={"build_py": BuildWithNativeSources, "bdist_wheel": WheelOfThisMachine},
    zip_safe=False,
)
