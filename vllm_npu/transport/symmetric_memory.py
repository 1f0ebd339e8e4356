"""Windows of GPU memory that every rank of a group on one host can write, over torch's symmetric memory.

Opened once for a process group and shared by all layers. Two windows, so that two micro-batches may be in flight.
"""

import ctypes
from collections import deque
from dataclasses import dataclass

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
ALIGNMENT = 256  # bytes; offsets in a window are multiples of it
MAX_PLACE_BYTES = 128  # of a host's identity and a device's UUID
STAGES = {1: "dispatch", 2: "combine"}  # what the kernels write into the report


def align(num_bytes: int) -> int:
    """num_bytes rounded up to a multiple of ALIGNMENT."""
    return ceil_div(num_bytes, ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class SymmetricFacts:
    """What decides whether the ranks of a group can share memory. Equal on every rank."""

    num_ranks: int
    num_hosts: int
    cuda: bool  # every rank has a CUDA device of its own
    peer_access: bool  # every device can write every other one's memory
    triton: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSize:
    """Parts of one window. The first is written by peers' dispatch, the second by their combine; they never overlap."""

    received_bytes: int
    returned_bytes: int
    rank_flags: int  # flags of 4 bytes that each rank has for each of the two stages

    def fits(self, other: "WindowSize") -> bool:
        """Whether a window of this size can be used as one of size `other`."""
        return (
            other.received_bytes <= self.received_bytes
            and other.returned_bytes <= self.returned_bytes
            and other.rank_flags <= self.rank_flags
        )


class SymmetricWindows:
    """The windows of one group, and what this rank's kernels need to use them. The constructor is COLLECTIVE.

    Memory on each GPU: `bytes_per_rank`, for the life of the object. Raises TransportError where memory cannot be shared.
    """

    def __init__(self, process_group: dist.ProcessGroup, group: str, size: WindowSize, timeout: float) -> None:
        self.group = group
        self.rank = dist.get_rank(process_group)
        self.num_ranks = dist.get_world_size(process_group)
        self.size = size
        self.timeout = timeout
        self.timeout_ns = int(timeout * 1e9)
        self.device = torch.device("cuda", torch.cuda.current_device())
        flags_bytes = align(4 * size.rank_flags * self.num_ranks)
        self.returned_offset = align(size.received_bytes)
        self.dispatch_flags_offset = self.returned_offset + align(size.returned_bytes)
        self.combine_flags_offset = self.dispatch_flags_offset + flags_bytes
        self._window_bytes = self.combine_flags_offset + flags_bytes
        self.bytes_per_rank = NUM_WINDOWS * self._window_bytes
        try:
            buffer = symm_mem.empty(self.bytes_per_rank, dtype=torch.uint8, device=self.device)
            self._shared = symm_mem.rendezvous(buffer, process_group)
        except RuntimeError as error:  # CUDA's and c10d's errors are RuntimeErrors
            raise TransportError("open windows", group, self.rank, f"{self.bytes_per_rank} bytes: {error}") from error
        self._buffer: torch.Tensor | None = buffer.zero_()
        clock = torch.zeros(1, dtype=torch.int64, device=self.device)
        failed = torch.zeros(1, dtype=torch.int32, device=self.device)
        # What each kernel takes, for each window: addresses of the window on all ranks, epochs of the next dispatch and the
        # next combine in it (each kernel moves the other stage's on, so nothing races), clock, failed.
        self.kernel_tensors = [
            (
                torch.tensor(
                    [base + window * self._window_bytes for base in self._shared.buffer_ptrs],
                    dtype=torch.int64,
                    device=self.device,
                ),
                torch.tensor([1, 0], dtype=torch.int32, device=self.device),
                clock,
                failed,
            )
            for window in range(NUM_WINDOWS)
        ]
        self._report = torch.zeros(self.num_ranks, dtype=torch.int32, pin_memory=True)  # kernels write, the host reads
        self.report_address = self._report.data_ptr()
        self._report_view = (ctypes.c_int32 * self.num_ranks).from_address(self.report_address)
        self._nothing_missing = bytes(4 * self.num_ranks)
        # Without the 2 us of host time that an object of torch.cuda.Stream takes.
        self._current_stream = torch._C._cuda_getCurrentRawStream
        self._free = deque(range(NUM_WINDOWS))
        self._last_stream: int | None = None  # raw handle of the stream of the last exchange
        torch.cuda.synchronize(self.device)
        dist.barrier(process_group)

    def bytes_of(self, window: int) -> torch.Tensor:
        """This rank's `window` as [bytes] uint8: a view, not a copy."""
        if self._buffer is None:
            raise InvalidInputError(
                f"the windows of group '{self.group}' are closed; dispatch anew, which opens others"
            )
        return self._buffer[window * self._window_bytes : (window + 1) * self._window_bytes]

    def take(self) -> int:
        """A free window. LOCAL; every rank must take and give back in the same order, and call enter() before its kernels.

        Raises InvalidInputError where all are in flight.
        """
        if not self._free:
            raise InvalidInputError(
                f"{NUM_WINDOWS} dispatches on group '{self.group}' are in flight already; combine one of them first"
            )
        return self._free.popleft()

    def give_back(self, window: int) -> None:
        """Make `window` free for what is queued after this. LOCAL."""
        self._free.append(window)

    def enter(self) -> int:
        """Let the current stream wait for the group's last kernel; returns its raw handle. LOCAL. Host sync: no.

        A group's kernels run one behind another, also on several streams: two that wait for other ranks at once could each
        fill a GPU and keep the other from ever running.
        """
        stream = self._current_stream(self.device.index)
        if stream != self._last_stream:
            if self._last_stream is not None:
                last = torch.cuda.ExternalStream(self._last_stream, self.device)
                with torch.cuda.stream(last):
                    captured = torch.cuda.is_current_stream_capturing()
                if captured == torch.cuda.is_current_stream_capturing():  # not from the work before a capture into it
                    torch.cuda.current_stream(self.device).wait_stream(last)
            self._last_stream = stream
        return stream

    def check(self, operation: str) -> None:
        """Raise TransportError where a kernel has given up waiting. LOCAL, without a host sync: it reads host memory.

        Kernels run behind the host, so a failure shows at the first check after the time-out.
        """
        if self._buffer is None:
            raise InvalidInputError(
                f"the windows of group '{self.group}' are closed; dispatch anew, which opens others"
            )
        if bytes(self._report_view) == self._nothing_missing:
            return
        missing = [
            f"rank {rank} did not reach {STAGES[stage]}" for rank, stage in enumerate(self._report_view) if stage
        ]
        raise TransportError(
            operation,
            self.group,
            self.rank,
            f"{', '.join(missing)} within {self.timeout:g} s; it has stopped, or brought another number of rows",
        )

    def close(self) -> None:
        """Release this rank's memory once its own work is done. LOCAL. Safe to call twice.

        Peers keep what they have mapped until they close, too.
        """
        if self._buffer is None:
            return
        torch.cuda.synchronize(self.device)
        self._buffer = None
        del self._shared


_open: dict[str, SymmetricWindows] = {}


def _innermost(transport: Transport) -> TorchDistTransport:
    found = transport.innermost
    if not isinstance(found, TorchDistTransport):
        raise UnsupportedConfigError(
            f"symmetric memory needs a torch.distributed process group; group '{found.group}' is a "
            f"{type(found).__name__}; use transport nccl"
        )
    return found


def open_windows(transport: Transport, size: WindowSize, timeout: float | None = None) -> SymmetricWindows:
    """The windows of the transport's process group. COLLECTIVE when called first, LOCAL from then on.

    They are sized by the first call: a later one that needs more raises UnsupportedConfigError, since captured graphs hold
    their addresses. Host sync: yes, when called first. Graph capture: the first call must come before.
    """
    process_group = _innermost(transport).process_group
    name = process_group.group_name
    if name in _open:
        if not _open[name].size.fits(size):
            raise UnsupportedConfigError(
                f"the symmetric windows of group '{transport.group}' were opened with {_open[name].size}, and {size} is "
                "needed now; dispatch the largest tensors first, or close the windows and open larger ones"
            )
        return _open[name]
    if torch.cuda.is_current_stream_capturing():
        raise UnsupportedConfigError(
            "symmetric windows cannot be opened while a CUDA graph is captured; run one step before, or call open()"
        )
    seconds = envs.TRANSPORT_TIMEOUT.read_seconds() if timeout is None else timeout
    _open[name] = SymmetricWindows(process_group, transport.group, size, seconds)
    return _open[name]


def close_windows(transport: Transport) -> None:
    """Close the windows of the transport's process group, where some are open. LOCAL."""
    windows = _open.pop(_innermost(transport).process_group.group_name, None)
    if windows is not None:
        windows.close()


def gather_facts(transport: Transport) -> SymmetricFacts:
    """Facts of the transport's ranks. COLLECTIVE: two small gathers. Host sync: yes."""
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
        cuda=all(devices) and len(set(devices)) == group.size,
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
    """Whether this rank's device can write the memory of all these, given by UUID. One that it does not see, it cannot."""
    if not torch.cuda.is_available():
        return False
    visible = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    own = torch.cuda.current_device()
    return all(
        uuid in visible and (visible[uuid] == own or torch.cuda.can_device_access_peer(own, visible[uuid]))
        for uuid in devices
    )
