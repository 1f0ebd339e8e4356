"""Contract of a transport: one group of ranks that exchange tensors. Methods are COLLECTIVE unless they say LOCAL.

A result is fresh memory, and no method writes an argument, so a caller may keep using its tensors.
Sizes count rows (first dimension) and must be equal on all ranks of the group.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_npu.core.handles import Pending
from vllm_npu.core.token_layout import pack
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.errors import InvalidInputError, RankFailureError, TransportError, UnsupportedConfigError

Exchanged = tuple[list[torch.Tensor], list[int], list[int]]
"""Result of exchange_tokens: received tensors, rows sent to each rank, rows received from each rank."""

FAN_OUT = 8
"""A rank sends small tensors to at most FAN_OUT - 1 others at a time (see rounds_of). Up to FAN_OUT ranks exchange them in one
all-to-all, which gloo runs on a thread of its own. Eight, because between 8 processes of one machine the all-to-all took 1.7 ms
and two rounds of fewer messages 9.7 ms (2 cores, busy)."""

MAX_RECEIVED_ROWS = 2**31 - 1  # routing ops number rows in int32


@dataclass(frozen=True, slots=True)
class SendRecv:
    """One half of a point-to-point exchange: send `tensor` to `peer`, or receive into it. `peer` is a group rank."""

    peer: int
    tensor: torch.Tensor
    is_send: bool


class RankWatch(Protocol):
    """Finds the ranks that made a collective fail. trust.watchdog.Watchdog implements it."""

    deadline: float  # seconds that a collective may take

    def begin(self, operation: str, group: str) -> None:
        """Note that a collective of this rank begins. LOCAL."""
        ...

    def end(self) -> None:
        """Note that a collective of this rank has ended without an error. LOCAL."""
        ...

    def failure(self, operation: str, group: str, rank: int, detail: str) -> RankFailureError:
        """The error for a failed collective. It names the ranks that ended or are late. LOCAL."""
        ...


class Transport(ABC):
    """One group of ranks. Public methods check their arguments. Subclasses move the tensors in methods named _*."""

    def __init__(self, group: str, rank: int, size: int) -> None:
        self.group = group
        self.rank = rank
        self.size = size

    def all_gather(
        self,
        x: torch.Tensor,  # [sizes[rank], ...]
        sizes: Sequence[int] | None = None,
    ) -> torch.Tensor:  # [sum(sizes), ...]
        """Gather the rows of all ranks, in rank order. Without `sizes`, every rank brings as many rows as this one."""
        sizes = self._check_sizes("all_gather", sizes, x.shape[0], x.shape[0])
        return x.clone() if self.size == 1 else self._all_gather(x.contiguous(), sizes)

    def gather_tokens(
        self,
        tensors: Sequence[torch.Tensor],  # each [sizes[rank], width], the same widths and dtypes on all ranks
        sizes: Sequence[int],
    ) -> list[torch.Tensor]:  # each [sum(sizes), width]; may be views of one message
        """Gather several tensors of all ranks in one message, as all_gather does for one tensor."""
        self._check_together("gather_tokens", tensors)
        self._check_sizes("gather_tokens", sizes, 0, tensors[0].shape[0])
        return [tensor.clone() for tensor in tensors] if self.size == 1 else self._gather_tokens(tensors, sizes)

    def reduce_scatter(
        self,
        x: torch.Tensor,  # [sum(sizes), ...]
        sizes: Sequence[int] | None = None,
    ) -> torch.Tensor:  # [sizes[rank], ...]
        """Add `x` over the ranks, and return this rank's rows of the sum. Without `sizes`, all parts are equal."""
        if sizes is None and x.shape[0] % self.size:
            raise InvalidInputError(
                f"reduce_scatter on group '{self.group}': {x.shape[0]} rows do not divide over {self.size} ranks; pass sizes"
            )
        sizes = self._check_sizes("reduce_scatter", sizes, x.shape[0] // self.size, None)
        if sum(sizes) != x.shape[0]:
            raise InvalidInputError(
                f"reduce_scatter on group '{self.group}': sizes {list(sizes)} add up to {sum(sizes)}, x has {x.shape[0]} rows"
            )
        return x.clone() if self.size == 1 else self._reduce_scatter(x.contiguous(), sizes)

    def all_to_all(
        self,
        x: torch.Tensor,  # [sum(send_sizes), ...], rows for rank 0 first
        send_sizes: Sequence[int],
        recv_sizes: Sequence[int],
    ) -> torch.Tensor:  # [sum(recv_sizes), ...], rows of rank 0 first
        """Send a part of `x` to each rank. recv_sizes[r] must be the number of rows that rank r sends to this rank."""
        self._check_all_to_all(x, send_sizes, recv_sizes)
        return x.clone() if self.size == 1 else self._all_to_all(x.contiguous(), send_sizes, recv_sizes)

    def all_to_all_start(
        self, x: torch.Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]
    ) -> Pending[torch.Tensor]:
        """Start an all_to_all that continues while the caller computes. The caller must not write `x` before the finish.

        The host waits for the other ranks at the finish over gloo, in the start between threads, and never over NCCL and HCCL.
        """
        self._check_all_to_all(x, send_sizes, recv_sizes)
        if self.size == 1:
            return Pending(stage="all_to_all", complete=x.clone)
        return self._all_to_all_start(x.contiguous(), send_sizes, recv_sizes)

    def _check_all_to_all(self, x: torch.Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]) -> None:
        self._check_sizes("all_to_all (send)", send_sizes, 0, None)
        self._check_sizes("all_to_all (recv)", recv_sizes, 0, None)
        if sum(send_sizes) != x.shape[0]:
            raise InvalidInputError(
                f"all_to_all on group '{self.group}': send sizes {list(send_sizes)} add up to {sum(send_sizes)}, "
                f"x has {x.shape[0]} rows"
            )
        if send_sizes[self.rank] != recv_sizes[self.rank]:
            raise InvalidInputError(
                f"all_to_all on group '{self.group}': rank {self.rank} sends itself {send_sizes[self.rank]} rows but "
                f"expects {recv_sizes[self.rank]}"
            )

    def exchange_tokens(
        self,
        tensors: Sequence[torch.Tensor],  # each [n, width], rows for rank 0 first
        rows_per_rank: torch.Tensor,  # [size] int64, on the tensors' device: rows for each rank; their sum is n
    ) -> Exchanged:
        """all_to_all of several tensors in one message, with sizes that only the sender knows: 8 bytes go to each rank first.

        Returns the received tensors (rows of rank 0 first; may be views of one message), the rows sent to each rank and the
        rows received from each rank. Host sync: yes (the sizes). Raises InvalidInputError for sizes that do not fit the
        tensors: on a CPU before anything moves; on an accelerator after the sizes have moved and before rows move, so other
        ranks may wait for this rank's rows.
        """
        self._check_exchange(tensors, rows_per_rank)
        if self.size == 1:
            rows = [tensors[0].shape[0]]
            return [tensor.clone() for tensor in tensors], rows, rows
        return self._exchange_tokens(tensors, rows_per_rank)

    def exchange_tokens_start(self, tensors: Sequence[torch.Tensor], rows_per_rank: torch.Tensor) -> Pending[Exchanged]:
        """Start an exchange_tokens whose message continues while the caller computes, as in all_to_all_start. The start
        exchanges the sizes. The caller may write the tensors after the start."""
        self._check_exchange(tensors, rows_per_rank)
        if self.size == 1:
            exchanged = self.exchange_tokens(tensors, rows_per_rank)
            return Pending(stage="exchange_tokens", complete=lambda: exchanged)
        sent_rows, received_rows = self._exchange_sizes(rows_per_rank)
        self._check_sent_rows(sent_rows, tensors)
        message, unpack = pack(tensors)
        if len(tensors) == 1:
            message = message.clone()
        pending = self._all_to_all_start(message, sent_rows, received_rows)
        return Pending(stage="exchange_tokens", complete=lambda: (unpack(pending.finish()), sent_rows, received_rows))

    def exchange_sizes(
        self,
        rows_per_rank: torch.Tensor,  # [size] int64: rows that this rank sends to each rank
    ) -> tuple[list[int], list[int]]:
        """Rows sent to each rank, and rows received from each rank: 8 bytes go to each rank. Host sync: yes."""
        self._check_rows_per_rank("exchange_sizes", rows_per_rank)
        if self.size == 1:
            rows = rows_per_rank.tolist()
            return rows, rows
        return self._exchange_sizes(rows_per_rank)

    def _check_rows_per_rank(self, operation: str, rows_per_rank: torch.Tensor) -> None:
        if rows_per_rank.shape != (self.size,) or rows_per_rank.dtype != torch.int64:
            raise InvalidInputError(
                f"{operation} on group '{self.group}': rows_per_rank is {rows_per_rank.dtype} "
                f"{tuple(rows_per_rank.shape)}; it must be int64 [{self.size}]"
            )

    def _check_exchange(self, tensors: Sequence[torch.Tensor], rows_per_rank: torch.Tensor) -> None:
        self._check_together("exchange_tokens", tensors)
        self._check_rows_per_rank("exchange_tokens", rows_per_rank)
        if rows_per_rank.device.type == "cpu":  # on accelerators, they are checked once the sizes have moved
            self._check_sent_rows(rows_per_rank.tolist(), tensors)

    def _check_sent_rows(self, sent_rows: Sequence[int], tensors: Sequence[torch.Tensor]) -> None:
        self._check_sizes("exchange_tokens", sent_rows, 0, None)
        if sum(sent_rows) != tensors[0].shape[0]:
            raise InvalidInputError(
                f"exchange_tokens on group '{self.group}': rows_per_rank {list(sent_rows)} add up to {sum(sent_rows)}, but the "
                f"tensors have {tensors[0].shape[0]} rows"
            )

    def broadcast(self, x: torch.Tensor, source: int) -> torch.Tensor:
        """Return `x` of rank `source`. Other ranks pass a tensor of the same shape and dtype; its values are not used."""
        if not 0 <= source < self.size:
            raise InvalidInputError(f"broadcast on group '{self.group}': source {source} is not in 0..{self.size - 1}")
        return x.clone() if self.size == 1 else self._broadcast(x.contiguous(), source)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of `x` over the ranks."""
        return x.clone() if self.size == 1 else self._all_reduce(x.contiguous())

    def maximum_start(self, values: Sequence[int]) -> Pending[list[int]]:
        """Start the maximum of each of a few int64 values over the ranks. The group moves CPU tensors. Host sync: yes.

        Each rank sends them in the rounds of rounds_of(size): 1, 7, 14 and 22 messages at 2, 8, 64 and 768 ranks. gloo's own
        all-reduce sends fewer messages, but in a ring: 2 * (size - 1) hops follow one another (gloo/allreduce.cc; torch lets
        gloo choose no other algorithm). With more than FAN_OUT ranks everything happens in the finish.
        """
        values = list(values)
        return Pending(stage="maximum", complete=lambda: values) if self.size == 1 else self._maximum_start(values)

    def send_recv(self, operations: Sequence[SendRecv]) -> None:
        """Run all sends and receives, in any order. Between two ranks, the n-th send goes to the n-th receive.

        A receive writes into its `tensor`, which must be contiguous. No other method writes memory of the caller.
        """
        for operation in operations:
            if not 0 <= operation.peer < self.size or operation.peer == self.rank:
                raise InvalidInputError(
                    f"send_recv on group '{self.group}': peer {operation.peer} of rank {self.rank} is not another rank of "
                    f"0..{self.size - 1}"
                )
            if not operation.is_send and not operation.tensor.is_contiguous():
                raise InvalidInputError(f"send_recv on group '{self.group}': a receive needs a contiguous tensor")
        if self.size > 1:
            self._send_recv(operations)

    def barrier(self) -> None:
        """Return after every rank has called it."""
        if self.size > 1:
            self._barrier()

    @property
    def innermost(self) -> "Transport":
        """The transport that moves the tensors: this one, or the one inside this wrapper. LOCAL."""
        return self

    @property
    def name_for_ops(self) -> str:
        """Name of this group for a device op that communicates by itself. LOCAL. Raises UnsupportedConfigError if no device
        op can use the group."""
        raise UnsupportedConfigError(
            f"a device op cannot communicate over group '{self.group}', a {type(self).__name__}; use hccl"
        )

    def note_op(self, operation: str, sent: int) -> None:  # noqa: B027 - only a recorder counts
        """Count a device op that communicates over this group by itself. LOCAL. `sent`: the most bytes that it may send."""

    def abort(self) -> None:  # noqa: B027 - only device transports have waits that no host call ends
        """End what this rank's device waits for in this group, with undefined results. LOCAL. The group is of no use after."""

    def leave(self) -> None:  # noqa: B027 - threads have no connections
        """Close this rank's connections of the group after a failure, so that calls of other ranks on it fail now. LOCAL. The
        group is of no use after."""

    def watch(self, watchdog: RankWatch) -> None:  # noqa: B027 - threads name late ranks without it
        """Let `watchdog` name the ended or late ranks in this rank's failures on the group, and set the deadline. LOCAL."""

    @abstractmethod
    def close(self) -> None:
        """Release the resources that this object opened. LOCAL. Safe to call twice."""

    @abstractmethod
    def _all_gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor: ...

    @abstractmethod
    def _reduce_scatter(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor: ...

    @abstractmethod
    def _all_to_all(self, x: torch.Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]) -> torch.Tensor: ...

    def _gather_tokens(self, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        message, unpack = pack(tensors)
        return unpack(self._all_gather(message, sizes))

    def _exchange_sizes(self, rows_per_rank: torch.Tensor) -> tuple[list[int], list[int]]:
        ones = [1] * self.size
        rows_from_each = self._all_to_all(rows_per_rank.contiguous(), ones, ones)
        sent_rows, received_rows = torch.stack([rows_per_rank, rows_from_each]).tolist()
        if min(received_rows) < 0 or sum(received_rows) > MAX_RECEIVED_ROWS:  # they decide how much memory is allocated
            detail = f"the ranks announce {received_rows} rows, which is impossible; look for the rank that is wrong"
            raise TransportError("exchange_tokens", self.group, self.rank, detail)
        return sent_rows, received_rows

    def _all_to_all_start(
        self, x: torch.Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]
    ) -> Pending[torch.Tensor]:
        received = self._all_to_all(x, send_sizes, recv_sizes)
        return Pending(stage="all_to_all", complete=lambda: received)

    def _exchange_tokens(self, tensors: Sequence[torch.Tensor], rows_per_rank: torch.Tensor) -> Exchanged:
        sent_rows, received_rows = self._exchange_sizes(rows_per_rank)
        self._check_sent_rows(sent_rows, tensors)
        message, unpack = pack(tensors)
        return unpack(self._all_to_all(message, sent_rows, received_rows)), sent_rows, received_rows

    @abstractmethod
    def _broadcast(self, x: torch.Tensor, source: int) -> torch.Tensor: ...

    @abstractmethod
    def _all_reduce(self, x: torch.Tensor) -> torch.Tensor: ...

    def _maximum_start(self, values: list[int]) -> Pending[list[int]]:
        if self.size <= FAN_OUT:
            one_each = [1] * self.size
            rows = torch.tensor([values] * self.size, dtype=torch.int64, device="cpu")
            pending = self._all_to_all_start(rows, one_each, one_each)
            return Pending(stage="maximum", complete=lambda: _highest(pending.finish()))

        def complete() -> list[int]:
            highest = values
            for distances in rounds_of(self.size):
                known = torch.tensor(highest, dtype=torch.int64, device="cpu")
                received = known.new_empty(len(distances) + 1, len(highest))
                received[0] = known
                exchange = []
                for distance, row in zip(distances, received[1:], strict=True):
                    exchange.append(SendRecv((self.rank + distance) % self.size, known, is_send=True))
                    exchange.append(SendRecv((self.rank - distance) % self.size, row, is_send=False))
                self._send_recv(exchange)
                highest = _highest(received)
            return highest

        return Pending(stage="maximum", complete=complete)

    @abstractmethod
    def _send_recv(self, operations: Sequence[SendRecv]) -> None: ...

    @abstractmethod
    def _barrier(self) -> None: ...

    def _check_together(self, operation: str, tensors: Sequence[torch.Tensor]) -> None:
        shapes = [each.shape for each in tensors]
        if not shapes or [len(shape) for shape in shapes] != [2] * len(shapes) or len({rows for rows, _ in shapes}) > 1:
            raise InvalidInputError(
                f"{operation} on group '{self.group}': tensors of shapes {[tuple(shape) for shape in shapes]} cannot "
                "share a message; they must be 2-D, with as many rows each"
            )

    def _check_sizes(
        self, operation: str, sizes: Sequence[int] | None, default: int, own_rows: int | None
    ) -> Sequence[int]:
        if sizes is None:
            return [default] * self.size
        if len(sizes) != self.size or min(sizes) < 0:
            raise InvalidInputError(
                f"{operation} on group '{self.group}': sizes {list(sizes)} must be {self.size} counts >= 0, one for each rank"
            )
        if own_rows is not None and sizes[self.rank] != own_rows:
            raise InvalidInputError(
                f"{operation} on group '{self.group}': rank {self.rank} brings {own_rows} rows, sizes {list(sizes)} say "
                f"{sizes[self.rank]}"
            )
        return sizes


@dataclass(frozen=True, slots=True)
class Groups:
    """A rank's place and its three groups. `ep` spans the whole grid, also without expert parallelism."""

    topology: ParallelTopology
    tp: Transport
    dp: Transport
    ep: Transport

    def __post_init__(self) -> None:
        topology = self.topology
        for transport, size, rank in (
            (self.tp, topology.tp_size, topology.tp_rank),
            (self.dp, topology.dp_size, topology.dp_rank),
            (self.ep, topology.world_size, topology.rank),
        ):
            if (transport.size, transport.rank) != (size, rank):
                raise InvalidInputError(
                    f"group '{transport.group}' has rank {transport.rank} of {transport.size}, but the topology {topology} "
                    f"needs rank {rank} of {size}"
                )

    def watch(self, watchdog: RankWatch) -> None:
        """Let `watchdog` watch all three transports. LOCAL."""
        for transport in (self.tp, self.dp, self.ep):
            transport.watch(watchdog)

    def leave(self) -> None:
        """Leave all three groups after a failure. LOCAL."""
        for transport in (self.tp, self.dp, self.ep):
            transport.leave()

    def close(self) -> None:
        """Close the three transports. LOCAL."""
        for transport in (self.tp, self.dp, self.ep):
            transport.close()


def _highest(rows: torch.Tensor) -> list[int]:
    """The maximum of each column. In Python: for rows as few as these, torch's reduction takes longer."""
    return [max(column) for column in zip(*rows.tolist(), strict=True)]


def rounds_of(size: int) -> list[range]:
    """Return the distances to the ranks that a rank sends to, round by round, so that something of each rank reaches all.

    Before a round, a rank has what `known` ranks had: itself and those before it. The round makes that FAN_OUT times as many.
    The last round may bring some of it twice, so it suits maxima and not sums. (Hensgen, Finkel, Manber: Two Algorithms for
    Barrier Synchronization, 1988, with FAN_OUT in place of 2.)
    """
    known, rounds = 1, []
    while known < size:
        rounds.append(range(known, min(size, known * FAN_OUT), known))
        known *= FAN_OUT
    return rounds


def sum_in_rank_order(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Add the parts in rank order, floating-point parts in float32 or wider. Every run gives the same bits."""
    first = parts[0]
    wide = torch.promote_types(first.dtype, torch.float32) if first.is_floating_point() else first.dtype
    total = first.to(wide, copy=True)
    for part in parts[1:]:
        total += part
    return total.to(first.dtype)


def gather_texts(transport: Transport, text: str, max_bytes: int, device_type: str = "cpu") -> list[str]:
    """Gather every rank's text, in rank order, cut after max_bytes. COLLECTIVE over a group that moves device_type tensors."""
    encoded = text.encode()[:max_bytes]
    row = torch.zeros(1, max_bytes, dtype=torch.uint8, device="cpu")
    if encoded:
        row[0, : len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    rows = transport.all_gather(row.to(device_type)).tolist()
    return [bytes(each).rstrip(b"\0").decode(errors="replace") for each in rows]
