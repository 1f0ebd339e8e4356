"""EPLB through CPU memory, for devices whose links carry other collectives at the same time."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest

import torch

from vllm_npu.core.limits import MIB
from vllm_npu.eplb.communicator import EplbCommunicator
from vllm_npu.errors import InvalidInputError
from vllm_npu.transport.base import SendRecv, Transport

STAGING_BYTES = 64 * MIB


class GlooStagedEplbCommunicator(EplbCommunicator):
    """Copies weights to CPU memory, sends them over gloo, and copies them back to the device.

    CPU memory is at most staging_bytes for any queue: one half for sends, one half for receives. It is pinned where the
    weights are on an accelerator. Messages are cut into pieces of staging_bytes / 2, and small tensors share a piece. Host
    sync: yes, a few for each piece.
    """

    def __init__(
        self,
        transport: Transport,  # moves CPU tensors
        staging_bytes: int = STAGING_BYTES,
    ) -> None:
        super().__init__(transport.group, transport.rank, transport.size)
        if staging_bytes < 2:
            raise InvalidInputError(
                f"EPLB on group '{transport.group}': staging_bytes={staging_bytes} must be at least 2"
            )
        self._transport = transport
        self._piece_bytes = staging_bytes // 2

    def _allocate(self, messages: Sequence[SendRecv]) -> tuple[torch.Tensor, ...]:
        """Allocate the two halves of the staging memory."""
        largest = max(
            sum(each.tensor.numel() for each in messages if each.is_send is is_send) for is_send in (True, False)
        )
        size, pinned = min(self._piece_bytes, largest), messages[0].tensor.device.type != "cpu"
        return tuple(torch.empty(size, dtype=torch.uint8, pin_memory=pinned, device="cpu") for _ in range(2))

    def _exchange(self, messages: Sequence[SendRecv], buffers: Sequence[torch.Tensor]) -> None:
        """Exchange piece by piece, with one distance between ranks after the other: no circle of ranks waits for each other."""
        device = messages[0].tensor.device
        outgoing, incoming = buffers
        for distance in range(1, self.size):
            destination, source = (self.rank + distance) % self.size, (self.rank - distance) % self.size
            sends = (each.tensor for each in messages if each.is_send and each.peer == destination)
            receives = (each.tensor for each in messages if not each.is_send and each.peer == source)
            pieces = (_pieces(parts, self._piece_bytes) for parts in (sends, receives))  # both ranks cut alike
            for sent, received in zip_longest(*pieces, fillvalue=()):
                exchange = []
                if sent:
                    exchange.append(SendRecv(destination, _staged(outgoing, sent), is_send=True))
                    for part, staged in _with_staged_parts(sent, outgoing):
                        staged.copy_(part, non_blocking=True)
                    _wait_for(device)
                if received:
                    exchange.append(SendRecv(source, _staged(incoming, received), is_send=False))
                self._transport.send_recv(exchange)
                for part, staged in _with_staged_parts(received, incoming):
                    part.copy_(staged, non_blocking=True)
                if received:
                    _wait_for(device)


def _pieces(parts: Iterable[torch.Tensor], piece_bytes: int) -> Iterator[list[torch.Tensor]]:
    """Cut the parts, laid end to end, every piece_bytes. Each piece is the list of its views of the parts."""
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
    """The view of staging that the piece fills."""
    return staging[: sum(part.numel() for part in piece)]


def _with_staged_parts(
    piece: Sequence[torch.Tensor], staging: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each part of a piece, with the view of its place in staging."""
    start = 0
    for part in piece:
        yield part, staging[start : start + part.numel()]
        start += part.numel()


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.current_stream(device).synchronize()
