"""vLLM's process groups as transports: opened once in a process, used by all layers."""

from functools import cache

import torch
from vllm.distributed import get_dp_group, get_ep_group, get_tp_group
from vllm.distributed.parallel_state import GroupCoordinator

from vllm_npu import envs
from vllm_npu.topology import ParallelTopology
from vllm_npu.transport import transport_over
from vllm_npu.transport.base import Groups, Transport
from vllm_npu.transport.gloo import GlooTransport
from vllm_npu.transport.recording import CollectiveCounter, record

SHARED_MEMORY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of vLLM's shm_allreduce (0.32)


class TensorParallelTransport(GlooTransport):
    """gloo, but all-reduce as vLLM does it for this group: over shared memory where all ranks are on one machine."""

    def __init__(self, coordinator: GroupCoordinator) -> None:
        super().__init__(coordinator.device_group, "tp")
        self._coordinator = coordinator

    def _all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype not in SHARED_MEMORY_DTYPES:
            return super()._all_reduce(x)
        reduced: torch.Tensor = self._coordinator.all_reduce(x.clone())
        return reduced


def _tensor_parallel_transport(tp: GroupCoordinator) -> Transport:
    transport = transport_over(tp.device_group, "tp")
    return TensorParallelTransport(tp) if isinstance(transport, GlooTransport) else transport


@cache
def collective_counter() -> CollectiveCounter | None:
    """This process's counter, or None where VLLM_NPU_COUNT_COLLECTIVES is 0."""
    return CollectiveCounter() if envs.COUNT_COLLECTIVES.read_flag() else None


@cache
def model_groups(*, expert_parallel: bool) -> Groups:
    """The groups of the model in this process. vLLM must have initialised its own. LOCAL."""
    tp, dp, ep = get_tp_group(), get_dp_group(), get_ep_group()
    topology = ParallelTopology(
        tp_rank=tp.rank_in_group,
        tp_size=tp.world_size,
        dp_rank=dp.rank_in_group,
        dp_size=dp.world_size,
        expert_parallel=expert_parallel,
    )
    counter = collective_counter()
    return Groups(
        topology,
        record(_tensor_parallel_transport(tp), counter),
        record(transport_over(dp.device_group, "dp"), counter),
        record(transport_over(ep.device_group, "ep"), counter),
    )


@cache
def vote_transport() -> Transport:
    """The CPU group over all ranks of the grid, for the vote on each step. Not counted: it moves no tokens."""
    return GlooTransport(get_ep_group().cpu_group, "ep-vote")
