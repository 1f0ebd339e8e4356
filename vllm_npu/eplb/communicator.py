"""The contract of an EPLB communicator, which moves experts' weights between ranks: queue messages, then move all at once."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from vllm_npu.errors import InvalidInputError
from vllm_npu.transport.base import SendRecv

Tensors = torch.Tensor | Sequence[torch.Tensor]
"""One tensor, or several tensors of one expert. vLLM queues an expert's tensors together, the original design one by one."""


@dataclass(frozen=True, slots=True)
class _Queued:
    """One half of a message, as add_send or add_recv queued it."""

    message: SendRecv
    expert_id: int | None

    def __str__(self) -> str:
        tensor, direction = self.message.tensor, "to" if self.message.is_send else "from"
        expert = "" if self.expert_id is None else f" of expert {self.expert_id}"
        return f"{tensor.dtype} {tuple(tensor.shape)}{expert} {direction} rank {self.message.peer}"


@dataclass(frozen=True, slots=True)
class _Prepared:
    """All that execute() needs. Nothing is allocated after it."""

    copies: Sequence[tuple[torch.Tensor, torch.Tensor]]  # within the rank: (source, destination)
    messages: Sequence[SendRecv]
    results: Sequence[tuple[torch.Tensor, torch.Tensor]]  # to copy after the exchange: (destination, received)
    buffers: tuple[torch.Tensor, ...]


class EplbCommunicator(ABC):
    """Queues messages and moves them in execute(). Subclasses move the bytes in _exchange().

    Between two ranks, the n-th send meets the n-th receive. Both must have the same number of bytes; dtypes may differ. A rank
    may send to itself. Tensors may have any strides and may be empty. Sent tensors are not written. Each communicator has its
    own queue, so several may be filled at once. Communicators over one group must execute in the same order on all ranks.
    """

    def __init__(self, group: str, rank: int, size: int) -> None:
        self.group = group
        self.rank = rank
        self.size = size
        self._queue: list[_Queued] = []
        self._prepared: _Prepared | None = None  # until execute
        self._stream: torch.Stream | None = None

    def add_send(self, tensors: Tensors, dst_rank: int, expert_id: int | None = None) -> None:
        """Queue tensors to send to a rank of the group. LOCAL. The tensors must stay unchanged until execute() is done.

        expert_id appears in error messages only. Raises InvalidInputError, and queues nothing, for a rank that does not exist,
        and between prepare() and execute().
        """
        self._add(tensors, dst_rank, expert_id, is_send=True)

    def add_recv(self, tensors: Tensors, src_rank: int, expert_id: int | None = None) -> None:
        """Queue tensors that receive from a rank of the group. LOCAL. Raises as add_send does."""
        self._add(tensors, src_rank, expert_id, is_send=False)

    def prepare(self) -> None:
        """Check the queue, and allocate all memory that execute() needs. LOCAL.

        execute() does it, too. A caller that prepares first can agree with the other ranks that all are ready
        (trust.agreement.prepare_on_all), so that a rank without memory is named, and no rank waits for its messages. Sent
        tensors are read from here on. The queue is empty afterwards; after an error nothing is prepared. Raises
        InvalidInputError as execute() does and where it was called before, and the allocator's RuntimeError or MemoryError.
        """
        self._refuse_prepared("prepare")
        queue, self._queue = self._queue, []
        copies = self._copies_within_rank(queue)
        _check_overlaps(queue)
        messages, results = [], []
        with _on_stream(self._stream):
            for message in (each.message for each in queue):
                if message.peer == self.rank or message.tensor.numel() == 0:
                    continue
                tensor = message.tensor
                if message.is_send:
                    tensor = tensor.contiguous()
                elif not tensor.is_contiguous():
                    tensor = torch.empty_like(tensor, memory_format=torch.contiguous_format)
                    results.append((message.tensor, tensor))
                messages.append(SendRecv(message.peer, bytes_of(tensor), message.is_send))
            buffers = self._allocate(messages) if messages else ()
        self._prepared = _Prepared(copies, messages, results, buffers)

    def execute(self) -> None:
        """Move all queued messages. On return the messages have arrived: on an accelerator, in the order of the stream.

        COLLECTIVE over the ranks that have messages for each other. A rank without messages returns at once. Host sync: see the
        class. Graph capture: no. The queue is empty afterwards, also after an error. Raises InvalidInputError, before anything
        moves, where messages to the rank itself do not pair up, or where a receive overlaps the memory of another message.
        Raises TransportError where a peer does not take part, or sends another number of bytes.
        """
        if self._prepared is None:
            self.prepare()
        prepared, self._prepared = self._prepared, None
        assert prepared is not None  # prepare has set it
        with _on_stream(self._stream):
            for source, destination in prepared.copies:
                destination.copy_(source)
            if prepared.messages:
                self._exchange(prepared.messages, prepared.buffers)
            for destination, tensor in prepared.results:
                destination.copy_(tensor)

    def clear(self) -> None:
        """Empty the queue, and give back what is prepared. LOCAL. For a caller that cannot execute because of an error."""
        self._queue, self._prepared = [], None

    def set_stream(self, stream: torch.Stream | None) -> None:
        """Set the stream of the tensors' device on which execute() works. None: the current stream."""
        self._stream = stream

    def _allocate(self, messages: Sequence[SendRecv]) -> tuple[torch.Tensor, ...]:
        """Allocate what _exchange needs for these messages."""
        return ()

    @abstractmethod
    def _exchange(self, messages: Sequence[SendRecv], buffers: Sequence[torch.Tensor]) -> None:
        """Move one or more messages. Each is a contiguous uint8 [n] with n >= 1, and none is for the rank itself. `buffers`
        are those of _allocate."""

    def _refuse_prepared(self, call: str) -> None:
        """Raise InvalidInputError where messages are prepared: others wait for them, and a further prepare would lose them."""
        if self._prepared is not None:
            raise InvalidInputError(
                f"EPLB on group '{self.group}': {call} on rank {self.rank} while {len(self._prepared.messages)} prepared "
                "messages have not moved; call execute() or clear() before"
            )

    def _add(self, tensors: Tensors, peer: int, expert_id: int | None, *, is_send: bool) -> None:
        self._refuse_prepared("add_send" if is_send else "add_recv")
        if not 0 <= peer < self.size:
            raise InvalidInputError(
                f"EPLB on group '{self.group}': rank {self.rank} {'sends to' if is_send else 'receives from'} rank {peer}"
                f"{'' if expert_id is None else f', expert {expert_id}'}; it must be one of 0..{self.size - 1}"
            )
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
        self._queue += [_Queued(SendRecv(peer, tensor, is_send), expert_id) for tensor in tensors]

    def _copies_within_rank(self, queue: Sequence[_Queued]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pair this rank's sends to itself with its receives from itself: (source, destination)."""
        own = [each for each in queue if each.message.peer == self.rank]
        sends = [each for each in own if each.message.is_send]
        receives = [each for each in own if not each.message.is_send]
        if len(sends) != len(receives):
            raise InvalidInputError(
                f"EPLB on group '{self.group}': rank {self.rank} sends itself {len(sends)} tensors and receives "
                f"{len(receives)} from itself ({', '.join(map(str, own))})"
            )
        for send, receive in zip(sends, receives, strict=True):
            source, destination = send.message.tensor, receive.message.tensor
            if source.shape != destination.shape or source.dtype != destination.dtype:
                raise InvalidInputError(
                    f"EPLB on group '{self.group}': rank {self.rank} sends itself {send}, and expects {receive}"
                )
        return [(send.message.tensor, receive.message.tensor) for send, receive in zip(sends, receives, strict=True)]


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory of a contiguous tensor as a view, uint8 [n]."""
    return tensor.detach().view(-1).view(torch.uint8)


def _check_overlaps(queue: Sequence[_Queued]) -> None:
    """Raise InvalidInputError where a receive overlaps another message.

    Only contiguous tensors are compared: others may interleave in memory without overlapping.
    """
    spans = sorted(
        (
            (each.message.tensor.data_ptr(), each.message.tensor.nbytes, index)
            for index, each in enumerate(queue)
            if each.message.tensor.numel() and each.message.tensor.is_contiguous()
        ),
    )
    ends = {
        True: (0, -1),
        False: (0, -1),
    }  # of sends and of receives: the highest end so far, and the index of its message
    for start, nbytes, index in spans:
        for is_send in (True, False):
            end, other = ends[is_send]
            if start < end and not (is_send and queue[index].message.is_send):
                raise InvalidInputError(
                    f"EPLB: one execute may not write memory that it also sends, or write it twice: {queue[index]} overlaps "
                    f"{queue[other]}; receive into a buffer"
                )
        kind = queue[index].message.is_send
        ends[kind] = max(ends[kind], (start + nbytes, index))


@contextmanager
def _on_stream(stream: torch.Stream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    before = torch.accelerator.current_stream(stream.device)
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)
