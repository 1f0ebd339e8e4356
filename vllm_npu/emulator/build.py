"""The libraries of the emulated device: those of VLLM_NPU_EMULATOR_LIBRARIES, or built once for each state of the sources."""

import runpy
from pathlib import Path

from vllm_npu import envs
from vllm_npu.errors import EmulatorBuildError
from vllm_npu.native_build import Component

DEVICE = Component("emulator", "the emulated device", "libascendcl.so", EmulatorBuildError)
# Minor versions of torch that the device is tested with, each with torch_npu of the same number, and the lock of each.
# docs/emulator.md says what was seen of each.
PAIRS = {"2.13": "requirements-emulator.lock", "2.10": "requirements-emulator-2.10.lock"}
# With these, torch's build for CUDA registers a key of its allocator that torch_npu registers too, and the process ends.
WITHOUT_CUDA = frozenset({"2.13"})


def refuse_other_pair() -> None:
    """Raise EmulatorBuildError if torch and torch_npu, as they are installed, are no pair of PAIRS that loads."""
    versions = {name: DEVICE.package_version(name) for name in ("torch", "torch_npu")}
    minors = {".".join(version.split(".")[:2]) for version in versions.values()}
    if len(minors) != 1 or not minors <= PAIRS.keys():
        installed = " and ".join(f"{name} {version}" for name, version in versions.items())
        supported = " or ".join(f"{minor} of both" for minor in PAIRS)
        raise EmulatorBuildError(
            f"the emulated device needs torch and torch_npu {supported}, and finds {installed}; {DEVICE.install_hint}"
        )
    version_file = DEVICE.package_folder("torch") / "version.py"  # torch itself would import torch_npu
    cuda = runpy.run_path(str(version_file)).get("cuda") if version_file.is_file() else None
    if cuda is not None and minors <= WITHOUT_CUDA:
        raise EmulatorBuildError(
            f"torch {versions['torch']} is the build for CUDA {cuda}, beside which torch_npu does not load; install the build "
            "for CPUs: set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels, and run pip install --force-reinstall torch=="
            f"{versions['torch'].partition('+')[0]}+cpu"
        )


def missing() -> str | None:
    """The reason why the emulated device cannot be built or used here, or None."""
    try:
        refuse_other_pair()
        if envs.EMULATOR_LIBRARIES.read_if_set() is None and not (library_folder() / DEVICE.product).is_file():
            DEVICE.find_compiler()
            DEVICE.find_tool("cmake")
            DEVICE.find_tool("ninja")
    except EmulatorBuildError as error:
        return str(error)
    return None


def library_folder() -> Path:
    """The folder of the libraries. It does not exist before the build."""
    named = envs.EMULATOR_LIBRARIES.read_if_set()
    return Path(named) if named else DEVICE.library_folder()


def build() -> Path:
    """Build the libraries if they are missing, and return their folder. Several processes may call this at once.

    Raises EmulatorBuildError if torch and torch_npu are no supported pair, a build tool is missing or the build fails.
    """
    if envs.EMULATOR_LIBRARIES.read_if_set() is None:
        refuse_other_pair()
        return DEVICE.build()
    folder = library_folder()
    if not (folder / DEVICE.product).is_file():
        raise EmulatorBuildError(
            f"{envs.EMULATOR_LIBRARIES.name}={folder} holds no {DEVICE.product}; unset it to build them"
        )
    return folder
