"""The libraries of the emulated device: those of VLLM_NPU_EMULATOR_LIBRARIES, or built once for each state of the sources."""

from pathlib import Path

from vllm_npu import envs
from vllm_npu.errors import EmulatorBuildError
from vllm_npu.native_build import Component

DEVICE = Component("emulator", "the emulated device", "libascendcl.so", EmulatorBuildError)


def missing() -> str | None:
    """The reason why the emulated device cannot be built or used here, or None."""
    try:
        DEVICE.package_folder("torch")
        DEVICE.package_folder("torch_npu")
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

    Raises EmulatorBuildError if a build tool is missing or the build fails.
    """
    if envs.EMULATOR_LIBRARIES.read_if_set() is None:
        return DEVICE.build()
    folder = library_folder()
    if not (folder / DEVICE.product).is_file():
        raise EmulatorBuildError(
            f"{envs.EMULATOR_LIBRARIES.name}={folder} holds no {DEVICE.product}; unset it to build them"
        )
    return folder
