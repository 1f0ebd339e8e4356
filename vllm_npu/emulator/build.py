"""Builds the emulated device's libraries, once per state of the sources, torch and torch_npu."""

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vllm_npu import envs
from vllm_npu.errors import EmulatorBuildError

LIBRARIES_VARIABLE = envs.EMULATOR_LIBRARIES.name  # a folder of ready libraries, which is then used as it is
INSTALL_HINT = "pip install 'vllm-npu[emulator]'"
COMPILERS = ("c++", "g++", "clang++")
JOBS = max(1, min(os.cpu_count() or 1, 8))
SHOWN_LOG_LINES = 40


def source_folder() -> Path:
    """csrc_npu/emulator: beside the package in a checkout, inside of it in an installation."""
    package = Path(__file__).resolve().parent.parent
    for parent in (package.parent, package):
        folder = parent / "csrc_npu" / "emulator"
        if (folder / "CMakeLists.txt").is_file():
            return folder
    raise EmulatorBuildError(
        f"the emulator's C++ sources are neither beside nor in {package}; install vllm-npu from a checkout (pip install -e)"
    )


def package_folder(name: str) -> Path:
    """Where a package lies, without importing it. Raises EmulatorBuildError if it is not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise EmulatorBuildError(f"the emulated device needs {name}, which is not installed; {INSTALL_HINT}")
    return Path(spec.origin).parent


def package_version(name: str) -> str:
    """Raises EmulatorBuildError if the package is not installed, or only lies on the path of imports."""
    folder = package_folder(name)
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise EmulatorBuildError(
            f"{folder} is imported as {name} and belongs to no installed package; remove it, then {INSTALL_HINT}"
        ) from None


def find_tool(name: str) -> str:
    """A build tool: that of this environment, else the first on PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise EmulatorBuildError(f"building the emulated device needs {name}, which is not there; {INSTALL_HINT}")
    return found


def find_compiler() -> str:
    """The C++ compiler: $CXX, else the first known name on PATH."""
    named = os.environ.get("CXX")
    for candidate in (named,) if named else COMPILERS:
        found = shutil.which(candidate)
        if found is not None:
            return found
    raise EmulatorBuildError(
        f"building the emulated device needs a C++ compiler, and there is no {named or ', '.join(COMPILERS)} on PATH; "
        "install one (on Debian and Ubuntu, the package g++), or set CXX to its path"
    )


def missing() -> str | None:
    """Why the emulated device cannot be built or used here, or None."""
    try:
        package_folder("torch")
        package_folder("torch_npu")
        if LIBRARIES_VARIABLE not in os.environ and not (library_folder() / "libascendcl.so").is_file():
            find_compiler()
            find_tool("cmake")
            find_tool("ninja")
    except EmulatorBuildError as error:
        return str(error)
    return None


def cache_key() -> str:
    """Changes with everything that the libraries are made from."""
    digest = hashlib.sha256()
    folder = source_folder()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(folder)}\n".encode())
            digest.update(path.read_bytes())
    for name in ("torch", "torch_npu"):
        digest.update(f"{name} {package_version(name)}\n".encode())
    digest.update(f"{sys.implementation.cache_tag} {os.uname().machine}\n".encode())
    return digest.hexdigest()[:16]


def environment_home() -> Path:
    """The folder of everything that the project makes outside of the checkout, as scripts/setup.sh has it."""
    home = os.environ.get("VLLM_NPU_ENV_HOME")
    if home:
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm_npu"


def library_folder() -> Path:
    """Where the libraries are, or will be once they are built."""
    named = os.environ.get(LIBRARIES_VARIABLE)
    return Path(named) if named else environment_home() / f"emulator-{cache_key()}" / "lib"


def run_step(command: list[str], log: Path) -> None:
    # The build runs this interpreter too: with the device enabled there, it would wait for the build.
    environment = {**os.environ, envs.EMULATOR.name: "0"}
    with log.open("a") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False, env=environment)
    code = done.returncode
    if code != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_LOG_LINES:])
        raise EmulatorBuildError(
            f"building the emulated device failed ({' '.join(command[:2])} ...). If the log names a compiler that is too "
            f"old, set CXX to one of C++17; else report it with the whole log, {log}, whose end is:\n{tail}"
        )


def compile_libraries(destination: Path) -> None:
    """Configures and builds in a temporary folder, then puts the libraries in place in one step."""
    compiler, cmake, ninja = find_compiler(), find_tool("cmake"), find_tool("ninja")
    log = destination.parent / f"{destination.name}.log"
    log.unlink(missing_ok=True)
    prefix = f"{destination.name}.building."
    for left_behind in destination.parent.glob(f"{prefix}*"):  # by a build that was killed: the lock is ours
        shutil.rmtree(left_behind, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=destination.parent) as building:
        run_step(
            [
                *(cmake, "-S", str(source_folder()), "-B", building, "-G", "Ninja"),
                f"-DCMAKE_MAKE_PROGRAM={ninja}",
                f"-DCMAKE_CXX_COMPILER={compiler}",
                f"-DPython3_EXECUTABLE={sys.executable}",
                f"-DTORCH_NPU_DIR={package_folder('torch_npu')}",
                f"-DTORCH_DIR={package_folder('torch')}",
            ],
            log,
        )
        run_step([cmake, "--build", building, "--parallel", str(JOBS)], log)
        finished = Path(building, "finished")
        shutil.copytree(Path(building, "lib"), finished / "lib")
        shutil.rmtree(destination, ignore_errors=True)
        finished.rename(destination)


def build() -> Path:
    """The folder of the libraries, built first where they are not there yet. Several processes may call it at once.

    Raises EmulatorBuildError where something that building needs is missing, or the build fails.
    """
    folder = library_folder()
    if (folder / "libascendcl.so").is_file():
        return folder
    if LIBRARIES_VARIABLE in os.environ:
        raise EmulatorBuildError(f"{LIBRARIES_VARIABLE}={folder} holds no libascendcl.so; unset it to build them")
    destination = folder.parent
    destination.parent.mkdir(parents=True, exist_ok=True)
    with (destination.parent / f"{destination.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "libascendcl.so").is_file():  # another process may have built them meanwhile
            start = time.monotonic()
            print(f"vllm_npu emulator: building {destination} ...", file=sys.stderr)
            compile_libraries(destination)
            print(f"vllm_npu emulator: built in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return folder
