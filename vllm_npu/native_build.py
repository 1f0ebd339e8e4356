"""Builds the C++ parts of csrc_npu: once for each state of the sources, torch and torch_npu. Runs without torch, on Linux.

A wheel may bring the libraries (setup.py says how it is made). They are taken where the wheel was made for the installed
versions.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from vllm_npu import envs
from vllm_npu.child_processes import signal_when_parent_dies
from vllm_npu.errors import NativeBuildError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

COMPILERS = ("c++", "g++", "clang++")
JOBS = max(1, min(os.cpu_count() or 1, 8))
SHOWN_LOG_LINES = 40
BUILD_FILE = "CMakeLists.txt"  # in csrc_npu, for all components
OF_WHEEL = Path(__file__).resolve().parent / "libraries"  # setup.py writes it, in wheels with libraries


@dataclass(frozen=True, slots=True)
class Component:
    """One folder of csrc_npu. Components are built independently."""

    name: str  # of the folder in csrc_npu
    what: str  # name of the component in messages
    product: str  # file name of a library; the component is built if the file is there
    error: type[NativeBuildError] = NativeBuildError
    install_hint: str = "in a checkout: pip install '.[emulator]'"  # says how to install the build tools

    def source_folder(self) -> Path:
        """The folder csrc_npu: beside the package in a checkout, inside the package in an installation."""
        package = Path(__file__).resolve().parent
        for parent in (package.parent, package):
            folder = parent / "csrc_npu"
            if (folder / BUILD_FILE).is_file():
                return folder
        raise self.error(
            f"the C++ sources of {self.what} are neither beside nor in {package}; install vllm_npu from a checkout "
            "(pip install -e)"
        )

    def package_folder(self, name: str) -> Path:
        """The folder of an installed package, which is not imported. Raises `error` if the package is not installed."""
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise self.error(f"{self.what} needs {name}, which is not installed; {self.install_hint}")
        return Path(spec.origin).parent

    def package_version(self, name: str) -> str:
        """Version of an installed package. Raises `error` if Python finds a folder of that name and no installed package."""
        folder = self.package_folder(name)
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise self.error(
                f"{folder} is imported as {name} and belongs to no installed package; remove it, then {self.install_hint}"
            ) from None

    def find_tool(self, name: str) -> str:
        """Path of a build tool: first in this Python environment, then on PATH. Raises `error` if there is none."""
        found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
        if found is None:
            raise self.error(f"building {self.what} needs {name}, which is not installed; {self.install_hint}")
        return found

    def find_compiler(self) -> str:
        """Path of the C++ compiler: $CXX, or the first of COMPILERS on PATH. Raises `error` if there is none."""
        named = os.environ.get("CXX")
        for candidate in (named,) if named else COMPILERS:
            found = shutil.which(candidate)
            if found is not None:
                return found
        raise self.error(
            f"building {self.what} needs a C++ compiler, and there is no {named or ', '.join(COMPILERS)} on PATH; "
            "install one (on Debian and Ubuntu, the package g++), or set CXX to its path"
        )

    def cache_key(self) -> str:
        """Digest of the sources, the versions of torch and torch_npu, and the processor.

        A build of torch for CPUs (2.13.0+cpu) and one for CUDA have the same C++ interface. No library needs Python.
        """
        digest = hashlib.sha256()
        folder = self.source_folder()
        for path in (folder / BUILD_FILE, *sorted((folder / self.name).rglob("*"))):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(folder)}\n".encode())
                digest.update(path.read_bytes())
        for name in ("torch", "torch_npu"):
            digest.update(f"{name} {self.package_version(name).partition('+')[0]}\n".encode())
        digest.update(f"{platform.machine()}\n".encode())
        return digest.hexdigest()[:16]

    def library_folder(self) -> Path:
        """The folder of the libraries: the wheel's if it has them, else one that does not exist before the build."""
        name = f"{self.name}-{self.cache_key()}"
        of_wheel = OF_WHEEL / name / "lib"
        return of_wheel if of_wheel.is_dir() else environment_home() / name / "lib"

    def build(self) -> Path:
        """Build the libraries if they are missing, and return their folder. Several processes may call this at once.

        Raises `error` if a build tool is missing, the system has no file locks, or the build fails.
        """
        folder = self.library_folder()
        if (folder / self.product).is_file():
            return folder
        if fcntl is None:
            raise self.error(
                f"building {self.what} needs file locks, which Python has not on {sys.platform}; use Linux"
            )
        destination = folder.parent
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self.error(f"cannot make the folder of {self.what}: {error}; set VLLM_NPU_ENV_HOME") from error
        with (destination.parent / f"{destination.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / self.product).is_file():  # another process may have built them meanwhile
                start = time.monotonic()
                print(f"vllm_npu: building {destination} ...", file=sys.stderr)  # noqa: T201 - takes a minute
                self._compile(destination)
                print(f"vllm_npu: built in {time.monotonic() - start:.0f} s", file=sys.stderr)  # noqa: T201
        return folder

    def _compile(self, destination: Path) -> None:
        """Configure and build in a temporary folder, and then rename it to `destination`. The caller holds the lock."""
        compiler, cmake, ninja = self.find_compiler(), self.find_tool("cmake"), self.find_tool("ninja")
        log = destination.parent / f"{destination.name}.log"
        log.unlink(missing_ok=True)
        prefix = f"{destination.name}.building."
        for left_behind in destination.parent.glob(f"{prefix}*"):  # by killed builds
            shutil.rmtree(left_behind, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=destination.parent) as building:
            self._run_step(
                [
                    *(cmake, "-S", str(self.source_folder()), "-B", building, "-G", "Ninja"),
                    f"-DCOMPONENTS={self.name}",
                    f"-DCMAKE_MAKE_PROGRAM={ninja}",
                    f"-DCMAKE_CXX_COMPILER={compiler}",
                    f"-DPython3_EXECUTABLE={sys.executable}",
                    f"-DTORCH_NPU_DIR={self.package_folder('torch_npu')}",
                    f"-DTORCH_DIR={self.package_folder('torch')}",
                ],
                log,
            )
            self._run_step([ninja, "-C", building, "-j", str(JOBS)], log)
            finished = Path(building, "finished")
            shutil.copytree(Path(building, "lib"), finished / "lib")
            shutil.rmtree(destination, ignore_errors=True)
            finished.rename(destination)

    def _run_step(self, command: list[str], log: Path) -> None:
        # CMake starts this Python. With the emulated device enabled there, that Python would wait for this build.
        environment = {**os.environ, envs.EMULATOR.name: "0"}
        with log.open("a") as output:
            done = subprocess.run(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
                env=environment,
                preexec_fn=_end_with_parent,
            )
        if done.returncode != 0:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_LOG_LINES:])
            raise self.error(
                f"building {self.what} failed ({' '.join(command[:2])} ...). If the log says that the compiler is too old, "
                f"set CXX to a C++20 compiler. Otherwise report it with the whole log, {log}, whose end is:\n{tail}"
            )


def _end_with_parent() -> None:
    """In a new process: CMake or ninja, and the compilers that it started, end when this process is killed."""
    signal_when_parent_dies(signal.SIGTERM)


def environment_home() -> Path:
    """The folder for environments and built libraries: the same one as in scripts/setup.sh."""
    home = os.environ.get("VLLM_NPU_ENV_HOME")
    if home:
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm_npu"
