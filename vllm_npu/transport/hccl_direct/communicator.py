"""PyHCCL: a transport that opens its own HCCL communicator, for groups without ProcessGroupHCCL."""

import ctypes
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch_npu

from vllm_npu.core.token_layout import offsets
from vllm_npu.errors import InvalidInputError, TransportError
from vllm_npu.transport.base import SendRecv, Transport, sum_in_rank_order
from vllm_npu.transport.hccl import batches_for_hccl
from vllm_npu.transport.hccl_direct import library
from vllm_npu.transport.hccl_direct.chip import limits_of_this_chip
from vllm_npu.transport.hccl_direct.library import BYTES, DATA_TYPES, RECV, SEND, SUM, RootInfo, SendRecvItem
from vllm_npu.transport.host import host_number


class StatelessGroup(Protocol):
    """The part of vLLM's StatelessProcessGroup that PyHCCL uses."""

    rank: int
    world_size: int

    def broadcast_obj(self, obj: Any, src: int) -> Any: ...


class PyHcclTransport(Transport):
    """A transport on the current device. Only the constructor uses `bootstrap`.

    Every method queues work on the current stream and returns before the device is done. check() raises errors that HCCL
    finds later. Uneven rows go by HcclAllGatherV and HcclReduceScatterV if the chip has them and all ranks share a host, and
    by HcclAlltoAllV otherwise. Reductions take DATA_TYPES; all other methods move bytes, of any dtype. Graph capture: not
    tried.
    """

    def __init__(
        self,
        bootstrap: Any,  # sends the root info: a c10d ProcessGroup of CPU tensors or of HCCL, or a StatelessGroup
        group: str = "pyhccl",
    ) -> None:
        """COLLECTIVE over the ranks of `bootstrap`. Raises TransportError if one does not come within HCCL_CONNECT_TIMEOUT."""
        rank, size = _place_in(bootstrap)
        super().__init__(group, rank, size)
        self.device = torch.device("npu", torch.accelerator.current_device_index())
        self._library = library.load()
        self._comm = ctypes.c_void_p()
        root = RootInfo()
        if rank == 0:
            self._call("open", "HcclGetRootInfo", ctypes.byref(root))
        root = RootInfo.from_buffer_copy(_broadcast_bytes(bootstrap, bytes(root)))
        self._call("open", "HcclCommInitRootInfo", size, ctypes.byref(root), rank, ctypes.byref(self._comm))
        hosts = self.all_gather(torch.tensor([host_number()], device=self.device)).tolist()
        self._has_v = limits_of_this_chip().uneven_collectives and len(set(hosts)) == 1

    def send(self, tensor: torch.Tensor, peer: int) -> None:
        """Send one message to rank `peer`, which must call recv() at the same time."""
        self._check_peer("send", peer)
        sent = tensor.contiguous()
        self._on_stream("send", "HcclSend", sent.data_ptr(), sent.nbytes, BYTES, peer)

    def recv(self, tensor: torch.Tensor, peer: int) -> None:
        """Fill a contiguous tensor with one message of rank `peer`."""
        self._check_peer("recv", peer)
        if not tensor.is_contiguous():
            raise InvalidInputError(f"recv on group '{self.group}': a receive needs a contiguous tensor")
        self._on_stream("recv", "HcclRecv", tensor.data_ptr(), tensor.nbytes, BYTES, peer)

    def check(self) -> None:
        """Raise TransportError if HCCL has found an error in earlier calls. LOCAL. Host sync: no."""
        code = ctypes.c_int()
        self._call("check", "HcclGetCommAsyncError", self._comm, ctypes.byref(code))
        if code.value:
            remedy = library.REMEDIES.get(code.value, library.OTHER)
            raise TransportError("check", self.group, self.rank, f"HCCL has error {code.value} {remedy}")

    def close(self) -> None:
        """Wait for the device, and destroy the communicator. LOCAL."""
        if self._comm.value:
            comm, self._comm = self._comm, ctypes.c_void_p()
            torch.accelerator.synchronize(self.device)
            self._call("close", "HcclCommDestroy", comm)

    def _all_gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        gathered = _empty_rows(x, sum(sizes))
        counts = [size * _row_bytes(x) for size in sizes]
        if sum(counts) == 0:
            return gathered
        source, target = _address(x, gathered), gathered.data_ptr()
        if len(set(sizes)) == 1:
            self._on_stream("all_gather", "HcclAllGather", source, target, x.nbytes, BYTES)
        elif self._has_v:
            self._on_stream(
                "all_gather", "HcclAllGatherV", source, x.nbytes, target, _array(counts), _array(_starts(counts)), BYTES
            )
        else:  # the same rows to every rank
            self._exchange("all_gather", x, [x.nbytes] * self.size, [0] * self.size, gathered, counts)
        return gathered

    def _reduce_scatter(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        own, even = sizes[self.rank], len(set(sizes)) == 1
        if not even and not self._has_v:
            received = self._all_to_all(x, sizes, [own] * self.size)
            return sum_in_rank_order(received.view(self.size, own, *x.shape[1:]).unbind(0))
        data_type, result = self._data_type("reduce_scatter", x), _empty_rows(x, own)
        if x.numel() == 0:
            return result
        source, target = x.data_ptr(), _address(result, x)
        if even:
            self._on_stream("reduce_scatter", "HcclReduceScatter", source, target, result.numel(), data_type, SUM)
        else:
            counts = [size * math.prod(x.shape[1:]) for size in sizes]
            self._on_stream(
                "reduce_scatter", "HcclReduceScatterV", source, _array(counts), _array(_starts(counts)),
                target, result.numel(), data_type, SUM,
            )  # fmt: skip
        return result

    def _all_to_all(self, x: torch.Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]) -> torch.Tensor:
        received = _empty_rows(x, sum(recv_sizes))
        sent, expected = ([size * _row_bytes(x) for size in sizes] for sizes in (send_sizes, recv_sizes))
        self._exchange("all_to_all", x, sent, _starts(sent), received, expected)
        return received

    def _broadcast(self, x: torch.Tensor, source: int) -> torch.Tensor:
        result = x.clone()
        if x.numel():
            self._on_stream("broadcast", "HcclBroadcast", result.data_ptr(), result.nbytes, BYTES, source)
        return result

    def _all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        result = torch.empty_like(x)
        if x.numel():
            data_type = self._data_type("all_reduce", x)
            self._on_stream("all_reduce", "HcclAllReduce", x.data_ptr(), result.data_ptr(), x.numel(), data_type, SUM)
        return result

    def _send_recv(self, operations: Sequence[SendRecv]) -> None:
        for batch in batches_for_hccl(operations):
            tensors = [each.tensor.contiguous() for each in batch]
            items = [
                SendRecvItem(SEND if each.is_send else RECV, tensor.data_ptr(), tensor.nbytes, BYTES, each.peer)
                for each, tensor in zip(batch, tensors, strict=True)
            ]
            self._on_stream("send_recv", "HcclBatchSendRecv", (SendRecvItem * len(items))(*items), len(items))

    def _barrier(self) -> None:
        self._on_stream("barrier", "HcclBarrier")
        torch.accelerator.current_stream(self.device).synchronize()

    def _exchange(
        self,
        operation: str,
        x: torch.Tensor,
        sent: Sequence[int],  # bytes for each rank
        starts: Sequence[int],  # their starts in x, in bytes
        received: torch.Tensor,
        expected: Sequence[int],  # bytes from each rank
    ) -> None:
        spare = _empty_rows(x, 1)  # its address stands for empty tensors
        self._on_stream(
            operation, "HcclAlltoAllV", _address(x, spare), _array(sent), _array(starts), BYTES,
            _address(received, spare), _array(expected), _array(_starts(expected)), BYTES,
        )  # fmt: skip

    def _on_stream(self, operation: str, function: str, *arguments: Any) -> None:
        if not self._comm.value:
            raise TransportError(operation, self.group, self.rank, "the communicator is closed; open another one")
        # npu_stream also waits until torch_npu's task queue has launched its ops.
        stream = torch_npu.npu.current_stream(self.device).npu_stream
        self._call(operation, function, *arguments, self._comm, stream)

    def _call(self, operation: str, function: str, *arguments: Any) -> None:
        self._library.call(function, *arguments, operation=operation, group=self.group, rank=self.rank)

    def _data_type(self, operation: str, x: torch.Tensor) -> int:
        if x.dtype not in DATA_TYPES:
            known = ", ".join(str(each).removeprefix("torch.") for each in DATA_TYPES)
            raise InvalidInputError(f"{operation} on group '{self.group}': HCCL adds {known}, not {x.dtype}")
        return DATA_TYPES[x.dtype]

    def _check_peer(self, operation: str, peer: int) -> None:
        if not 0 <= peer < self.size or peer == self.rank:
            raise InvalidInputError(
                f"{operation} on group '{self.group}': peer {peer} of rank {self.rank} is not another rank of "
                f"0..{self.size - 1}"
            )


def _place_in(bootstrap: Any) -> tuple[int, int]:
    """Rank and number of ranks in a bootstrap group."""
    if hasattr(bootstrap, "broadcast_obj"):
        return bootstrap.rank, bootstrap.world_size
    return bootstrap.rank(), bootstrap.size()


def _broadcast_bytes(bootstrap: Any, payload: bytes) -> bytes:
    """Return rank 0's payload. The payloads of all ranks have the same length."""
    if hasattr(bootstrap, "broadcast_obj"):
        received: bytes = bootstrap.broadcast_obj(payload, 0)
        return received
    kinds = {each.type for each in bootstrap._device_types}
    tensor = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to("cpu" if "cpu" in kinds else "npu")
    bootstrap.broadcast(tensor, 0).wait()
    return bytes(tensor.tolist())


def _row_bytes(x: torch.Tensor) -> int:
    return math.prod(x.shape[1:]) * x.element_size()


def _empty_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Fresh rows of x's shape and dtype, at an address that is not null. HCCL refuses null also for 0 rows."""
    return x.new_empty((max(rows, 1), *x.shape[1:]))[:rows]


def _address(x: torch.Tensor, other: torch.Tensor) -> int:
    return x.data_ptr() if x.numel() else other.data_ptr()


def _array(values: Sequence[int]) -> ctypes.Array[ctypes.c_uint64]:
    return (ctypes.c_uint64 * len(values))(*values)


def _starts(counts: Sequence[int]) -> list[int]:
    return offsets(counts)[:-1]
