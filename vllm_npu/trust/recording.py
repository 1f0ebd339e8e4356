"""A wrapper of transports that counts calls and bytes for each group and operation, and writes each call to a trace
(vllm_npu/trust/trace.py)."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from vllm_npu import envs
from vllm_npu.core.handles import Pending, Result
from vllm_npu.core.token_layout import RowFormat
from vllm_npu.errors import InvalidInputError, TransportError, UnsupportedConfigError
from vllm_npu.transport.base import Exchanged, RankWatch, SendRecv, Transport, rounds_of
from vllm_npu.trust.trace import Call, Group, TraceRing, read_traces
from vllm_npu.trust.trace_comparison import report


class CollectiveCounter:
    """Calls and bytes for each "group.operation". Bytes that this rank sends to itself are not counted."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes_sent: Counter[str] = Counter()

    def add(self, group: str, operation: str, sent: int) -> None:
        """Count one call that sends `sent` bytes."""
        self.calls[f"{group}.{operation}"] += 1
        self.bytes_sent[f"{group}.{operation}"] += sent

    def reset(self) -> None:
        """Set all counts to 0."""
        self.calls.clear()
        self.bytes_sent.clear()


class RecordingTransport(Transport):
    """Wraps a transport, and counts its calls, writes them to this rank's trace, or both. A group of one rank sends nothing,
    so its calls are not recorded.

    Bytes sent in a group of W ranks: all_gather, own rows W-1 times; reduce_scatter and all_to_all, all rows except the part
    of this rank; broadcast, the source's rows W-1 times; all_reduce, 2*(W-1)/W of the tensor (a ring); maximum, the values
    once for each message (rounds_of).
    """

    def __init__(
        self,
        inner: Transport,
        counter: CollectiveCounter | None,
        ring: TraceRing | None = None,
        members: Sequence[
            int
        ] = (),  # the group's ranks, numbered in the whole run, in the group's order; empty: 0, 1, ...
        epoch: int = 0,  # of the group (trust/watchdog.py)
    ) -> None:
        super().__init__(inner.group, inner.rank, inner.size)
        self.inner = inner
        self._counter = counter
        self._ring = ring
        self._members = Group(name=inner.group, members=tuple(members) or tuple(range(inner.size)), epoch=epoch)
        self._streams: dict[int, int] = {}

    @property
    def innermost(self) -> Transport:
        """The innermost transport of the wrapped one."""
        return self.inner.innermost

    @property
    def name_for_ops(self) -> str:
        """The wrapped transport's name for device ops."""
        return self.inner.name_for_ops

    def note_op(self, operation: str, sent: int) -> None:
        """Record the op as one call that has ended, since the host does not wait for it."""
        with self._call(operation, sent):
            pass

    def watch(self, watchdog: RankWatch) -> None:
        """Watch the wrapped transport."""
        self.inner.watch(watchdog)

    def leave(self) -> None:
        """Leave the wrapped transport's group."""
        self.inner.leave()

    def close(self) -> None:
        """Close the wrapped transport."""
        self.inner.close()

    @contextmanager
    def _call(
        self, operation: str, sent_bytes: int, tensors: Sequence[torch.Tensor] = (), **rows: Sequence[int]
    ) -> Iterator[Call | None]:
        with self._explained():
            call = self._begin(operation, sent_bytes, tensors, **rows)
            yield call
        self._end(call)

    def _begin(
        self, operation: str, sent_bytes: int, tensors: Sequence[torch.Tensor], **rows: Sequence[int]
    ) -> Call | None:
        if self._counter is not None:
            self._counter.add(self.group, operation.partition(" ")[0], sent_bytes)
        if self._ring is None:
            return None
        row = "+".join(f"{str(x.dtype).removeprefix('torch.')}{list(x.shape[1:])}" for x in tensors)
        return self._ring.begin(self._members, operation, row=row, stream=self._stream(tensors), **rows)

    def _end(self, call: Call | None) -> None:
        if call is not None and self._ring is not None:
            self._ring.end(call)

    def _stream(self, tensors: Sequence[torch.Tensor]) -> int:
        """Number the streams of this group in the order of their first use. A CPU has stream 0."""
        if not tensors or tensors[0].device.type == "cpu":
            return 0
        stream = torch.accelerator.current_stream(tensors[0].device).stream_id
        return self._streams.setdefault(stream, len(self._streams))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Add a comparison of all readable traces to a TransportError raised inside."""
        try:
            yield
        except TransportError as error:
            if self._ring is None:
                raise
            try:
                found = report(read_traces([self._ring.path.parent]))
            except InvalidInputError as unreadable:
                found = str(unreadable)
            raise error.with_detail(f"traces in {self._ring.path.parent}:\n{found}") from error

    def _all_gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        with self._call("all_gather", x.nbytes * (self.size - 1), [x], sizes=sizes):
            return self.inner.all_gather(x, sizes)

    def _reduce_scatter(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        with self._call("reduce_scatter", _bytes_to_others(x, sizes, self.rank), [x], sizes=sizes):
            return self.inner.reduce_scatter(x, sizes)

    def _all_to_all(self, x: torch.Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]) -> torch.Tensor:
        sent = _bytes_to_others(x, send_sizes, self.rank)
        with self._call("all_to_all", sent, [x], sent=send_sizes, received=recv_sizes):
            return self.inner.all_to_all(x, send_sizes, recv_sizes)

    def _all_to_all_start(
        self, x: torch.Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]
    ) -> Pending[torch.Tensor]:
        with self._explained():
            sent = _bytes_to_others(x, send_sizes, self.rank)
            call = self._begin("all_to_all", sent, [x], sent=send_sizes, received=recv_sizes)
            pending = self.inner.all_to_all_start(x, send_sizes, recv_sizes)
        return self._ended_by(pending, call)

    def _maximum_start(self, values: list[int]) -> Pending[list[int]]:
        with self._explained():
            sent = torch.int64.itemsize * len(values) * sum(map(len, rounds_of(self.size)))
            call = self._begin("maximum", sent, (), sizes=[len(values)])
            pending = self.inner.maximum_start(values)
        return self._ended_by(pending, call)

    def _ended_by(self, pending: Pending[Result], call: Call | None) -> Pending[Result]:
        """The pending operation, whose finish ends the call in the trace."""
        if call is None:
            return pending

        def complete() -> Result:
            with self._explained():
                result = pending.finish()
            self._end(call)
            return result

        return Pending(stage=pending.stage, complete=complete)

    def _gather_tokens(self, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        sent = tensors[0].shape[0] * _message_row_bytes(tensors) * (self.size - 1)
        with self._call("all_gather", sent, tensors, sizes=sizes):
            return self.inner.gather_tokens(tensors, sizes)

    def _exchange_tokens(self, tensors: Sequence[torch.Tensor], rows_per_rank: torch.Tensor) -> Exchanged:
        with self._call("all_to_all", rows_per_rank.itemsize * (self.size - 1), tensors) as call:
            received, sent_rows, received_rows = self.inner.exchange_tokens(tensors, rows_per_rank)
        if self._counter is not None:
            rows_to_others = sum(sent_rows) - sent_rows[self.rank]
            self._counter.add(self.group, "all_to_all", rows_to_others * _message_row_bytes(tensors))
        if call is not None and self._ring is not None:
            self._ring.end(call, sent=sent_rows, received=received_rows)
        return received, sent_rows, received_rows

    def _broadcast(self, x: torch.Tensor, source: int) -> torch.Tensor:
        sent = x.nbytes * (self.size - 1) if source == self.rank else 0
        with self._call(f"broadcast from {source}", sent, [x], sizes=x.shape[:1]):
            return self.inner.broadcast(x, source)

    def _all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        with self._call("all_reduce", 2 * x.nbytes * (self.size - 1) // self.size, [x], sizes=x.shape[:1]):
            return self.inner.all_reduce(x)

    def _send_recv(self, operations: Sequence[SendRecv]) -> None:
        with self._call("send_recv", sum(op.tensor.nbytes for op in operations if op.is_send)):
            self.inner.send_recv(operations)

    def _barrier(self) -> None:
        with self._call("barrier", 0):
            self.inner.barrier()


def _bytes_to_others(x: torch.Tensor, sizes: Sequence[int], rank: int) -> int:
    rows = x.shape[0]
    return x.nbytes // rows * (rows - sizes[rank]) if rows else 0


def _message_row_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of one row of a message that holds these tensors."""
    return RowFormat.of(tensors).row_bytes


def record(
    transport: Transport,
    counter: CollectiveCounter | None,
    ring: TraceRing | None = None,
    members: Sequence[int] = (),  # the group's ranks, numbered in the whole run
    epoch: int = 0,  # of the group
) -> Transport:
    """Wrap `transport` for a counter, a ring, or both. Without either, return it unchanged."""
    if counter is None and ring is None:
        return transport
    return RecordingTransport(transport, counter, ring, members, epoch)


def open_ring(rank: int, world_size: int) -> TraceRing | None:
    """Open the trace of a rank in the folder VLLM_NPU_RECORD, or return None if that is unset. Raises UnsupportedConfigError if
    the folder cannot be written."""
    folder = envs.RECORD.read()
    if not folder:
        return None
    try:
        return TraceRing.create(Path(folder), rank, world_size)
    except InvalidInputError as error:
        raise UnsupportedConfigError(f"{envs.RECORD.name}={folder!r}: {error}") from error
