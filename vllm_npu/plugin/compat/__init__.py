"""What differs between vLLM's release lines: one module a line, all with the same functions. See SUPPORTED."""

from functools import cache
from importlib import import_module
from types import ModuleType

import vllm

from vllm_npu.errors import UnsupportedConfigError

SUPPORTED = {
    "0.32": "vllm_npu.plugin.compat.v0_32",
}


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


@cache
def current() -> ModuleType:
    """The module of this environment's vLLM. Looked up once: every MoE layer of the original classes asks for it."""
    check_version()
    return import_module(SUPPORTED[release_line(vllm.__version__)])
