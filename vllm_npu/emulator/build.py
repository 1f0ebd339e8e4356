"""The emulated device's libraries: those of a folder that is named, else built once per state of the sources."""

import os
from pathlib import Path

from vllm_npu import envs
from vllm_npu.errors import EmulatorBuildError
from vllm_npu.native_build import Component

LIBRARIES_VARIABLE = envs.EMULATOR_LIBRARIES.name  # a folder of ready libraries, which is then used as it is
DEVICE = Component("emulator", "the emulated device", "libascendcl.so", EmulatorBuildError)

package_folder = DEVICE.package_folder
package_version = DEVICE.package_version
find_tool = DEVICE.find_tool
find_compiler = DEVICE.find_compiler


def missing() -> str | None:
    """Why the emulated device cannot be built or used here, or None."""
    try:
        package_folder("torch")
        package_folder("torch_npu")
        if LIBRARIES_VARIABLE not in os.environ and not (library_folder() / DEVICE.product).is_file():
            find_compiler()
            find_tool("cmake")
            find_tool("ninja")
    except EmulatorBuildError as error:
        return str(error)
    return None


def library_folder() -> Path:
    """Where the libraries are, or will be once they are built."""
    named = os.environ.get(LIBRARIES_VARIABLE)
    return Path(named) if named else DEVICE.library_folder()


def build() -> Path:
    """The folder of the libraries, built first where they are not there yet. Several processes may call it at once.

    Raises EmulatorBuildError where something that building needs is missing, or the build fails.
    """
    folder = library_folder()
    if LIBRARIES_VARIABLE not in os.environ:
        return DEVICE.build()
    if not (folder / DEVICE.product).is_file():
        raise EmulatorBuildError(f"{LIBRARIES_VARIABLE}={folder} holds no {DEVICE.product}; unset it to build them")
    return folder
