"""EPLB over HCCL: a ProcessGroupHCCL's batches (HcclTransport), or HcclBatchSendRecv itself (PyHcclTransport)."""

from collections.abc import Sequence

from vllm_npu.core.limits import MIB
from vllm_npu.eplb.communicator import EplbCommunicator
from vllm_npu.transport.base import SendRecv, Transport

MAX_MESSAGE_BYTES = 32 * MIB
"""Of one piece. Batches of whole expert tensors have hung on NPUs (vllm-ascend #11282, which splits them too); HCCL's buffer
for a group is 200 MiB by default."""


class HcclEplbCommunicator(EplbCommunicator):
    """Messages in pieces, which both ends cut alike; the transport puts at most one piece to a rank, and one from it, into a
    batch. Host sync: no."""

    def __init__(self, transport: Transport, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        super().__init__(transport.group, transport.rank, transport.size)
        self._transport = transport
        self._max_message_bytes = max_message_bytes

    def _exchange(self, messages: Sequence[SendRecv]) -> None:
        self._transport.send_recv(
            [
                SendRecv(each.peer, piece, each.is_send)
                for each in messages
                for piece in each.tensor.split(self._max_message_bytes)
            ]
        )
