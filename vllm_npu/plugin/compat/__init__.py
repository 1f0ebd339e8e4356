"""What differs between vLLM's release lines: one module a line. See SUPPORTED.

0.32 is supported on CPUs, 0.23 on NPUs beside vllm-ascend, which exists for that line. The functions that modules for both
call (groups, fused_moe, step_planner) are in both, with the same arguments; the others serve one of the two.
"""

from functools import cache
from importlib import import_module
from types import ModuleType

import vllm

from vllm_npu.errors import UnsupportedConfigError

SUPPORTED = {
    "0.23": "vllm_npu.plugin.compat.v0_23",
    "0.32": "vllm_npu.plugin.compat.v0_32",
}
BESIDE_VLLM_ASCEND = frozenset({"0.23"})  # the lines that are supported on NPUs, and there only

# On GPUs the layers stay vLLM's: what the CUDA platform calls is the same in these, so there is no module for it.
CUDA_LINES = ("0.23", "0.32")


def release_line(version: str) -> str:
    """'0.32.0+cpu' -> '0.32'."""
    return ".".join(version.split(".")[:2])


def check_version(version: str | None = None, *, on_gpus: bool = False) -> None:
    """Raise UnsupportedConfigError unless vLLM's version (this environment's by default) is of a supported line."""
    version = vllm.__version__ if version is None else version
    lines = CUDA_LINES if on_gpus else tuple(SUPPORTED)
    if release_line(version) not in lines:
        raise UnsupportedConfigError(
            f"vLLM {version} is not supported by vllm_npu{' on GPUs' if on_gpus else ''}; supported release lines: "
            f'{", ".join(lines)}. Install one of them, or keep vllm_npu out with VLLM_PLUGINS=""'
        )


def check_base(version: str | None = None, *, vllm_ascend_is_installed: bool) -> None:
    """Raise UnsupportedConfigError where vLLM's version needs vllm-ascend and lacks it, or has it and is not supported so."""
    version = vllm.__version__ if version is None else version
    if release_line(version) in BESIDE_VLLM_ASCEND and not vllm_ascend_is_installed:
        raise UnsupportedConfigError(
            f"vLLM {version} is supported on NPUs only, beside vllm-ascend, and vllm-ascend or torch_npu is not installed; "
            "install both, or on CPUs a vLLM of another line: "
            f"{', '.join(sorted(set(SUPPORTED) - BESIDE_VLLM_ASCEND))}"
        )
    if release_line(version) not in BESIDE_VLLM_ASCEND and vllm_ascend_is_installed:
        raise UnsupportedConfigError(
            f"vllm-ascend is installed beside vLLM {version}, and is supported beside {', '.join(sorted(BESIDE_VLLM_ASCEND))} "
            "only; uninstall vllm-ascend, or install that vLLM"
        )


@cache
def current() -> ModuleType:
    """The module of this environment's vLLM. Looked up once: every MoE layer of the original classes asks for it."""
    check_version()
    return import_module(SUPPORTED[release_line(vllm.__version__)])
