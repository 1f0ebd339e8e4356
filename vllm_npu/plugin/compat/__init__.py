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


def check_version(version: str | None = None, *, on_gpus: bool = False) -> None:
    """Raise UnsupportedConfigError unless vLLM's version (this environment's by default) is of a supported line."""
    version = vllm.__version__ if version is None else version
    lines = CUDA_LINES if on_gpus else tuple(SUPPORTED)
    if release_line(version) not in lines:
        raise UnsupportedConfigError(
            f"vLLM {version} is not supported by vllm_npu{' on GPUs' if on_gpus else ''}; supported release lines: "
            f'{", ".join(lines)}. Install one of them, or keep vllm_npu out with VLLM_PLUGINS=""'
        )


@cache
def current() -> ModuleType:
    """The module of this environment's vLLM. Looked up once: every MoE layer of the original classes asks for it."""
    check_version()
    return import_module(SUPPORTED[release_line(vllm.__version__)])
