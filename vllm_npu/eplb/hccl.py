"""EPLB over HCCL: through batches of a ProcessGroupHCCL (HcclTransport), or through HcclBatchSendRecv (PyHcclTransport)."""

from collections.abc import Sequence

import torch

from vllm_npu.core.limits import MIB
from vllm_npu.eplb.communicator import EplbCommunicator
from vllm_npu.transport.base import SendRecv, Transport

MAX_MESSAGE_BYTES = 32 * MIB
"""Largest size of one piece. Batches of whole expert tensors have hung on NPUs, so vllm-ascend #11282 splits them too. HCCL's
buffer for a group is 200 MiB by default."""


class HcclEplbCommunicator(EplbCommunicator):
    """Cuts messages into pieces of max_message_bytes. Sender and receiver cut alike. Host sync: no.

    The transport puts at most one piece to a rank, and one piece from that rank, into a batch.
    """

    def __init__(self, transport: Transport, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        super().__init__(transport.group, transport.rank, transport.size)
        self._transport = transport
        self._max_message_bytes = max_message_bytes

    def _exchange(self, messages: Sequence[SendRecv], buffers: Sequence[torch.Tensor]) -> None:
        self._transport.send_recv(
            [
                SendRecv(each.peer, piece, each.is_send)
                for each in messages
                for piece in each.tensor.split(self._max_message_bytes)
            ]
        )
