"""Transport over a c10d ProcessGroup: what all of torch.distributed's backends share."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from vllm_npu.errors import TransportError
from vllm_npu.transport.base import SendRecv, Transport

# torch 2.13 renamed both; the older names stay until 2.10 is no longer supported.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class TorchDistTransport(Transport):
    """The group belongs to whoever made it: close() leaves it open."""

    def __init__(self, process_group: dist.ProcessGroup, group: str) -> None:
        super().__init__(group, dist.get_rank(process_group), dist.get_world_size(process_group))
        self.process_group = process_group

    def close(self) -> None:
        """Nothing to release."""

    @contextmanager
    def _collective(self, operation: str) -> Iterator[None]:
        """Errors inside as TransportError of `operation`, also where it is made of other operations."""
        try:
            yield
        except RuntimeError as error:
            detail = error.detail if isinstance(error, TransportError) else str(error)
            raise TransportError(operation, self.group, self.rank, detail) from error

    def _all_gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        gathered = x.new_empty((sum(sizes), *x.shape[1:]))
        with self._collective("all_gather"):
            if len(set(sizes)) == 1:
                _all_gather_single(gathered, x, group=self.process_group)
            else:
                dist.all_gather(list(gathered.split(list(sizes))), x, group=self.process_group)
        return gathered

    def _reduce_scatter(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        own = x.new_empty((sizes[self.rank], *x.shape[1:]))
        with self._collective("reduce_scatter"):
            if len(set(sizes)) == 1:
                _reduce_scatter_single(own, x, group=self.process_group)
            else:
                dist.reduce_scatter(own, list(x.split(list(sizes))), group=self.process_group)
        return own

    def _all_to_all(self, x: torch.Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]) -> torch.Tensor:
        received = x.new_empty((sum(recv_sizes), *x.shape[1:]))
        with self._collective("all_to_all"):
            dist.all_to_all_single(received, x, list(recv_sizes), list(send_sizes), group=self.process_group)
        return received

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
                work.wait()

    def _barrier(self) -> None:
        with self._collective("barrier"):
            dist.barrier(group=self.process_group)
