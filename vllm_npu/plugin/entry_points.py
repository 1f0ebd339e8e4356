"""Which of the installed vLLM plugins this process loads.

This file imports the standard library only, because vLLM calls it before it knows its platform.
"""

import os
from importlib.metadata import entry_points, version
from importlib.util import find_spec

PLUGIN_NAME = "vllm_npu"  # the name of both entry points of this package
ASCEND_PLATFORM = "ascend"  # the name of vllm-ascend's platform entry point
PLATFORMS = "vllm.platform_plugins"
GENERAL = "vllm.general_plugins"
VARIABLE = "VLLM_PLUGINS"


def vllm_ascend_is_installed() -> bool:
    """Whether vllm-ascend's platform and torch_npu are both installed."""
    return bool(entry_points(group=PLATFORMS, name=ASCEND_PLATFORM)) and find_spec("torch_npu") is not None


def vllm_ascend_version() -> str | None:
    """The version of vllm-ascend. None if it or torch_npu is not installed."""
    return version("vllm-ascend") if vllm_ascend_is_installed() else None


def is_loaded(name: str) -> bool:
    """Whether VLLM_PLUGINS lets vLLM load the plugin of this name. If the variable is not set, vLLM loads all."""
    chosen = os.environ.get(VARIABLE)
    return chosen is None or name in chosen.split(",")


def without(*names: str) -> str:
    """The text VLLM_PLUGINS=... that names all installed plugins except these."""
    installed = {point.name for group in (PLATFORMS, GENERAL) for point in entry_points(group=group)}
    return f"{VARIABLE}={','.join(sorted(installed - set(names)))}"


def conflict() -> str | None:
    """An error message if vLLM would load two platforms: one sentence on the fault, one on the remedy. Else None."""
    if not vllm_ascend_is_installed() or not is_loaded(PLUGIN_NAME) or not is_loaded(ASCEND_PLATFORM):
        return None
    return (
        "vLLM would load both vllm-ascend's platform and vllm_npu's, which is built on it, and vLLM accepts only one. For "
        f"vllm_npu on vllm-ascend, export {without(ASCEND_PLATFORM)}; for vllm-ascend alone, export {without(PLUGIN_NAME)}"
    )
