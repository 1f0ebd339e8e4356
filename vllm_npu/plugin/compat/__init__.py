"""What differs between vLLM's release lines: one module a line, all with the same functions. See SUPPORTED."""

from functools import cache
from importlib import import_module
from types import ModuleType

import vllm

from vllm_npu.errors import UnsupportedConfigError

SUPPORTED = {
    "0.32": "vllm_npu.plugin.compat.v0_32",
}

# On GPUs the layers stay vLLM's: what the CUDA platform calls is the same in these, so there is no module for it.
CUDA_LINES = ("0.23", "0.32")


def release_line(version: str) -> str:
    """'0.32.0+cpu' -> '0.32'."""
    return ".".join(version.split(".")[:2])


def check_version(version: str | None = None) -> None:
    """Raise UnsupportedConfigError unless vLLM's version (this environment's by default) is of a supported line."""
    version = vllm.__version__ if version is None else version
    if release_line(version) not in SUPPORTED:
        raise UnsupportedConfigError(
            f"vLLM {version} is not supported by vllm_npu; supported release lines: {', '.join(SUPPORTED)}. Install one of "
            'them, or keep vllm_npu out with VLLM_PLUGINS=""'
        )


def check_cuda_version(version: str | None = None) -> None:
    """As check_version, for the CUDA platform."""
    version = vllm.__version__ if version is None else version
    if release_line(version) not in CUDA_LINES:
        raise UnsupportedConfigError(
            f"vLLM {version} is not supported by vllm_npu's CUDA platform; supported release lines: {', '.join(CUDA_LINES)}. "
            "Install one of them, or unset VLLM_NPU_CUDA_PLATFORM"
        )


@cache
def current() -> ModuleType:
    """The module of this environment's vLLM. Looked up once: every MoE layer of the original classes asks for it."""
    check_version()
    return import_module(SUPPORTED[release_line(vllm.__version__)])
