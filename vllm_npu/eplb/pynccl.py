"""EPLB by ncclSend and ncclRecv in one NCCL group. It needs no torch.distributed, which vLLM's elastic groups do not have."""

from collections.abc import Sequence
from typing import Protocol

import torch

from vllm_npu.eplb.communicator import EplbCommunicator
from vllm_npu.errors import TransportError
from vllm_npu.transport.base import SendRecv


class GroupedPointToPoint(Protocol):
    """The part of vLLM's PyNcclCommunicator that is used here. The plugin passes one in. Tensors are on its device."""

    rank: int
    world_size: int

    def group_start(self) -> None: ...
    def group_end(self) -> None: ...
    def send(self, tensor: torch.Tensor, dst: int, stream: torch.Stream | None = None) -> None: ...
    def recv(self, tensor: torch.Tensor, src: int, stream: torch.Stream | None = None) -> None: ...


class PyNcclEplbCommunicator(EplbCommunicator):
    """Sends all messages as bytes, so any dtype, in one ncclGroup that execute() opens and closes. Host sync: no."""

    def __init__(self, pynccl: GroupedPointToPoint, group: str = "ep") -> None:
        super().__init__(group, pynccl.rank, pynccl.world_size)
        self._pynccl = pynccl

    def _exchange(self, messages: Sequence[SendRecv], buffers: Sequence[torch.Tensor]) -> None:
        try:
            self._pynccl.group_start()
            try:
                for message in messages:
                    call = self._pynccl.send if message.is_send else self._pynccl.recv
                    call(message.tensor, message.peer, stream=self._stream)
            finally:
                self._pynccl.group_end()
        except RuntimeError as error:
            raise TransportError("execute", self.group, self.rank, str(error)) from error
