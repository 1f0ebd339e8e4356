"""vLLM's GPU worker, for exchanges of this package: it counts steps, and checks them before their output leaves the worker.

A captured graph runs no Python, and vLLM's runners plan a step without a hook for each graph. The worker is the place that
every step passes on its way in and out.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from vllm.distributed import get_ep_group
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu_worker import Worker

from vllm_npu.plugin.gpu.layer_check import check_layers
from vllm_npu.plugin.gpu.vllm_manager import VllmAll2AllManager
from vllm_npu.plugin.options import Options, topology_of

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

Wait = Callable[[], AbstractContextManager[None]]
"""Returns the scope in which a thread waits for the GPU."""


class CudaMoEWorker(Worker):
    """vLLM starts this worker if an option names an exchange of this package, and its own worker otherwise."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, and check its MoE layers. Raises UnsupportedConfigError for layers that the exchange cannot carry."""
        super().load_model(*args, **kwargs)
        options = Options.of(self.vllm_config)
        check_layers(self.get_model().modules(), options, topology_of(self.vllm_config.parallel_config))

    def execute_model(self, scheduler_output: "SchedulerOutput") -> Any:
        """Run a step. Raises TransportError if an earlier step failed, before anything of this step is queued."""
        check_exchanges()
        if scheduler_output.total_num_scheduled_tokens > 0:
            count_step(scheduler_output.total_num_scheduled_tokens)
        with waiting():
            output = super().execute_model(scheduler_output)
        return checked(output, check_exchanges, waiting)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Sample the tokens of the step. Raises TransportError in place of tokens of a step that failed."""
        with waiting():
            output = super().sample_tokens(*args, **kwargs)
        return checked(output, check_exchanges, waiting)

    def execute_dummy_batch(self, *args: Any, **kwargs: Any) -> None:
        """Take part in a step without requests. Raises TransportError if an earlier step failed."""
        check_exchanges()
        count_step(0)
        with waiting():
            super().execute_dummy_batch(*args, **kwargs)


class CheckedOutput(AsyncModelRunnerOutput):
    """The output of a step that is still running. The check comes after the wait for it."""

    def __init__(self, output: AsyncModelRunnerOutput, check: Callable[[], None], wait: Wait) -> None:
        self._output = output
        self._check = check
        self._wait = wait

    def get_output(self) -> ModelRunnerOutput:
        """Wait for the step, and return its output. Raises TransportError if the step failed."""
        with self._wait():
            output = self._output.get_output()
        self._check()
        return output


def checked(output: Any, check: Callable[[], None], wait: Wait = nullcontext) -> Any:
    """Return the output of vLLM's worker after `check`, or a CheckedOutput in place of an output that vLLM waits for later.

    Any other output that holds tokens has been waited for already, since its tokens lie in host memory.
    """
    if isinstance(output, AsyncModelRunnerOutput):
        return CheckedOutput(output, check, wait)
    check()
    return output


def check_exchanges() -> None:
    """Raise TransportError if a step of this process failed because of another rank. LOCAL. Host sync: no."""
    if (manager := _our_manager()) is not None:
        manager.check_failed()


def count_step(num_tokens: int) -> None:
    """Tell the manager that a step with so many scheduled tokens begins. LOCAL."""
    if (manager := _our_manager()) is not None:
        manager.begin_step(num_tokens)


def waiting() -> AbstractContextManager[None]:
    """Let the lookout know that this thread waits inside for the GPU, and so for other ranks. LOCAL."""
    manager = _our_manager()
    return nullcontext() if manager is None else manager.lookout.waiting()


def _our_manager() -> VllmAll2AllManager | None:
    communicator = get_ep_group().device_communicator
    manager = None if communicator is None else communicator.all2all_manager
    return manager if isinstance(manager, VllmAll2AllManager) else None
