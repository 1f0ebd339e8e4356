"""Transport between threads of one process, for unit tests and `verify --transport threaded`. It opens no sockets."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vllm_npu.core.token_layout import offsets
from vllm_npu.errors import TransportError
from vllm_npu.transport.base import SendRecv, Transport, sum_in_rank_order


class ThreadedGroup:
    """State that the threads of one group share: a slot for each rank, and a barrier that names missing ranks."""

    def __init__(self, group: str, size: int, timeout: float) -> None:
        self.group = group
        self.size = size
        self.timeout = timeout
        self.slots: list[Any] = [None] * size
        self._barrier = threading.Barrier(size)
        self._meetings = [0] * size  # calls of the barrier by each rank; late ranks have a lower count

    def exchange(self, operation: str, rank: int, value: Any) -> list[Any]:
        """Return every rank's value, in rank order. Raises TransportError on all ranks if one does not come in time, or if
        ranks are in different operations."""
        self.slots[rank] = (operation, value)
        self.wait(operation, rank)
        posted = list(self.slots)
        self.wait(operation, rank)
        operations = [name for name, _ in posted]
        if len(set(operations)) > 1:
            raise TransportError(operation, self.group, rank, f"ranks are in different collectives: {operations}")
        return [value for _, value in posted]

    def wait(self, operation: str, rank: int) -> None:
        """Wait for all ranks. Raises TransportError on every rank if one does not come in time."""
        self._meetings[rank] += 1
        try:
            self._barrier.wait(self.timeout)
        except threading.BrokenBarrierError:
            missing = [other for other, count in enumerate(self._meetings) if count < self._meetings[rank]]
            if not missing:
                return  # all ranks came; one of them failed later and aborted the barrier before this thread left it
            raise TransportError(
                operation, self.group, rank, f"ranks {missing} failed, or did not come within {self.timeout:g} s"
            ) from None

    def abort(self) -> None:
        """Make every waiting rank fail now, since one rank has raised."""
        self._barrier.abort()


class ThreadedTransport(Transport):
    """One rank of a ThreadedGroup."""

    def __init__(self, shared: ThreadedGroup, rank: int) -> None:
        super().__init__(shared.group, rank, shared.size)
        self._shared = shared

    def close(self) -> None:
        """Do nothing: this object opened nothing."""

    def _exchange(self, operation: str, value: Any, read: Callable[[list[Any]], torch.Tensor]) -> torch.Tensor:
        """Post `value`, and copy from all ranks' values by `read`. Returns after all ranks have read."""
        result = read(self._shared.exchange(operation, self.rank, value))
        self._shared.wait(operation, self.rank)
        return result

    def _all_gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        def read(parts: list[torch.Tensor]) -> torch.Tensor:
            self._check_received("all_gather", [part.shape[0] for part in parts], sizes)
            self._check_alike("all_gather", parts)
            return torch.cat(parts)

        return self._exchange("all_gather", x, read)

    def _reduce_scatter(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        start = offsets(sizes)[self.rank]

        def read(parts: list[torch.Tensor]) -> torch.Tensor:
            return sum_in_rank_order([part[start : start + sizes[self.rank]] for part in parts])

        return self._exchange("reduce_scatter", x, read)

    def _all_to_all(self, x: torch.Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]) -> torch.Tensor:
        def read(posted: list[tuple[torch.Tensor, Sequence[int]]]) -> torch.Tensor:
            self._check_received("all_to_all", [sizes[self.rank] for _, sizes in posted], recv_sizes)
            self._check_alike("all_to_all", [part for part, _ in posted])
            return torch.cat([part.split(list(sizes))[self.rank] for part, sizes in posted])

        return self._exchange("all_to_all", (x, send_sizes), read)

    def _broadcast(self, x: torch.Tensor, source: int) -> torch.Tensor:
        return self._exchange("broadcast", x, lambda parts: parts[source].clone())

    def _all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self._exchange("all_reduce", x, sum_in_rank_order)

    def _send_recv(self, operations: Sequence[SendRecv]) -> None:
        """COLLECTIVE: all ranks of the group must call it, also ranks without operations."""
        outgoing: dict[int, list[torch.Tensor]] = {}
        for operation in operations:
            if operation.is_send:
                outgoing.setdefault(operation.peer, []).append(operation.tensor)
        posted = self._shared.exchange("send_recv", self.rank, outgoing)
        expected = [operation for operation in operations if not operation.is_send]
        for operation in expected:
            messages = posted[operation.peer].get(self.rank, [])
            sent = messages.pop(0) if messages else None
            if sent is None or sent.shape != operation.tensor.shape or sent.dtype != operation.tensor.dtype:
                what = "nothing" if sent is None else f"{sent.dtype} {tuple(sent.shape)}"
                wanted = f"{operation.tensor.dtype} {tuple(operation.tensor.shape)}"
                raise TransportError(
                    "send_recv", self.group, self.rank, f"rank {operation.peer} sent {what}, not {wanted}"
                )
            operation.tensor.copy_(sent)
        self._shared.wait("send_recv", self.rank)

    def _barrier(self) -> None:
        self._shared.exchange("barrier", self.rank, None)

    def _check_received(self, operation: str, received: list[int], expected: Sequence[int]) -> None:
        if received != list(expected):
            raise TransportError(
                operation, self.group, self.rank, f"ranks sent {received} rows where {list(expected)} were expected"
            )

    def _check_alike(self, operation: str, parts: list[torch.Tensor]) -> None:
        rows = {(part.dtype, part.shape[1:]) for part in parts}
        if len(rows) > 1:
            raise TransportError(
                operation,
                self.group,
                self.rank,
                f"ranks brought rows of different dtype or shape: {sorted(map(str, rows))}",
            )
