"""Transport over a process group of torch.distributed (c10d): the part that all backends share."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
import torch.distributed as dist

from vllm_npu.core.handles import Pending
from vllm_npu.core.token_layout import offsets
from vllm_npu.errors import RankFailureError, TransportError, UnsupportedConfigError
from vllm_npu.transport.base import RankWatch, SendRecv, Transport, sum_in_rank_order

# COMPAT(torch < 2.13): both functions had other names. CAN REMOVE when torch >= 2.13 is required.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class TorchDistTransport(Transport):
    """close() leaves the process group open, since the caller made it."""

    backend: ClassVar[str]  # c10d's name of the backend
    device_type: ClassVar[str]  # of the tensors that the backend moves

    @classmethod
    def device_of(cls, local_rank: int) -> torch.device:
        """The device of rank `local_rank` of this machine. Raises UnsupportedConfigError if torch sees too few devices."""
        if cls.device_type == "cpu":
            return torch.device("cpu")
        accelerator = torch.accelerator.current_accelerator()
        found = accelerator.type if accelerator is not None and torch.accelerator.is_available() else "cpu"
        count = torch.accelerator.device_count() if found == cls.device_type else 0
        if local_rank >= count:
            raise UnsupportedConfigError(
                f"transport {cls.backend} needs a {cls.device_type} device for each rank, and torch sees {count}; start fewer "
                "ranks, or use gloo"
            )
        return torch.device(cls.device_type, local_rank)

    def __init__(self, process_group: dist.ProcessGroup, group: str) -> None:
        super().__init__(group, dist.get_rank(process_group), dist.get_world_size(process_group))
        self._process_group: dist.ProcessGroup | None = process_group
        self._watchdog: RankWatch | None = None

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The group's process group. Raises TransportError after leave()."""
        if self._process_group is None:
            raise TransportError("process_group", self.group, self.rank, "this rank has left the group after a failure")
        return self._process_group

    def leave(self) -> None:
        """Forget the process group. Its connections close when nobody else keeps it. LOCAL."""
        self._process_group = None

    def watch(self, watchdog: RankWatch) -> None:
        """Failures name ranks from now on. The process group keeps its own time-out; only gloo takes the watchdog's. LOCAL."""
        self._watchdog = watchdog

    @property
    def deadline(self) -> float | None:
        """Seconds that a collective may take, as the group's watchdog says. None: no watchdog watches the group."""
        return None if self._watchdog is None else self._watchdog.deadline

    def close(self) -> None:
        """Do nothing: this object opened nothing."""

    @contextmanager
    def _collective(self, operation: str) -> Iterator[None]:
        """Turn errors inside into TransportErrors of `operation`, also errors of the operations that it calls."""
        if self._watchdog is not None:
            self._watchdog.begin(operation, self.group)
        try:
            yield
            if self._watchdog is not None:
                self._watchdog.end()
        except RankFailureError as error:
            raise RankFailureError(operation, self.group, self.rank, error.detail, error.ranks) from error
        except RuntimeError as error:
            raise self._failure(operation, str(error)) from error

    def _failure(self, operation: str, detail: str) -> TransportError:
        if self._watchdog is None:
            return TransportError(operation, self.group, self.rank, detail)
        return self._watchdog.failure(operation, self.group, self.rank, detail)

    def _wait(self, work: dist.Work) -> None:
        work.wait()

    def _all_gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        gathered = x.new_empty((sum(sizes), *x.shape[1:]))
        with self._collective("all_gather"):
            if len(set(sizes)) == 1:
                all_gather_single(gathered, x, group=self.process_group)
            else:
                dist.all_gather(list(gathered.split(list(sizes))), x, group=self.process_group)
        return gathered

    def _reduce_scatter(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        own = x.new_empty((sizes[self.rank], *x.shape[1:]))
        with self._collective("reduce_scatter"):
            if len(set(sizes)) == 1:
                reduce_scatter_single(own, x, group=self.process_group)
            else:
                dist.reduce_scatter(own, list(x.split(list(sizes))), group=self.process_group)
        return own

    def _all_to_all(self, x: torch.Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]) -> torch.Tensor:
        received = x.new_empty((sum(recv_sizes), *x.shape[1:]))
        with self._collective("all_to_all"):
            dist.all_to_all_single(received, x, list(recv_sizes), list(send_sizes), group=self.process_group)
        return received

    def _all_to_all_start(
        self, x: torch.Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]
    ) -> Pending[torch.Tensor]:
        received = x.new_empty((sum(recv_sizes), *x.shape[1:]))
        with self._collective("all_to_all"):
            work = dist.all_to_all_single(
                received, x, list(recv_sizes), list(send_sizes), group=self.process_group, async_op=True
            )

        def complete() -> torch.Tensor:
            with self._collective("all_to_all"):
                self._wait(work)
            return received

        self._note_in_flight(work)
        return Pending(stage="all_to_all", complete=complete)

    def _note_in_flight(self, work: dist.Work) -> None:
        """Hook for subclasses, called with each operation that continues after its start."""

    def _broadcast(self, x: torch.Tensor, source: int) -> torch.Tensor:
        result = x.clone() if self.rank == source else torch.empty_like(x)
        with self._collective("broadcast"):
            dist.broadcast(result, group_src=source, group=self.process_group)
        return result

    def _all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        result = x.clone()
        with self._collective("all_reduce"):
            dist.all_reduce(result, group=self.process_group)
        return result

    def _send_recv(self, operations: Sequence[SendRecv]) -> None:
        if not operations:
            return
        with self._collective("send_recv"):
            works = dist.batch_isend_irecv(
                [
                    dist.P2POp(
                        dist.isend if operation.is_send else dist.irecv,
                        operation.tensor.contiguous(),
                        group=self.process_group,
                        group_peer=operation.peer,
                    )
                    for operation in operations
                ]
            )
            for work in works:
                self._wait(work)

    def _barrier(self) -> None:
        with self._collective("barrier"):
            dist.barrier(group=self.process_group)

    def _all_gather_from_peers(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """All-gather of any sizes without padding. Each rank sends its rows once to every other rank."""
        gathered = x.new_empty((sum(sizes), *x.shape[1:]))
        starts = offsets(sizes)
        gathered[starts[self.rank] : starts[self.rank + 1]] = x
        exchange = []
        for step in range(1, self.size):
            destination = (self.rank + step) % self.size
            source = (self.rank - step) % self.size
            if sizes[self.rank]:
                exchange.append(SendRecv(destination, x, is_send=True))
            if sizes[source]:
                exchange.append(SendRecv(source, gathered[starts[source] : starts[source + 1]], is_send=False))
        with self._collective("all_gather"):
            self._send_recv(exchange)
        return gathered

    def _reduce_scatter_by_exchange(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Reduce-scatter of any sizes without padding: an all-to-all, and then a float32 sum in rank order. Every run gives
        the same bits."""
        own_rows = sizes[self.rank]
        with self._collective("reduce_scatter"):
            received = self._all_to_all(x, sizes, [own_rows] * self.size)
        return sum_in_rank_order(received.view(self.size, own_rows, *x.shape[1:]).unbind(0))
