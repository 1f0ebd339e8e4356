"""EPLB over torch.distributed's batched point-to-point messages, with the group's backend: NCCL, HCCL or gloo."""

from collections.abc import Sequence

import torch

from vllm_npu.eplb.communicator import EplbCommunicator
from vllm_npu.transport.base import SendRecv, Transport


class TorchDistEplbCommunicator(EplbCommunicator):
    """Moves all messages in one batch, from and into the tensors without copies. Host sync: with gloo only.

    With NCCL a collective of all ranks must run before a batch in which some rank has no messages (documentation of
    torch.distributed.batch_isend_irecv). In vLLM the profiling run has one. On NPUs use HcclEplbCommunicator, as CHOICE does,
    since its messages have a bounded size.
    """

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport.group, transport.rank, transport.size)
        self._transport = transport

    def _exchange(self, messages: Sequence[SendRecv], buffers: Sequence[torch.Tensor]) -> None:
        self._transport.send_recv(messages)
