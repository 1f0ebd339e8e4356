"""Packaging of vllm_npu. Names, ranges of versions and tool settings are in pyproject.toml.

Installing needs neither vLLM nor CANN nor CUDA: nothing is compiled, and the package is not imported.
"""

import ast
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
VERSION_FILE = ROOT / "vllm_npu" / "__init__.py"


def read_version() -> str:
    """The string assigned to __version__, the one place where the version is written; reads, does not import."""
    for statement in ast.parse(VERSION_FILE.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "__version__" for target in statement.targets
        ):
            return str(ast.literal_eval(statement.value))
    raise SystemExit(f'{VERSION_FILE} assigns no __version__; add the line __version__ = "X.Y.Z"')


class BuildWithNativeSources(build_py):
    """Puts the C++ sources into wheels: they are compiled on the user's machine, for its torch."""

    def run(self):
        super().run()
        if not self.editable_mode:  # a checkout has them beside the package
            destination = Path(self.build_lib) / "vllm_npu" / "csrc_npu"
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / "csrc_npu", destination, ignore=ignored, dirs_exist_ok=True)


def read_readme() -> str:
    """README.md, or nothing where a source tree was copied without it."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


setup(
    version=read_version(),
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["vllm_npu", "vllm_npu.*"]),
    package_data={"vllm_npu": ["py.typed", "tools/fabrics.toml"]},
    cmdclass={"build_py": BuildWithNativeSources},
    zip_safe=False,
)
