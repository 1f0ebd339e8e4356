"""The code that depends on vLLM's release line: one module for each line in release_lines.SUPPORTED.

vLLM 0.32 is supported on CPUs. vLLM 0.23 is supported on NPUs beside vllm-ascend. Files that run on both call only functions
that both modules have, with the same arguments: groups, fused_moe, step_planner and worker_extension. Every other function
serves one line.
"""

from functools import cache
from importlib import import_module
from types import ModuleType

import vllm

from vllm_npu.plugin.release_lines import SUPPORTED, check_version, release_line


@cache
def current() -> ModuleType:
    """The module for the vLLM of this environment. Raises UnsupportedConfigError for any other release line."""
    check_version(vllm.__version__)
    return import_module(SUPPORTED[release_line(vllm.__version__)])
