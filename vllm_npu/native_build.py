"""Builds the C++ parts of csrc_npu, each once per state of its sources, torch and torch_npu. Runs without torch."""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from vllm_npu import envs
from vllm_npu.errors import NativeBuildError

COMPILERS = ("c++", "g++", "clang++")
JOBS = max(1, min(os.cpu_count() or 1, 8))
SHOWN_LOG_LINES = 40
BUILD_FILE = "CMakeLists.txt"  # of csrc_npu: what all components are built with


@dataclass(frozen=True, slots=True)
class Component:
    """A folder of csrc_npu, built by itself."""

    name: str  # of the folder
    what: str  # in messages
    product: str  # the library whose presence says that all are built
    error: type[NativeBuildError] = NativeBuildError
    install_hint: str = "in a checkout: pip install '.[emulator]'"  # brings what building needs

    def source_folder(self) -> Path:
        """csrc_npu: beside the package in a checkout, inside of it in an installation."""
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
        """Where a package lies, without importing it. Raises `error` if it is not installed."""
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise self.error(f"{self.what} needs {name}, which is not installed; {self.install_hint}")
        return Path(spec.origin).parent

    def package_version(self, name: str) -> str:
        """Raises `error` if the package is not installed, or only lies on the path of imports."""
        folder = self.package_folder(name)
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise self.error(
                f"{folder} is imported as {name} and belongs to no installed package; remove it, then {self.install_hint}"
            ) from None

    def find_tool(self, name: str) -> str:
        """A build tool: that of this environment, else the first on PATH."""
        found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
        if found is None:
            raise self.error(f"building {self.what} needs {name}, which is not there; {self.install_hint}")
        return found

    def find_compiler(self) -> str:
        """The C++ compiler: $CXX, else the first known name on PATH."""
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
        """Changes with everything that the libraries are made from."""
        digest = hashlib.sha256()
        folder = self.source_folder()
        for path in (folder / BUILD_FILE, *sorted((folder / self.name).rglob("*"))):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(folder)}\n".encode())
                digest.update(path.read_bytes())
        for name in ("torch", "torch_npu"):
            digest.update(f"{name} {self.package_version(name)}\n".encode())
        digest.update(f"{sys.implementation.cache_tag} {platform.machine()}\n".encode())
        return digest.hexdigest()[:16]

    def library_folder(self) -> Path:
        """Where the libraries are, or will be once they are built."""
        return environment_home() / f"{self.name}-{self.cache_key()}" / "lib"

    def build(self) -> Path:
        """The folder of the libraries, built first where they are not there yet. Several processes may call it at once.

        Raises `error` where something that building needs is missing, or the build fails.
        """
        folder = self.library_folder()
        if (folder / self.product).is_file():
            return folder
        try:
            import fcntl  # only on POSIX, and the other functions of this module run anywhere
        except ImportError as error:
            raise self.error(f"{self.what} can be built on Linux only ({error}); use a Linux machine") from error
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
        """Configures and builds in a temporary folder, then puts the libraries in place in one step."""
        compiler, cmake, ninja = self.find_compiler(), self.find_tool("cmake"), self.find_tool("ninja")
        log = destination.parent / f"{destination.name}.log"
        log.unlink(missing_ok=True)
        prefix = f"{destination.name}.building."
        for left_behind in destination.parent.glob(f"{prefix}*"):  # by a build that was killed: the lock is ours
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
            self._run_step([cmake, "--build", building, "--parallel", str(JOBS)], log)
            finished = Path(building, "finished")
            shutil.copytree(Path(building, "lib"), finished / "lib")
            shutil.rmtree(destination, ignore_errors=True)
            finished.rename(destination)

    def _run_step(self, command: list[str], log: Path) -> None:
        # The build runs this interpreter too: with the device enabled there, it would wait for the build.
        environment = {**os.environ, envs.EMULATOR.name: "0"}
        with log.open("a") as output:
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False, env=environment)
        code = done.returncode
        if code != 0:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_LOG_LINES:])
            raise self.error(
                f"building {self.what} failed ({' '.join(command[:2])} ...). If the log names a compiler that is too "
                f"old, set CXX to one of C++20; else report it with the whole log, {log}, whose end is:\n{tail}"
            )


def environment_home() -> Path:
    """The folder of everything that the project makes outside of the checkout, as scripts/setup.sh has it."""
    home = os.environ.get("VLLM_NPU_ENV_HOME")
    if home:
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm_npu"
