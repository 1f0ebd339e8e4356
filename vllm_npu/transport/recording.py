"""A transport that counts what another one does: calls and bytes for each group and operation."""

from collections import Counter
from collections.abc import Sequence

import torch

from vllm_npu.handles import Pending
from vllm_npu.token_layout import RowFormat
from vllm_npu.transport.base import Exchanged, SendRecv, Transport


class CollectiveCounter:
    """Calls and bytes by "group.operation". Bytes are what this rank puts on the wire; what it keeps is not counted."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes_sent: Counter[str] = Counter()

    def add(self, group: str, operation: str, sent: int) -> None:
        """Count one call that sends `sent` bytes."""
        self.calls[f"{group}.{operation}"] += 1
        self.bytes_sent[f"{group}.{operation}"] += sent

    def reset(self) -> None:
        """Start again from nothing."""
        self.calls.clear()
        self.bytes_sent.clear()


class RecordingTransport(Transport):
    """Wraps any transport. A group of one rank sends nothing and is not counted.

    Byte model, for W ranks: all_gather sends own rows W-1 times, reduce_scatter and all_to_all all rows but the own
    part, broadcast the source's rows W-1 times, all_reduce 2*(W-1)/W of the tensor (a ring).
    """

    def __init__(self, inner: Transport, counter: CollectiveCounter) -> None:
        super().__init__(inner.group, inner.rank, inner.size)
        self.inner = inner
        self._counter = counter

    @property
    def name_for_ops(self) -> str:
        """The wrapped transport's."""
        return self.inner.name_for_ops

    def note_op(self, operation: str, sent: int) -> None:
        """Count the op as one call."""
        self._counter.add(self.group, operation, sent)

    def close(self) -> None:
        """Close the wrapped transport."""
        self.inner.close()

    def _all_gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        self._counter.add(self.group, "all_gather", x.nbytes * (self.size - 1))
        return self.inner.all_gather(x, sizes)

    def _reduce_scatter(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        self._counter.add(self.group, "reduce_scatter", _bytes_to_others(x, sizes, self.rank))
        return self.inner.reduce_scatter(x, sizes)

    def _all_to_all(self, x: torch.Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]) -> torch.Tensor:
        self._counter.add(self.group, "all_to_all", _bytes_to_others(x, send_sizes, self.rank))
        return self.inner.all_to_all(x, send_sizes, recv_sizes)

    def _all_to_all_start(
        self, x: torch.Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]
    ) -> Pending[torch.Tensor]:
        self._counter.add(self.group, "all_to_all", _bytes_to_others(x, send_sizes, self.rank))
        return self.inner.all_to_all_start(x, send_sizes, recv_sizes)

    def _gather_tokens(self, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        sent = tensors[0].shape[0] * _message_row_bytes(tensors) * (self.size - 1)
        self._counter.add(self.group, "all_gather", sent)
        return self.inner.gather_tokens(tensors, sizes)

    def _exchange_tokens(self, tensors: Sequence[torch.Tensor], rows_per_rank: torch.Tensor) -> Exchanged:
        received, sent_rows, received_rows = self.inner.exchange_tokens(tensors, rows_per_rank)
        self._counter.add(self.group, "all_to_all", rows_per_rank.itemsize * (self.size - 1))
        rows_to_others = sum(sent_rows) - sent_rows[self.rank]
        self._counter.add(self.group, "all_to_all", rows_to_others * _message_row_bytes(tensors))
        return received, sent_rows, received_rows

    def _broadcast(self, x: torch.Tensor, source: int) -> torch.Tensor:
        self._counter.add(self.group, "broadcast", x.nbytes * (self.size - 1) if source == self.rank else 0)
        return self.inner.broadcast(x, source)

    def _all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self._counter.add(self.group, "all_reduce", 2 * x.nbytes * (self.size - 1) // self.size)
        return self.inner.all_reduce(x)

    def _send_recv(self, operations: Sequence[SendRecv]) -> None:
        self._counter.add(self.group, "send_recv", sum(op.tensor.nbytes for op in operations if op.is_send))
        self.inner.send_recv(operations)

    def _barrier(self) -> None:
        self._counter.add(self.group, "barrier", 0)
        self.inner.barrier()


def _bytes_to_others(x: torch.Tensor, sizes: Sequence[int], rank: int) -> int:
    rows = x.shape[0]
    return x.nbytes // rows * (rows - sizes[rank]) if rows else 0


def _message_row_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Of one tensor, which travels as it is, or of several in one message."""
    return RowFormat.of(tensors).row_bytes


def record(transport: Transport, counter: CollectiveCounter | None) -> Transport:
    """`transport`, counted where there is a counter."""
    return transport if counter is None else RecordingTransport(transport, counter)
