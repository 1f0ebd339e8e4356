"""Makes the process groups of torch.distributed in this process anew, after a collective of theirs has failed.

gloo closes a connection when nobody holds its group any more, and a peer that waits on it then fails at once. So whoever leaves
a group must drop all references to it. shutdown() and abort() of torch 2.13's ProcessGroupGloo close nothing.
"""

import gc
import traceback
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class ProcessGroups:
    """The default group and its subgroups. Every epoch (trust/watchdog.py) has groups of its own, under names of its own."""

    def __init__(self, timeout: float) -> None:
        """Remember the present default group's ranks, and the store by which they met. timeout: seconds, for the groups to
        come. LOCAL."""
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._backend = dist.get_backend()
        self._timeout = timeout
        self._store: dist.Store = dist.distributed_c10d._get_default_store()

    def leave(self) -> None:
        """Leave the groups of the present epoch. The caller has dropped its own references. LOCAL, safe to call twice."""
        if dist.is_initialized():
            dist.destroy_process_group()
        collect()

    def open_world(self, epoch: int) -> None:
        """Open the default group of an epoch. COLLECTIVE over all ranks.

        Raises RuntimeError if a rank does not come in time.
        """
        store = store_of_epoch(self._store, epoch, self._timeout)
        dist.init_process_group(
            self._backend, store=store, rank=self.rank, world_size=self.size, timeout=timedelta(seconds=self._timeout)
        )

    def subgroup(self, partition: Sequence[Sequence[int]]) -> dist.ProcessGroup:
        """Open one group for each part of the ranks, and return this rank's. COLLECTIVE over all ranks."""
        own, _ = dist.new_subgroups_by_enumeration(
            [list(part) for part in partition], timeout=timedelta(seconds=self._timeout)
        )
        return own


def store_of_epoch(
    store: dist.Store,
    epoch: int,
    timeout: float,  # seconds for which it waits
) -> dist.PrefixStore:
    """The part of a store in which the ranks of one epoch meet. LOCAL."""
    part = dist.PrefixStore(f"vllm_npu epoch {epoch}", store)
    part.set_timeout(timedelta(seconds=timeout))
    return part


def collect() -> None:
    """Close the connections of groups that only cycles of Python still hold. LOCAL."""
    gc.collect()


def drop_frames(error: BaseException) -> None:
    """Drop the local variables of the frames that an error and its causes came through: they may hold groups. LOCAL."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        each = pending.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        traceback.clear_frames(each.__traceback__)
        pending += [each.__cause__, each.__context__]


def set_time_out(group: dist.ProcessGroup, seconds: float) -> None:
    """Let collectives of a gloo group fail after so many seconds. LOCAL."""
    backend: Any = group._get_backend(torch.device("cpu"))
    backend._set_default_timeout(timedelta(seconds=seconds))


def highest(group: dist.ProcessGroup, value: int) -> int:
    """The maximum over the ranks of a group that may be unknown to torch.distributed's default group. COLLECTIVE."""
    number = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(number, dist.ReduceOp.MAX, group)
    return int(number.item())


def came_from_a_collective(error: BaseException) -> bool:
    """Whether torch.distributed raised this error. gloo's errors are bare RuntimeErrors, so the place tells them."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and str(frames[-1][0].f_globals.get("__name__", "")).startswith("torch.distributed")
