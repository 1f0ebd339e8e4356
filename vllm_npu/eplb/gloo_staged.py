"""EPLB through CPU memory: for devices whose own links other collectives use at the same time."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest

import torch

from vllm_npu.core.limits import MIB
from vllm_npu.eplb.communicator import EplbCommunicator
from vllm_npu.errors import InvalidInputError
from vllm_npu.transport.base import SendRecv, Transport

STAGING_BYTES = 64 * MIB


class GlooStagedEplbCommunicator(EplbCommunicator):
    """Copies to CPU memory (pinned beside an accelerator), from there over gloo, and back to the device.

    However much is queued, staging_bytes of CPU memory hold it: one half for what goes out, one for what comes in. Small
    tensors share a piece. Host sync: yes, a few for each piece.
    """

    def __init__(
        self,
        transport: Transport,  # of CPU tensors
        staging_bytes: int = STAGING_BYTES,
    ) -> None:
        super().__init__(transport.group, transport.rank, transport.size)
        if staging_bytes < 2:
            raise InvalidInputError(
                f"EPLB on group '{transport.group}': staging_bytes={staging_bytes} must be at least 2"
            )
        self._transport = transport
        self._piece_bytes = staging_bytes // 2

    def _exchange(self, messages: Sequence[SendRecv]) -> None:
        """One distance between ranks after the other, piece by piece: ranks that wait for each other never form a circle."""
        device = messages[0].tensor.device
        largest = max(sum(each.tensor.numel() for each in messages if each.is_send is way) for way in (True, False))
        size, pinned = min(self._piece_bytes, largest), device.type != "cpu"
        outgoing, incoming = (torch.empty(size, dtype=torch.uint8, pin_memory=pinned, device="cpu") for _ in range(2))
        for distance in range(1, self.size):
            destination, source = (self.rank + distance) % self.size, (self.rank - distance) % self.size
            sends = (each.tensor for each in messages if each.is_send and each.peer == destination)
            receives = (each.tensor for each in messages if not each.is_send and each.peer == source)
            pieces = (_pieces(parts, self._piece_bytes) for parts in (sends, receives))  # both ends cut alike
            for sent, received in zip_longest(*pieces, fillvalue=()):
                exchange = []
                if sent:
                    exchange.append(SendRecv(destination, _staged(outgoing, sent), is_send=True))
                    for part, staged in _beside(sent, outgoing):
                        staged.copy_(part, non_blocking=True)
                    _wait_for(device)
                if received:
                    exchange.append(SendRecv(source, _staged(incoming, received), is_send=False))
                self._transport.send_recv(exchange)
                for part, staged in _beside(received, incoming):
                    part.copy_(staged, non_blocking=True)
                if received:
                    _wait_for(device)


def _pieces(parts: Iterable[torch.Tensor], piece_bytes: int) -> Iterator[list[torch.Tensor]]:
    """Bytes of all parts, one behind the other, cut every piece_bytes: the views that each piece is made of."""
    piece: list[torch.Tensor] = []
    free = piece_bytes
    for part in parts:
        while part.numel():
            piece.append(part[:free])
            free -= piece[-1].numel()
            part = part[piece[-1].numel() :]
            if free == 0:
                yield piece
                piece, free = [], piece_bytes
    if piece:
        yield piece


def _staged(staging: torch.Tensor, piece: Sequence[torch.Tensor]) -> torch.Tensor:
    return staging[: sum(part.numel() for part in piece)]


def _beside(piece: Sequence[torch.Tensor], staging: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    start = 0
    for part in piece:
        yield part, staging[start : start + part.numel()]
        start += part.numel()


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.current_stream(device).synchronize()
