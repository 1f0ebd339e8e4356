"""vLLM's tensor-parallel group on CPUs as a transport of this package."""

import torch
from vllm.distributed.parallel_state import GroupCoordinator

from vllm_npu.transport.gloo import GlooTransport

SHARED_MEMORY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # those of vLLM's shm_allreduce, vLLM 0.32


class TensorParallelTransport(GlooTransport):
    """Runs an all-reduce by vLLM's own method, which uses shared memory between ranks of one machine. The rest runs on gloo."""

    def __init__(self, coordinator: GroupCoordinator) -> None:
        super().__init__(coordinator.device_group, "tp")
        self._coordinator = coordinator

    def _all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype not in SHARED_MEMORY_DTYPES:
            return super()._all_reduce(x)
        reduced: torch.Tensor = self._coordinator.all_reduce(x.clone())
        return reduced
