"""Starts N ranks on this machine, as threads or as processes, and runs functions on all of them.

`verify`, benchmarks and tests use it. vLLM itself starts the ranks of a served model.
"""

import datetime
import multiprocessing
import os
import pickle
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, Self
from weakref import WeakSet

import torch
import torch.distributed as dist

from vllm_npu import envs
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.emulator.fork_server import ForkContext
from vllm_npu.errors import InvalidInputError, TransportError, UnsupportedConfigError
from vllm_npu.transport.base import Groups, Transport
from vllm_npu.transport.table import transport_class
from vllm_npu.transport.threaded import ThreadedGroup, ThreadedTransport
from vllm_npu.transport.torch_dist import TorchDistTransport
from vllm_npu.trust.mailboxes import LOOPBACK
from vllm_npu.trust.recording import CollectiveCounter, open_ring, record
from vllm_npu.trust.watchdog import Watchdog


class Rank(ABC):
    """The first argument of a function that runs on every rank: the rank's number, device and groups."""

    def __init__(self, rank: int, num_ranks: int, device: torch.device) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.device = device  # the groups move tensors of this device
        self.ring = open_ring(rank, num_ranks)  # for VLLM_NPU_RECORD
        self.watchdog: Watchdog | None = None

    def groups(
        self, *, tp_size: int, dp_size: int, expert_parallel: bool = True, counter: CollectiveCounter | None = None
    ) -> Groups:
        """This rank's groups in a dp_size x tp_size grid of all ranks.

        The first call for a grid is COLLECTIVE over all ranks.
        """
        if tp_size * dp_size != self.num_ranks:
            raise InvalidInputError(
                f"a TP{tp_size}xDP{dp_size} grid needs {tp_size * dp_size} ranks, not {self.num_ranks}"
            )
        topology = ParallelTopology.of_rank(
            self.rank, tp_size=tp_size, dp_size=dp_size, expert_parallel=expert_parallel
        )
        members = topology.tp_group, topology.dp_group, tuple(range(self.num_ranks))
        transports = list(zip(self._open(topology), members, strict=True))
        if self.watchdog is not None:
            for transport, _ in transports:
                transport.watch(self.watchdog)
        epoch = 0 if self.watchdog is None else self.watchdog.epoch
        return Groups(
            topology, *(record(transport, counter, self.ring, ranks, epoch) for transport, ranks in transports)
        )

    @abstractmethod
    def _open(self, topology: ParallelTopology) -> tuple[Transport, Transport, Transport]:
        """Open the tp, dp and ep transports."""


class RankPool(ABC):
    """N ranks that run one function after another. A context manager."""

    def __init__(self, num_ranks: int) -> None:
        if num_ranks < 1:
            raise UnsupportedConfigError(f"cannot start {num_ranks} ranks; give 1 or more")
        self.num_ranks = num_ranks

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call function(rank, *args) on every rank and return the results in rank order.

        Raises the error of the first rank that failed. A rank's own error goes before a time-out that it caused elsewhere.
        """
        outcomes = self.outcomes(function, *args)
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        for error in sorted(errors, key=lambda error: isinstance(error, TransportError)):
            raise error
        return outcomes

    @abstractmethod
    def outcomes(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Do the same as run(), but put the exception of a failed rank in the list."""

    @abstractmethod
    def close(self) -> None:
        """End all ranks."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _ThreadRank(Rank):
    def __init__(self, rank: int, num_ranks: int, group: Callable[[str, tuple[int, ...]], ThreadedGroup]) -> None:
        super().__init__(rank, num_ranks, torch.device("cpu"))
        self._group = group

    def _open(self, topology: ParallelTopology) -> tuple[Transport, Transport, Transport]:
        ranks = tuple(range(self.num_ranks))
        tp = ThreadedTransport(self._group("tp", topology.tp_group), topology.tp_rank)
        dp = ThreadedTransport(self._group("dp", topology.dp_group), topology.dp_rank)
        return tp, dp, ThreadedTransport(self._group("ep", ranks), topology.rank)


class ThreadRankPool(RankPool):
    """Ranks as threads on one core. torch uses no further threads. The start takes no time, a collective takes microseconds.

    Only one thread at a time holds Python's lock. On two cores, eight ranks took 3.4 times as long as on one core (53 and 15 ms
    for a case of `verify`): the kernel passes that lock from core to core.
    """

    def __init__(self, num_ranks: int, timeout: float | None = None) -> None:
        super().__init__(num_ranks)
        self._timeout = envs.TRANSPORT_TIMEOUT.read_seconds() if timeout is None else timeout

    def outcomes(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        groups: dict[tuple[str, tuple[int, ...]], ThreadedGroup] = {}
        lock = threading.Lock()
        failed = threading.Event()

        def group(name: str, ranks: tuple[int, ...]) -> ThreadedGroup:
            with lock:
                found = groups.setdefault((name, ranks), ThreadedGroup(name, len(ranks), self._timeout))
                if failed.is_set():
                    found.abort()
                return found

        outcomes: list[Any] = [None] * self.num_ranks
        core = one_core()

        def main(rank: int) -> None:
            try:
                if core is not None:
                    os.sched_setaffinity(0, {core})  # for this thread only
                outcomes[rank] = function(_ThreadRank(rank, self.num_ranks, group), *args)
            except BaseException as error:  # noqa: BLE001 - the caller gets it, as from a process pool
                outcomes[rank] = error
                with lock:
                    failed.set()
                    for open_group in groups.values():
                        open_group.abort()

        threads = [threading.Thread(target=main, args=(rank,), daemon=True) for rank in range(self.num_ranks)]
        threads_of_torch = torch.get_num_threads()
        torch.set_num_threads(1)  # for this thread and the threads that it starts
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            torch.set_num_threads(threads_of_torch)
        return outcomes

    def close(self) -> None:
        """Do nothing: threads end with each run."""


def one_core() -> int | None:
    """A core that this thread may use, chosen by the process id; None if the system cannot bind threads to cores. LOCAL."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[os.getpid() % len(allowed)]


class _ProcessRank(Rank):
    def __init__(self, rank: int, num_ranks: int, transport: type[TorchDistTransport], timeout: float) -> None:
        super().__init__(rank, num_ranks, transport.device_of(rank))
        self._transport = transport
        self._timeout = datetime.timedelta(seconds=timeout)
        self._grids: dict[tuple[int, int], tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}
        self._opened: WeakSet[Transport] = WeakSet()
        self._meeting_place: dist.Store | None = None

    def open_world(self, meeting_place: dist.Store) -> None:
        """Open the mailbox and the group of all ranks. COLLECTIVE over all ranks."""
        self._meeting_place = meeting_place

        def exchange(text: str) -> list[str]:
            meeting_place.set(f"mailbox {self.rank}", text)
            return [meeting_place.get(f"mailbox {other}").decode() for other in range(self.num_ranks)]

        self.watchdog = Watchdog.open(self.rank, exchange, address=LOOPBACK, deadline=self._timeout.total_seconds())
        self._init_process_group(meeting_place)

    def renew(self) -> None:
        """After a failure: leave all groups, meet the other ranks in a new epoch, and open the group of all ranks anew.

        COLLECTIVE over all ranks. Call groups() again afterwards; transports of the old epoch raise TransportError.

        Raises RankFailureError that names the ranks that did not come. It may be called again then.
        """
        watchdog, meeting_place = self.watchdog, self._meeting_place
        if watchdog is None or meeting_place is None:
            raise UnsupportedConfigError("only ranks that are processes can meet in a new epoch")
        for transport in tuple(self._opened):
            transport.leave()
        self._opened.clear()
        self._grids.clear()
        if dist.is_initialized():
            dist.destroy_process_group()
        self.watchdog = watchdog.next_epoch()
        try:
            self._init_process_group(dist.PrefixStore(f"epoch {self.watchdog.epoch}", meeting_place))
        except RuntimeError as error:
            raise self.watchdog.failure("init_process_group", "ep", self.rank, str(error)) from error

    def _init_process_group(self, store: dist.Store) -> None:
        dist.init_process_group(
            self._transport.backend, store=store, rank=self.rank, world_size=self.num_ranks, timeout=self._timeout
        )

    def _open(self, topology: ParallelTopology) -> tuple[Transport, Transport, Transport]:
        shape = (topology.tp_size, topology.dp_size)
        if shape not in self._grids:
            ranks = [ParallelTopology.of_rank(r, tp_size=shape[0], dp_size=shape[1]) for r in range(self.num_ranks)]
            tp, _ = dist.new_subgroups_by_enumeration(sorted({rank.tp_group for rank in ranks}), timeout=self._timeout)
            dp, _ = dist.new_subgroups_by_enumeration(sorted({rank.dp_group for rank in ranks}), timeout=self._timeout)
            self._grids[shape] = (tp, dp)
        tp, dp = self._grids[shape]
        ep = dist.group.WORLD
        assert ep is not None  # _serve_rank has opened it
        opened = self._transport(tp, "tp"), self._transport(dp, "dp"), self._transport(ep, "ep")
        self._opened.update(opened)
        return opened


def _process_transport(name: str) -> type[TorchDistTransport]:
    transport = transport_class(name)
    if not issubclass(transport, TorchDistTransport):
        raise UnsupportedConfigError(f"transport {name!r} is not between processes")
    return transport


def _portable(error: Exception) -> Exception:
    """`error`, or a RuntimeError with its message if `error` cannot be pickled and unpickled."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - this process made it
    except Exception:  # noqa: BLE001 - any __reduce__ or __init__ may raise any error
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _serve_rank(
    rank: int, num_ranks: int, transport_name: str, store: str, timeout: float, requests: Connection
) -> None:
    """Main function of a rank's process: report that it is ready, then run the functions from the pipe until it is closed."""
    torch.set_num_threads(1)
    try:
        transport = _process_transport(transport_name)
        this_rank = _ProcessRank(rank, num_ranks, transport, timeout)
        if this_rank.device.type != "cpu":
            torch.accelerator.set_device_index(this_rank.device)
        this_rank.open_world(dist.FileStore(store, num_ranks))
    except Exception as error:  # noqa: BLE001 - sent to the parent, which raises it
        requests.send(_portable(error))
        return
    requests.send(None)
    while True:
        try:
            function, args = requests.recv()
        except EOFError:
            break
        try:
            outcome = function(this_rank, *args)
        except Exception as error:  # noqa: BLE001 - sent to the parent, which raises it
            outcome = _portable(error)
        try:
            requests.send(outcome)
        except (BrokenPipeError, ConnectionResetError):
            break  # the pool has been closed
    dist.destroy_process_group()
    os._exit(0)  # nothing needs to be flushed, and torch's own teardown takes seconds on a busy machine


class ProcessRankPool(RankPool):
    """Ranks as processes, over a transport that is a c10d backend. On accelerators, rank r uses device r.

    The start takes some seconds, because each process imports torch. Functions must be picklable. After a TransportError the
    ranks cannot be used again, so the next run starts new ones. `start_method` is multiprocessing's. Ranks of a forkserver
    start faster, and have the environment variables of the first start. A context in its place has
    multiprocessing's Pipe and Process.
    """

    def __init__(
        self,
        num_ranks: int,
        timeout: float | None = None,
        transport: str = "gloo",
        *,
        start_method: Literal["spawn", "forkserver"] | ForkContext = "spawn",
    ) -> None:
        super().__init__(num_ranks)
        self._start_method = start_method
        self._transport = transport
        self._timeout = envs.TRANSPORT_TIMEOUT.read_seconds() if timeout is None else timeout
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def outcomes(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        outcomes = [self._receive(rank) for rank in range(self.num_ranks)]
        if any(isinstance(outcome, TransportError) for outcome in outcomes):
            self.close()
        return outcomes

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vllm_npu_ranks_")
        store = str(Path(self._folder.name) / "store")
        method = self._start_method
        context: Any = multiprocessing.get_context(method) if isinstance(method, str) else method
        for rank in range(self.num_ranks):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve_rank,
                args=(rank, self.num_ranks, self._transport, store, self._timeout, there),
                daemon=True,
            )
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)
        not_ready = [error for error in map(self._receive, range(self.num_ranks)) if error is not None]
        if not_ready:
            self.close()
            raise not_ready[0]

    def _receive(self, rank: int) -> Any:
        try:
            return self._pipes[rank].recv()
        except EOFError:
            self._processes[rank].join()
            return TransportError(
                "run", "ep", rank, f"the rank's process ended with exit code {self._processes[rank].exitcode}"
            )


RANK_POOLS: dict[str, Callable[..., RankPool]] = {
    "threaded": ThreadRankPool,
    "gloo": partial(ProcessRankPool, transport="gloo"),
    "nccl": partial(ProcessRankPool, transport="nccl"),
    "hccl": partial(ProcessRankPool, transport="hccl"),
}
