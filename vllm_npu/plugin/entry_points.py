"""Which of the installed vLLM plugins this process loads. Standard library only: vLLM asks before its platform is known."""

import os
from importlib.metadata import entry_points
from importlib.util import find_spec

PLUGIN_NAME = "vllm_npu"  # of both entry points
ASCEND_PLATFORM = "ascend"  # vllm-ascend's name of its platform
PLATFORMS = "vllm.platform_plugins"
GENERAL = "vllm.general_plugins"
VARIABLE = "VLLM_PLUGINS"


def vllm_ascend_is_installed() -> bool:
    """Whether vLLM would find vllm-ascend's platform, and torch_npu is there to run it."""
    return bool(entry_points(group=PLATFORMS, name=ASCEND_PLATFORM)) and find_spec("torch_npu") is not None


def is_loaded(name: str) -> bool:
    """Whether VLLM_PLUGINS lets vLLM load the plugin."""
    chosen = os.environ.get(VARIABLE)
    return chosen is None or name in chosen.split(",")


def without(*names: str) -> str:
    """VLLM_PLUGINS=... with all installed plugins but those named."""
    installed = {point.name for group in (PLATFORMS, GENERAL) for point in entry_points(group=group)}
    return f"{VARIABLE}={','.join(sorted(installed - set(names)))}"


def conflict() -> str | None:
    """What is wrong with the choice of plugins, and what to set; None: nothing."""
    if not vllm_ascend_is_installed() or not is_loaded(PLUGIN_NAME) or not is_loaded(ASCEND_PLATFORM):
        return None
    return (
        "vllm-ascend's platform and vllm_npu's, which is built on it, are both to be loaded, and vLLM takes one. For "
        f"vllm_npu on vllm-ascend, export {without(ASCEND_PLATFORM)}; for vllm-ascend alone, export {without(PLUGIN_NAME)}"
    )
