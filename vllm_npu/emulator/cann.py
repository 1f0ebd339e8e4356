"""Search for a real CANN, which the emulated device must never replace, and the variables that CANN sets."""

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from vllm_npu.errors import UnsupportedConfigError

HOME_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
LIBRARY = "libascendcl.so"
EMULATED_HOME = Path(__file__).with_name("cann_home")
MARKER = "EMULATED.md"  # in the home folder of every installation of this package
USUAL_FOLDERS = (
    "/usr/local/Ascend/ascend-toolkit/latest/lib64",
    "/usr/local/Ascend/latest/lib64",
    "/usr/local/Ascend/cann/lib64",
    "/usr/local/lib",
    "/usr/lib",
    "/usr/lib64",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
)


def find(environ: Mapping[str, str] = os.environ) -> str | None:
    """The variable or library that shows that CANN is installed, or None."""
    for variable in HOME_VARIABLES:
        if environ.get(variable) and not Path(environ[variable], MARKER).is_file():
            return f"{variable}={environ[variable]}"
    folders = [folder for folder in environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    for folder in (*folders, *USUAL_FOLDERS):
        library = str(Path(folder, LIBRARY))
        if os.path.exists(library):  # unlike Path.exists, no error for a folder that this user may not read
            return library
    return None


def refuse_if_found(environ: Mapping[str, str] = os.environ) -> None:
    """Raise UnsupportedConfigError if a real CANN is installed."""
    found = find(environ)
    if found is not None:
        raise UnsupportedConfigError(
            f"a real CANN is here ({found}), and the emulated Ascend device would take its place; run on the real "
            "device, or hide CANN (unset its variables and LD_LIBRARY_PATH)"
        )


def set_variables(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables of CANN's set_env.sh that name folders. Torch_npu checks them, and other packages read them."""
    environ["ASCEND_HOME_PATH"] = environ["ASCEND_TOOLKIT_HOME"] = str(EMULATED_HOME)
    environ["ASCEND_OPP_PATH"] = str(EMULATED_HOME / "opp")
