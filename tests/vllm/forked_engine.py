"""An offline engine whose processes are forks of its first one: vLLM is imported once, not once in each process.

vLLM's CPU platform asks for the spawn method, and an import of vLLM takes 9 s of a core. `vllm-npu demo` and `vllm-npu serve`
keep vLLM's own method; their tests show that it works. Everything else is the engine of vllm_npu.tools.engines.offline_engine.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_npu.tools.engines.offline_engine import main

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# For EngineSet. A fork keeps the number of OpenMP threads that its parent has read: with more threads than cores they only wait
# for each other, and a generation takes 20 s instead of 1 s.
FORKED: dict[str, Any] = {
    "module": "tests.vllm.forked_engine",
    "environment": {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
}


def import_vllm_and_choose_fork() -> None:
    """Import what the processes of an engine need, and let vLLM's CPU platform start them as forks."""
    import vllm.entrypoints.llm
    import vllm.v1.engine.core
    import vllm.v1.executor.multiproc_executor
    import vllm.v1.worker.cpu_model_runner
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.platforms.cpu import CpuPlatform

    choose_spawn = CpuPlatform.check_and_update_config.__func__

    def choose_fork(cls: type[CpuPlatform], vllm_config: "VllmConfig") -> None:
        choose_spawn(cls, vllm_config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        if vllm_config.parallel_config.world_size_across_dp > (os.cpu_count() or 1):
            # The workers of vLLM's own collectives over TP spin in shared memory. With more workers than cores they keep each
            # other from the cores, and every strategy takes twice the time. vLLM then goes over gloo, as between containers.
            CpuCommunicator._all_group_ranks_share_shm_group_name = lambda communicator: False

    CpuPlatform.check_and_update_config = classmethod(choose_fork)


if __name__ == "__main__":
    import_vllm_and_choose_fork()
    main()
