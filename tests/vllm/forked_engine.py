"""An offline engine whose processes are forks of its first one: vLLM is imported once, not once in each process.

vLLM's CPU platform asks for the spawn method, and an import of vLLM takes 9 s of a core. `vllm-npu demo` and `vllm-npu serve`
keep vLLM's own method; their tests show that it works. Everything else is the engine of vllm_npu.tools.engines.offline_engine.
"""

import os
from typing import TYPE_CHECKING

import vllm.entrypoints.llm
import vllm.v1.engine.core
import vllm.v1.executor.multiproc_executor
import vllm.v1.worker.cpu_model_runner
import vllm.v1.worker.cpu_worker  # noqa: F401 - what the forks would import
from vllm.platforms.cpu import CpuPlatform

from vllm_npu.tools.engines.offline_engine import main

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PATH = "tests.vllm.forked_engine"
_choose_spawn = CpuPlatform.check_and_update_config.__func__


def _choose_fork(cls: type[CpuPlatform], vllm_config: "VllmConfig") -> None:
    _choose_spawn(cls, vllm_config)
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"


if __name__ == "__main__":
    CpuPlatform.check_and_update_config = classmethod(_choose_fork)
    main()
