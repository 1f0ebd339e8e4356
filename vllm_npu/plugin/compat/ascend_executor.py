"""Ends the workers of an engine with dynamic EPLB when the engine ends by an error.

COMPAT(vllm-ascend >= 0.23): with DYNAMIC_EPLB or EXPERT_MAP_RECORD, vllm-ascend puts AscendMultiprocExecutor in the place of
vLLM's executor. Its workers are no daemons, so that they may start processes. Python's multiprocessing waits for such children
at the end of a process, and these workers wait for the engine's next call. So an engine whose start fails never ended. CAN
REMOVE when vllm-ascend's executor is shut down by itself.
"""

from multiprocessing import util

from vllm.v1.executor import multiproc_executor
from vllm_ascend.patch.platform.patch_multiproc_executor import AscendMultiprocExecutor

BEFORE_THE_WAIT = 0  # exit priority: multiprocessing calls finalizers of 0 and more before it waits for children


class EndingMultiprocExecutor(AscendMultiprocExecutor):
    """vllm-ascend's executor, which shuts down before its process waits for the workers."""

    def _init_executor(self) -> None:
        super()._init_executor()
        util.Finalize(None, self.shutdown, exitpriority=BEFORE_THE_WAIT)


def end_workers_with_the_engine() -> None:
    """Take the place of vllm-ascend's executor. A second call changes nothing."""
    multiproc_executor.MultiprocExecutor = EndingMultiprocExecutor
