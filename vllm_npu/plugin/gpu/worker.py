"""vLLM's GPU worker, for exchanges whose kernels wait for other ranks: it checks them before a step's output leaves the worker.

A captured graph runs no Python, and vLLM's runners plan a step without a hook for each graph. The worker is the place that
every step passes on its way in and out.
"""

from collections.abc import Callable
from typing import Any

from vllm.distributed import get_ep_group
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu_worker import Worker

from vllm_npu.plugin.gpu.strategy_manager import StrategyAll2AllManager


class CudaMoEWorker(Worker):
    """vLLM starts this worker if a strategy of this package exchanges the tokens of an MoE model."""

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """Run a step. Raises TransportError if an earlier step failed, before anything of this step is queued."""
        check_exchanges()
        return checked(super().execute_model(*args, **kwargs), check_exchanges)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Sample the tokens of the step. Raises TransportError in place of tokens of a step that failed."""
        return checked(super().sample_tokens(*args, **kwargs), check_exchanges)

    def execute_dummy_batch(self, *args: Any, **kwargs: Any) -> None:
        """Take part in a step without requests. Raises TransportError if an earlier step failed."""
        check_exchanges()
        super().execute_dummy_batch(*args, **kwargs)


class CheckedOutput(AsyncModelRunnerOutput):
    """The output of a step that is still running. The check comes after the wait for it."""

    def __init__(self, output: AsyncModelRunnerOutput, check: Callable[[], None]) -> None:
        self._output = output
        self._check = check

    def get_output(self) -> ModelRunnerOutput:
        """Wait for the step, and return its output. Raises TransportError if the step failed."""
        output = self._output.get_output()
        self._check()
        return output


def checked(output: Any, check: Callable[[], None]) -> Any:
    """Return the output of vLLM's worker after `check`, or a CheckedOutput in place of an output that vLLM waits for later.

    Any other output that holds tokens has been waited for already, since its tokens lie in host memory.
    """
    if isinstance(output, AsyncModelRunnerOutput):
        return CheckedOutput(output, check)
    check()
    return output


def check_exchanges() -> None:
    """Raise TransportError if an exchange of this process gave up waiting for another rank. LOCAL. Host sync: no."""
    communicator = get_ep_group().device_communicator
    manager = None if communicator is None else communicator.all2all_manager
    if isinstance(manager, StrategyAll2AllManager):
        manager.check_failed()
