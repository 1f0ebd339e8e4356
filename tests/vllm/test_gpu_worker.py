"""vLLM's GPU worker with the check of exchanges: where vLLM starts it, and that no output leaves before the check."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

pytest.importorskip("vllm")

from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu_worker import Worker

from vllm_npu.errors import TransportError
from vllm_npu.plugin.gpu.worker import CudaMoEWorker, checked


class RunningStep(AsyncModelRunnerOutput):
    """A step that fails while vLLM waits for its output, as a kernel that gives up does."""

    def __init__(self, failed: list[str]) -> None:
        self.failed = failed

    def get_output(self) -> ModelRunnerOutput:
        self.failed.append("rank 1 did not reach combine")
        return EMPTY_MODEL_RUNNER_OUTPUT


def test_the_output_of_a_failed_step_does_not_leave():
    failed: list[str] = []

    def check() -> None:
        if failed:
            raise TransportError("exchange", "ep", 0, failed[0])

    assert checked(None, check) is None
    assert checked(EMPTY_MODEL_RUNNER_OUTPUT, check) is EMPTY_MODEL_RUNNER_OUTPUT
    scopes: list[str] = []

    @contextmanager
    def wait() -> Iterator[None]:
        scopes.append("opened")
        yield
        scopes.append("closed")

    running = checked(RunningStep(failed), check, wait)  # no error yet: the step runs
    assert isinstance(running, AsyncModelRunnerOutput)
    with pytest.raises(TransportError, match="rank 1 did not reach combine"):
        running.get_output()
    assert scopes == ["opened", "closed"], "the lookout must know of the wait for the output"
    with pytest.raises(TransportError, match="rank 1 did not reach combine"):
        checked(EMPTY_MODEL_RUNNER_OUTPUT, check)


def test_every_method_of_vllms_worker_that_returns_an_output_is_checked():
    returning = {
        name
        for name, method in inspect.getmembers(Worker, inspect.isfunction)
        if "ModelRunnerOutput" in str(inspect.signature(method).return_annotation)
    }
    assert returning == {"execute_model", "sample_tokens"}
    assert returning | {"execute_dummy_batch"} <= set(vars(CudaMoEWorker))
