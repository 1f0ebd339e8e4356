"""What differs between vLLM's release lines: one module a line, as release_lines.SUPPORTED names them.

0.32 is supported on CPUs, 0.23 on NPUs beside vllm-ascend, which exists for that line. The functions that modules for both
call (groups, fused_moe, step_planner) are in both, with the same arguments; the others serve one of the two.
"""

from functools import cache
from importlib import import_module
from types import ModuleType

import vllm

from vllm_npu.plugin.release_lines import SUPPORTED, check_version, release_line


@cache
def current() -> ModuleType:
    """The module of this environment's vLLM. Looked up once: every MoE layer of the original classes asks for it."""
    check_version(vllm.__version__)
    return import_module(SUPPORTED[release_line(vllm.__version__)])
