"""vLLM's GPU worker, which tells our all2all manager when a step begins.

vLLM has no other place for this: its newer runner replays a full graph without a forward context and without any Python of the
layers.
"""

from typing import TYPE_CHECKING, Any

from vllm.distributed import get_ep_group
from vllm.v1.worker.gpu_worker import Worker

from vllm_npu.plugin.gpu.vllm_manager import VllmAll2AllManager

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


def begin_step(num_tokens: int) -> None:
    """Tell the manager of this process's EP group that a step begins. Does nothing if the manager is vLLM's. LOCAL.

    Raises TransportError where an exchange of an earlier step has failed on the GPU.
    """
    communicator = get_ep_group().device_communicator
    manager = None if communicator is None else communicator.all2all_manager
    if isinstance(manager, VllmAll2AllManager):
        manager.begin_step(num_tokens)


class CudaMoEWorker(Worker):
    """vLLM starts this worker where an option names an exchange, and its own worker otherwise."""

    def execute_model(self, scheduler_output: "SchedulerOutput") -> Any:
        """Begin the step, and run it."""
        if scheduler_output.total_num_scheduled_tokens > 0:
            begin_step(scheduler_output.total_num_scheduled_tokens)
        return super().execute_model(scheduler_output)

    def execute_dummy_batch(self) -> None:
        """Begin the step of a rank without requests, and run it."""
        begin_step(0)
        super().execute_dummy_batch()
