"""One of our all2all managers as vLLM's All2AllManagerBase, and what such a manager knows of vLLM's running step."""

from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.distributed.device_communicators.base_device_communicator import All2AllManagerBase
from vllm.forward_context import get_forward_context
from vllm.v1.worker.ubatching import dbo_current_ubatch_id

from vllm_npu.all2all import All2AllManager
from vllm_npu.errors import InvalidInputError
from vllm_npu.plugin.metrics import StepMetrics
from vllm_npu.strategies.table import AUTO
from vllm_npu.trust.step_lookout import StepLookout


class VllmAll2AllManager(All2AllManagerBase):
    """Offers `inner` through vLLM's class. The constructor is COLLECTIVE over the group, as that of vLLM's class.

    What vLLM's class does by itself stays: vLLM asks for no faults, since CudaMoEWorker looks for them.
    """

    def __init__(self, inner: All2AllManager, lookout: StepLookout, metrics: StepMetrics | None = None) -> None:
        super().__init__(inner.cpu_group)
        self.inner = inner
        self.lookout = lookout  # for ended ranks, while a step waits for the GPU
        self._metrics = metrics
        self._tokens_of_step: int | None = None  # of the step that runs

    def begin_step(self, num_tokens: int) -> None:
        """Count the step before this one. LOCAL. Host sync: no. num_tokens: scheduled on this rank, without padding."""
        taken = self.inner.end_step()
        if self._metrics is not None and taken is not None and self._tokens_of_step is not None:
            requested, strategy = taken
            is_fallback = requested not in (AUTO, strategy)
            self._metrics.end_step(requested, strategy, self._tokens_of_step, is_fallback=is_fallback)
        self._tokens_of_step = num_tokens

    def check_failed(self) -> None:
        """Raise TransportError if a step of this process failed because of another rank. LOCAL. Host sync: no."""
        self.lookout.check()
        self.inner.check_failed()

    def get_handle(self, kwargs: dict[str, Any]) -> Any:
        """Return the inner manager's handle for these sizes."""
        return self.inner.get_handle(kwargs)

    def dispatch(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: list[torch.Tensor] | None = None,
    ) -> tuple[Any, ...]:
        """Send this rank's tokens to the experts, as the inner manager does. COLLECTIVE."""
        return self.inner.dispatch(hidden_states, topk_weights, topk_ids, is_sequence_parallel, extra_tensors)

    def dispatch_router_logits(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: list[torch.Tensor] | None = None,
    ) -> tuple[Any, ...]:
        """Send this rank's tokens to experts that choose among themselves, as the inner manager does. COLLECTIVE."""
        return self.inner.dispatch_router_logits(hidden_states, router_logits, is_sequence_parallel, extra_tensors)

    def combine(self, hidden_states: torch.Tensor, is_sequence_parallel: bool = False) -> torch.Tensor:
        """Return this rank's tokens, as the inner manager does. COLLECTIVE."""
        return self.inner.combine(hidden_states, is_sequence_parallel)

    def allocate_combine_input(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        is_sequence_parallel: bool = False,
    ) -> torch.Tensor | None:
        """Return memory for the experts' rows that the inner manager moves in less time, or None. LOCAL. vLLM 0.32 calls it."""
        return self.inner.allocate_combine_input(shape, dtype)

    def combine_into_output(
        self, hidden_states: torch.Tensor, output: torch.Tensor, is_sequence_parallel: bool = False
    ) -> torch.Tensor:
        """Return this rank's tokens in `output`, without a copy where the inner manager can. COLLECTIVE. vLLM 0.32 calls it."""
        return self.inner.combine_into(hidden_states, output, is_sequence_parallel)

    def set_num_sms(self, num_sms: int) -> None:
        """Limit the multiprocessors of an exchange, where the inner manager can."""
        self.inner.set_num_sms(num_sms)

    def max_sms_used(self) -> int | None:
        """Return the multiprocessors of an exchange, or None where it may use all."""
        return self.inner.max_sms_used()

    def destroy(self) -> None:
        """Release what the inner manager opened, and end the lookout's thread."""
        self.lookout.close()
        self.inner.destroy()


class VllmStep:
    """vLLM's running step, by its forward context. The RunningStep of our managers in vLLM."""

    def key(self) -> object:
        """Return vLLM's token counts: vLLM makes a new object for each step and micro-batch."""
        return _dp_metadata()

    def num_tokens_across_dp(self) -> tuple[int, ...]:
        """Return the tokens of each DP rank."""
        return tuple(_dp_metadata().num_tokens_across_dp_cpu.tolist())

    def captured(self) -> bool:
        """Whether vLLM captures or replays a graph in this step.

        vLLM 0.32's newer runner captures full graphs in steps that it does not mark, so the stream counts too.
        """
        marked = get_forward_context().cudagraph_runtime_mode is not CUDAGraphMode.NONE
        return marked or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())

    def micro_batch(self) -> int:
        """Return the number of the calling thread's micro-batch in vLLM's dual batch overlap."""
        index: int = dbo_current_ubatch_id()
        return index


def rows_of_ranks() -> list[int]:
    """Return the rows that each rank of the exchanging group brings to the running step, as vLLM counts them. LOCAL."""
    return [int(each) for each in _dp_metadata().get_chunk_sizes_across_dp_rank()]


def _dp_metadata() -> Any:
    dp_metadata = get_forward_context().dp_metadata
    if dp_metadata is None:
        raise InvalidInputError("an all2all manager ran in a step that counts no tokens across data-parallel ranks")
    return dp_metadata
