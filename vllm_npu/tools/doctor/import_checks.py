"""doctor's checks of torch, torch_npu and the libraries of csrc_npu. Other processes import torch and torch_npu.

Standard library only.
"""

import importlib.util
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from vllm_npu.emulator import build, cann, loader
from vllm_npu.errors import NativeBuildError
from vllm_npu.native_build import Component
from vllm_npu.tools.doctor.findings import OK, PROBLEM, WARNING, Finding
from vllm_npu.tools.doctor.installed import is_importable
from vllm_npu.tools.doctor.probes import probe_python
from vllm_npu.tools.doctor.version_checks import judged_cann
from vllm_npu.transport.hccl_direct.build import BUILD_COMMAND, TOKEN_OPS


def check_import_of_torch() -> Iterator[Finding]:
    if not is_importable("torch"):
        return  # check_versions reports it
    tried = probe_python("import torch; print(torch.__version__, torch.__file__)")
    if not tried.fault:
        yield Finding("import torch", OK, tried.last_line)
        return
    if is_importable("torch_npu") and cann.find() is None:
        without_autoload = probe_python("import torch", **{loader.AUTOLOAD_VARIABLE: "0"})
        if not without_autoload.fault:
            hook = Path(sysconfig.get_path("purelib")) / "zz_vllm_npu_emulator.pth"
            yield Finding(
                "import torch", PROBLEM,
                f"torch loads torch_npu by itself, which fails without CANN: {tried.fault}",
                f"{sys.executable} -m vllm_npu.emulator hook > {hook}   (or set {loader.AUTOLOAD_VARIABLE}=0)",
            )  # fmt: skip
            return
    spec = importlib.util.find_spec("torch")
    where = spec.origin or "a folder without __init__.py" if spec is not None else "nowhere"
    yield Finding(
        "import torch", PROBLEM, f"fails: {tried.fault} (found at {where})",
        "reinstall torch; if that path is not the installed one, look for it on PYTHONPATH and in the current folder",
    )  # fmt: skip


def check_import_of_torch_npu() -> Iterator[Finding]:
    if not is_importable("torch_npu"):
        yield Finding("import torch_npu", OK, "not installed: needed on Ascend and for the emulated device")
        return
    found = cann.find()
    if found is None and not is_built(build.DEVICE, build.library_folder):
        return  # check_emulator reports it
    enable = "" if found is not None else "import vllm_npu.emulator; vllm_npu.emulator.enable(); "
    device = "CANN" if found is not None else "the emulated device"
    tried = probe_python(
        f"{enable}import torch, torch_npu; from torch_npu.npu.utils import get_cann_version; "
        "print(torch.npu.device_count(), torch.npu.is_available(), get_cann_version() or 'unknown')"
    )
    if tried.fault:
        remedy = (
            "source CANN's set_env.sh"
            if found is not None
            else "python -m vllm_npu.emulator report names what is absent"
        )
        yield Finding("import torch_npu", PROBLEM, f"fails on {device}: {tried.fault}", remedy)
    else:
        num_devices, _, cann_version = tried.output.split()[-3:]
        yield Finding("import torch_npu", OK, f"on {device}, {num_devices} devices")
        if found is not None:
            yield judged_cann(cann_version)


def is_built(component: Component, library_folder: Callable[[], Path]) -> bool:
    """Whether the libraries of the component are in its folder."""
    try:
        return (library_folder() / component.product).is_file()
    except NativeBuildError:
        return False


def check_native(
    name: str, component: Component, library_folder: Callable[[], Path], command: str
) -> Iterator[Finding]:
    """Whether the component is built, or can be built by `command`."""
    if not is_importable("torch_npu"):
        yield Finding(name, OK, "needs torch_npu: install the extra emulator, or run scripts/setup.sh --emulator")
        return
    if is_built(component, library_folder):
        yield Finding(name, OK, f"built, in {library_folder()}")
        return
    missing_tools = []
    for find in (component.find_compiler, lambda: component.find_tool("cmake"), lambda: component.find_tool("ninja")):
        try:
            find()
        except NativeBuildError as error:
            missing_tools.append(str(error))
    yield from (Finding(name, WARNING, *fault.split("; ", 1)) for fault in missing_tools)
    if not missing_tools:
        yield Finding(name, WARNING, "not built", f"run {command}")


def check_emulator() -> Iterator[Finding]:
    return check_native("emulated device", build.DEVICE, build.library_folder, "python -m vllm_npu.emulator build")


def check_token_ops() -> Iterator[Finding]:
    return check_native("tokens on HCCL", TOKEN_OPS, TOKEN_OPS.library_folder, BUILD_COMMAND)
