"""Windows: GPU memory of each rank that all ranks of a group on one host can write. Uses torch's symmetric memory.

All layers share the windows of a process group. There are two windows, so that two micro-batches may be in flight.

A kernel that waits longer than the deadline gives up. It writes the missing ranks into a report, one page of host memory that
all ranks map. Kernels of the other ranks then give up too, and no kernel of a rank that gave up tells others that its rows are
complete. So every rank finds the failure, also a rank that had all of its own rows.
"""

import ctypes
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, proxy

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem

from vllm_npu import envs
from vllm_npu.core.token_layout import ceil_div
from vllm_npu.errors import InvalidInputError, TransportError, UnsupportedConfigError
from vllm_npu.transport.base import Transport, gather_texts
from vllm_npu.transport.host import host_identity
from vllm_npu.transport.torch_dist import TorchDistTransport

NUM_WINDOWS = 2
EPOCH_WORDS = 4  # int32 words between the epochs of two windows: 16 bytes, which a prepared launch needs
ALIGNMENT = 256  # bytes; offsets in a window are multiples of it
MAX_PLACE_BYTES = 128  # of a host's identity and a device's UUID
MAX_TEXT_BYTES = 256
REGISTER_MAPPED = 3  # flags of cudaHostRegister: the memory is mapped, and pinned for all contexts
TAKE_FLAGS = 16
"""Flags that each rank has for combine out of windows. 128 took 1 us more at 32 tokens, and 4 us more at 1024
(docs/benchmarks/2026-11-29-exchange-2xH200.md)."""

STAGES = {1: "dispatch", 2: "combine"}  # numbers that the kernels write into the report


def first_epochs(device: torch.device) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The epochs of all windows before the first exchange, and each window's [2]: of its next dispatch and combine."""
    epochs = torch.tensor([1, 0, 0, 0] * NUM_WINDOWS, dtype=torch.int32, device=device)
    return epochs, [own[:2] for own in epochs.split(EPOCH_WORDS)]


def align(num_bytes: int) -> int:
    """num_bytes rounded up to a multiple of ALIGNMENT."""
    return ceil_div(num_bytes, ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class SymmetricFacts:
    """Facts that decide whether the ranks of a group can share memory. Equal on every rank."""

    num_ranks: int
    num_hosts: int
    cuda: bool  # whether every rank has its own CUDA device
    peer_access: bool  # whether every device can write the memory of every other device
    triton: bool  # whether every rank can import triton


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSize:
    """Sizes of the parts of one window. Other ranks' dispatch writes the received part, and their combine the returned part."""

    received_bytes: int
    returned_bytes: int
    rank_flags: int  # number of 4-byte flags that each rank has for each of the two stages

    def fits(self, other: "WindowSize") -> bool:
        """Whether a window of this size is large enough for uses of size `other`."""
        return (
            other.received_bytes <= self.received_bytes
            and other.returned_bytes <= self.returned_bytes
            and other.rank_flags <= self.rank_flags
        )


class SharedReport:
    """Stages that kernels waited for in vain, by missing rank. One page of host memory that the ranks of a host share.

    The kernels of all ranks write it, and the host of each rank reads it without a sync. The constructor is COLLECTIVE.
    """

    def __init__(self, transport: TorchDistTransport) -> None:
        path, failure = "", ""
        with ExitStack() as until_all_have_opened:
            try:
                path = _new_page(until_all_have_opened) if transport.rank == 0 else ""
            except OSError as error:
                failure = f"rank 0: {error}"
            path = gather_texts(transport, path, MAX_TEXT_BYTES, transport.device_type)[0]
            try:
                self._words = _map_page(path, 1 + transport.size)
                self.address = ctypes.addressof(self._words)
                _check_cuda(torch.cuda.cudart().cudaHostRegister(self.address, mmap.PAGESIZE, REGISTER_MAPPED))
            except (OSError, RuntimeError) as error:
                failure = failure or f"rank {transport.rank}: {error}"
            failures = list(filter(None, gather_texts(transport, failure, MAX_TEXT_BYTES, transport.device_type)))
        if failures:
            raise TransportError(
                "share host memory", transport.group, transport.rank, f"{failures[0]}; run all ranks in one container"
            )
        self._nothing_missing = bytes(self._words)

    def missing(self) -> dict[int, str]:
        """The stage that each missing rank did not reach. Empty while no kernel of any rank has given up. LOCAL."""
        if bytes(self._words) == self._nothing_missing:
            return {}
        return {rank: STAGES[stage] for rank, stage in enumerate(self._words[1:]) if stage}

    def close(self) -> None:
        """Unpin the page. LOCAL. No kernel of this rank may run."""
        _check_cuda(torch.cuda.cudart().cudaHostUnregister(self.address))


def _new_page(until_all_have_opened: ExitStack) -> str:
    """Make a page of memory without a name in the file system. Returns a path that opens it while the descriptor is open."""
    descriptor = os.memfd_create("vllm_npu_report")
    until_all_have_opened.callback(os.close, descriptor)
    os.ftruncate(descriptor, mmap.PAGESIZE)
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _map_page(path: str, num_words: int) -> "ctypes.Array[ctypes.c_int32]":
    """The first int32 words of the page. They keep the mapping alive."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        return (ctypes.c_int32 * num_words).from_buffer(mmap.mmap(descriptor, mmap.PAGESIZE))
    finally:
        os.close(descriptor)


def _check_cuda(code: Any) -> None:
    """Raise RuntimeError for a result of CUDA's runtime that is not success."""
    if int(code):
        raise RuntimeError(f"CUDA error {int(code)}: {torch.cuda.cudart().cudaGetErrorString(code)}")


class SymmetricWindows:
    """The windows of one group, with the kernel arguments of this rank. The constructor is COLLECTIVE.

    Takes `bytes_per_rank` of memory on each GPU until close(). Raises TransportError if the GPUs cannot share memory.
    """

    def __init__(self, transport: TorchDistTransport, size: WindowSize, timeout: float) -> None:
        process_group, group = transport.process_group, transport.group
        self.group = group
        self.rank = transport.rank
        self.num_ranks = transport.size
        self.size = size
        self._transport = proxy(transport)  # windows must not keep the process group alive, since they end with it
        self.timeout = timeout
        self.timeout_ns = int(timeout * 1e9)
        self.device = torch.device("cuda", torch.cuda.current_device())
        flags_bytes = align(4 * size.rank_flags * self.num_ranks)
        self.returned_offset = align(size.received_bytes)
        self.dispatch_flags_offset = self.returned_offset + align(size.returned_bytes)
        self.combine_flags_offset = self.dispatch_flags_offset + flags_bytes
        self.take_flags_offset = self.combine_flags_offset + flags_bytes
        self._window_bytes = self.take_flags_offset + align(4 * TAKE_FLAGS * self.num_ranks)
        self.bytes_per_rank = NUM_WINDOWS * self._window_bytes
        try:
            buffer = symm_mem.empty(self.bytes_per_rank, dtype=torch.uint8, device=self.device)
            self._shared = symm_mem.rendezvous(buffer, process_group)
        except RuntimeError as error:  # CUDA's and c10d's errors are RuntimeErrors
            raise TransportError("open windows", group, self.rank, f"{self.bytes_per_rank} bytes: {error}") from error
        self._buffer: torch.Tensor | None = buffer.zero_()
        clock = torch.zeros(1, dtype=torch.int64, device=self.device)
        failed = torch.zeros(1, dtype=torch.int32, device=self.device)
        all_epochs, own_epochs = first_epochs(self.device)
        # Kernel arguments for each window: addresses of the window on all ranks, epochs of its next dispatch and combine,
        # epochs of all windows, clock, failed. A dispatch kernel advances the epoch of combine, and a combine kernel that of
        # dispatch, so that no kernel that succeeds writes an epoch that it reads.
        self.kernel_tensors = [
            (
                torch.tensor(
                    [base + window * self._window_bytes for base in self._shared.buffer_ptrs],
                    dtype=torch.int64,
                    device=self.device,
                ),
                own_epochs[window],
                all_epochs,
                clock,
                failed,
            )
            for window in range(NUM_WINDOWS)
        ]
        self._report = SharedReport(transport)
        self.report_address = self._report.address
        self._failure: TransportError | None = None
        # torch.cuda.current_stream() would take 2 us more of host time for its object.
        self._current_stream = torch._C._cuda_getCurrentRawStream
        self._free = deque(range(NUM_WINDOWS))
        self._last_stream: int | None = None  # raw handle of the stream of the last exchange
        torch.cuda.synchronize(self.device)
        transport.barrier()

    def bytes_of(self, window: int) -> torch.Tensor:
        """View of this rank's `window` as [bytes] uint8."""
        if self._buffer is None:
            raise InvalidInputError(
                f"the windows of group '{self.group}' are closed; dispatch anew, which opens others"
            )
        return self._buffer[window * self._window_bytes : (window + 1) * self._window_bytes]

    def returned_address(self, window: int) -> int:
        """Address of the returned part of this rank's `window`. LOCAL."""
        return self.bytes_of(window).data_ptr() + self.returned_offset

    def take(self) -> int:
        """Take a free window. LOCAL. Every rank must take and give back windows in the same order, and call enter() before its
        kernels.

        Raises InvalidInputError if all windows are in flight.
        """
        if not self._free:
            raise InvalidInputError(
                f"{NUM_WINDOWS} dispatches on group '{self.group}' are in flight already; combine one of them first"
            )
        return self._free.popleft()

    def give_back(self, window: int) -> None:
        """Free `window` for kernels that are queued after this call. LOCAL."""
        self._free.append(window)

    def abandon(self, window: int) -> None:
        """Free a window whose combine will not run, for kernels that are queued after this call. LOCAL. Host sync: no.

        Every rank must abandon the exchange. A rank that combines it waits for the others until the deadline.
        """
        self._free.append(window)
        if len(self._free) == NUM_WINDOWS:  # from here on the order does not depend on the failure
            self._free = deque(range(NUM_WINDOWS))
        self.enter()
        _, epochs, *_ = self.kernel_tensors[window]
        epochs[0] += 1  # as combine does: the flags of the abandoned dispatch must not satisfy the next one

    def enter(self) -> int:
        """Let the current stream wait for the group's last kernel, and return the raw handle of the current stream. LOCAL.
        Host sync: no.

        A group's kernels run one after another, also on several streams. Two kernels that wait for other ranks at the same
        time could fill two GPUs and keep each other from running.
        """
        stream = self._current_stream(self.device.index)
        if stream != self._last_stream:
            if self._last_stream is not None:
                last = torch.cuda.ExternalStream(self._last_stream, self.device)
                with torch.cuda.stream(last):
                    captured = torch.cuda.is_current_stream_capturing()
                if (
                    captured == torch.cuda.is_current_stream_capturing()
                ):  # a captured stream cannot wait for work outside the capture
                    torch.cuda.current_stream(self.device).wait_stream(last)
            self._last_stream = stream
        return stream

    def check(self, operation: str) -> None:
        """Raise TransportError if a kernel of any rank has given up waiting. LOCAL. Host sync: no, it reads host memory.

        Kernels run later than the host queues them. So a check covers the kernels that have ended: call it after a sync with
        a step's output, and before the output is used. The error is a RankFailureError where a watchdog watches the group;
        the first one then takes up to watchdog.GRACE_SECONDS.
        """
        if self._buffer is None:
            raise InvalidInputError(
                f"the windows of group '{self.group}' are closed; dispatch anew, which opens others"
            )
        if self._failure is None:
            missing = self._report.missing()
            if not missing:
                return
            found = ", ".join(f"rank {rank} did not reach {stage}" for rank, stage in missing.items())
            self._failure = self._transport._failure(
                operation, f"{found} within {self.timeout:g} s; it has stopped, or brought another number of rows"
            )
        raise self._failure

    def close(self) -> None:
        """Wait for this rank's kernels, and release its memory. LOCAL. Safe to call twice.

        Other ranks keep their mappings of this memory until they close.
        """
        if self._buffer is None:
            return
        torch.cuda.synchronize(self.device)
        self._buffer = None
        del self._shared
        self._report.close()


# By group and not by its name, since a later engine in this process may give the name to another group.
_open: "WeakKeyDictionary[dist.ProcessGroup, SymmetricWindows]" = WeakKeyDictionary()


def _innermost(transport: Transport) -> TorchDistTransport:
    found = transport.innermost
    if not isinstance(found, TorchDistTransport):
        raise UnsupportedConfigError(
            f"symmetric memory needs a torch.distributed process group; group '{found.group}' is a "
            f"{type(found).__name__}; use transport nccl"
        )
    return found


def open_windows(transport: Transport, size: WindowSize, timeout: float | None = None) -> SymmetricWindows:
    """Return the windows of the transport's process group. The first call opens them and is COLLECTIVE; later calls are LOCAL.

    `timeout`: the seconds that a kernel waits for other ranks. None: the deadline of the group's watchdog, or
    VLLM_NPU_COLLECTIVE_DEADLINE in a group without one. The first call sets it, and the size. A later call that needs a larger
    size raises UnsupportedConfigError, since captured graphs hold the windows' addresses. Host sync: yes, in the first call.
    Graph capture: after the first call.
    """
    group = _innermost(transport)
    windows = _open.get(group.process_group)
    if windows is not None:
        if not windows.size.fits(size):
            raise UnsupportedConfigError(
                f"the symmetric windows of group '{transport.group}' were opened with {windows.size}, and {size} is "
                "needed now; dispatch the largest tensors first, or close the windows and open larger ones"
            )
        return windows
    if torch.cuda.is_current_stream_capturing():
        raise UnsupportedConfigError(
            "symmetric windows cannot be opened while a CUDA graph is captured; run one step before, or call open()"
        )
    seconds = timeout or group.deadline or envs.COLLECTIVE_DEADLINE.read_seconds()
    windows = _open[group.process_group] = SymmetricWindows(group, size, seconds)
    return windows


def close_windows(transport: Transport) -> None:
    """Close the windows of the transport's process group, if they are open. LOCAL."""
    windows = _open.pop(_innermost(transport).process_group, None)
    if windows is not None:
        windows.close()


@contextmanager
def open_push(transport: Transport, num_bytes: int) -> Iterator[Callable[[], object]]:
    """A function that copies num_bytes into the next rank's GPU memory. COLLECTIVE at both ends; the function is LOCAL.

    Called on all ranks at once it shows what a link carries: a copy needs no reply, and no kernel waits for another rank.
    """
    group = _innermost(transport)
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        buffer = symm_mem.empty(num_bytes, dtype=torch.uint8, device=device)
        shared = symm_mem.rendezvous(buffer, group.process_group)
    except RuntimeError as error:
        raise TransportError("open push", group.group, group.rank, f"{num_bytes} bytes: {error}") from error
    target = shared.get_buffer((group.rank + 1) % group.size, (num_bytes,), torch.uint8)
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=device)
    yield lambda: target.copy_(source)
    torch.cuda.synchronize(device)
    transport.barrier()  # no rank frees memory that another one still writes


def gather_facts(transport: Transport) -> SymmetricFacts:
    """Gather the facts of all ranks of the transport. COLLECTIVE: two small gathers. Host sync: yes."""
    group = _innermost(transport)
    has_cuda = torch.cuda.is_available()
    device = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid) if has_cuda else ""
    places = gather_texts(group, f"{host_identity()} {device}", MAX_PLACE_BYTES, group.device_type)
    devices = [place.partition(" ")[2] for place in places]
    can = torch.tensor([[_reaches_all(devices), _has_triton()]], dtype=torch.uint8, device=group.device_type)
    peer_access, triton = group.all_gather(can).bool().all(dim=0).tolist()
    return SymmetricFacts(
        num_ranks=group.size,
        num_hosts=len({place.partition(" ")[0] for place in places}),
        cuda=all(devices) and (len(set(devices)) == group.size or envs.SHARE_GPUS.read_flag()),
        peer_access=peer_access,
        triton=triton,
    )


def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def _reaches_all(devices: list[str]) -> bool:
    """Whether this rank's device can write the memory of all devices with these UUIDs. A device that the process does not see
    is out of reach."""
    if not torch.cuda.is_available():
        return False
    visible = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    own = torch.cuda.current_device()
    return all(
        uuid in visible and (visible[uuid] == own or torch.cuda.can_device_access_peer(own, visible[uuid]))
        for uuid in devices
    )
