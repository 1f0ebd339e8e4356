"""vLLM's CPU worker with what has to happen between the loading of a model and its first step, and after a failed step."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_npu.plugin import compat
from vllm_npu.plugin.compat.fault_tolerance import take_worker_sentinel


class CpuMoEWorker(CPUWorker):
    """vLLM starts this worker with EPLB, sequence parallelism, pipeline stages and fault_tolerance=retry, and its own worker
    otherwise."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        take_worker_sentinel()
        super().__init__(*args, **kwargs)

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's. An error names the ranks that caused it under fault_tolerance=retry. So do the next two methods."""
        with self._step():
            return super().execute_model(*args, **kwargs)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's."""
        with self._step():
            return super().sample_tokens(*args, **kwargs)

    def execute_dummy_batch(self) -> None:
        """As vLLM's."""
        with self._step():
            super().execute_dummy_batch()

    def _step(self) -> AbstractContextManager[None]:
        return nullcontext() if self.worker_sentinel is None else self.worker_sentinel.step()

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the model, keep rows whole where a layer would guess, make room for rows of another pipeline stage, and start
        EPLB if it is on.

        Raises UnsupportedConfigError if EPLB is on and the model's experts cannot be balanced.
        """
        release = compat.current()
        with release.unmovable_experts_explained():
            super().load_model(load_dummy_weights=load_dummy_weights)
        release.keep_rows_whole(self.model_runner)
        release.make_room_for_earlier_stage(self.model_runner)
        if self.parallel_config.enable_eplb:
            release.start_eplb(self.model_runner)
