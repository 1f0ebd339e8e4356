"""EPLB over torch.distributed's batched point-to-point messages: NCCL, HCCL or gloo, as the group has it."""

from collections.abc import Sequence

from vllm_npu.eplb.communicator import EplbCommunicator
from vllm_npu.transport.base import SendRecv, Transport


class TorchDistEplbCommunicator(EplbCommunicator):
    """All messages in one batch, straight from and into the tensors. Host sync: with gloo only.

    With NCCL a collective of all ranks must come first, where not all have messages (torch's document of batch_isend_irecv);
    in vLLM that is the profiling run's. On NPUs take HcclEplbCommunicator, as CHOICE does: its messages are bounded.
    """

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport.group, transport.rank, transport.size)
        self._transport = transport

    def _exchange(self, messages: Sequence[SendRecv]) -> None:
        self._transport.send_recv(messages)
