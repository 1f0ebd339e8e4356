"""vLLM's process groups as transports. All layers of a process use the same ones, for as long as vLLM's groups live."""

from weakref import WeakKeyDictionary

from vllm.distributed import get_dp_group, get_ep_group, get_tp_group
from vllm.distributed.parallel_state import GroupCoordinator, get_world_group
from vllm.utils.network_utils import get_ip

from vllm_npu.core.topology import ParallelTopology
from vllm_npu.plugin import compat
from vllm_npu.strategies.pipelines import Pipelines
from vllm_npu.transport.base import Groups, Transport, gather_texts
from vllm_npu.transport.gloo import GlooTransport
from vllm_npu.trust.recording import CollectiveCounter, record
from vllm_npu.trust.settings import Settings, agree_on_settings
from vllm_npu.trust.trace import TraceRing
from vllm_npu.trust.watchdog import Watchdog

MAX_ADDRESS_BYTES = 512


class _OpenGroups:
    """What this package keeps for one set of vLLM's groups.

    The constructor is COLLECTIVE over the grid in the first epoch, and LOCAL in later ones, which keep the settings.
    """

    def __init__(
        self,
        tp: GroupCoordinator,
        dp: GroupCoordinator,
        ep: GroupCoordinator,
        *,
        settings: Settings | None = None,  # that the ranks have agreed on in the first epoch
        watchdog: Watchdog | None = None,  # of the epoch of these groups; None: the first epoch, before its first step
    ) -> None:
        vote, world = GlooTransport(ep.cpu_group, "ep-vote"), get_world_group()
        self.settings = agree_on_settings(vote, world.rank, world.world_size) if settings is None else settings
        ring, epoch = self.settings.ring, 0 if watchdog is None else watchdog.epoch
        self.vote = record(vote, None, ring, ep.ranks, epoch)
        tp_transport, dp_transport, ep_transport = (
            record(transport, self.settings.counter, ring, group.ranks, epoch)
            for transport, group in zip(compat.current().transports(tp, dp, ep), (tp, dp, ep), strict=True)
        )
        # Both have the same transports: whether ranks own whole experts changes no group.
        self.pipelines = {
            expert_parallel: Pipelines(
                Groups(
                    ParallelTopology(
                        tp_rank=tp.rank_in_group,
                        tp_size=tp.world_size,
                        dp_rank=dp.rank_in_group,
                        dp_size=dp.world_size,
                        expert_parallel=expert_parallel,
                    ),
                    tp_transport,
                    dp_transport,
                    ep_transport,
                )
            )
            for expert_parallel in (False, True)
        }
        self.watchdog = watchdog
        if watchdog is not None:
            self._groups.watch(watchdog)
            self.vote.watch(watchdog)

    @property
    def _groups(self) -> Groups:
        return self.pipelines[True].groups

    def leave(self) -> None:
        """Leave all groups after a failure, so that other ranks' calls on them fail at once. LOCAL."""
        for pipelines in self.pipelines.values():
            pipelines.close()
        self._groups.leave()
        self.vote.leave()


# An entry ends with vLLM's group: its value holds process groups, and not the coordinator of the key.
_OPEN: "WeakKeyDictionary[GroupCoordinator, _OpenGroups]" = WeakKeyDictionary()


def _open_groups() -> _OpenGroups:
    """What is kept for vLLM's present groups. The first call for them is COLLECTIVE over the grid, as agree_on_settings.

    vLLM must have initialised its groups. Raises UnsupportedConfigError on every rank if the settings of one are malformed.
    """
    ep = get_ep_group()
    found = _OPEN.get(ep)
    if found is None:
        found = _OPEN[ep] = _OpenGroups(get_tp_group(), get_dp_group(), ep)
    return found


def collective_counter() -> CollectiveCounter | None:
    """The counter of this rank. None if VLLM_NPU_COUNT_COLLECTIVES and VLLM_NPU_METRICS are both 0."""
    return _open_groups().settings.counter


def trace_ring() -> TraceRing | None:
    """The trace of this rank. None if VLLM_NPU_RECORD is empty."""
    return _open_groups().settings.ring


def model_groups(*, expert_parallel: bool) -> Groups:
    """The groups of the model on this rank. The first call is COLLECTIVE, as is that of every function here."""
    return model_pipelines(expert_parallel=expert_parallel).groups


def model_pipelines(*, expert_parallel: bool) -> Pipelines:
    """The pipelines of all MoE layers on this rank, on the groups of model_groups."""
    return _open_groups().pipelines[expert_parallel]


def vote_transport() -> Transport:
    """The CPU group over all ranks of the grid, for the vote on each step. It moves no tokens, so it is not counted."""
    return _open_groups().vote


def watch_groups() -> None:
    """Make errors in the model's groups and in the vote's group name the ranks that ended or are late. COLLECTIVE over the grid
    at the first call for vLLM's present groups."""
    opened = _open_groups()
    if opened.watchdog is not None:
        return
    opened.watchdog = open_watchdog(opened.pipelines[True].groups, opened.vote, opened.settings.deadline)


def present_watchdog() -> Watchdog | None:
    """The watchdog of vLLM's present groups. None before the first step. LOCAL."""
    opened = _OPEN.get(get_ep_group())
    return None if opened is None else opened.watchdog


def leave_groups() -> None:
    """Leave this package's transports on vLLM's present groups after a failure. LOCAL, safe to call twice."""
    _OPEN[get_ep_group()].leave()


def follow_new_groups(watchdog: Watchdog) -> None:
    """Open this package's transports on the process groups that vLLM's coordinators hold now, in the watchdog's epoch. LOCAL.
    The planners of the coordinators have to restart."""
    ep = get_ep_group()
    _OPEN[ep] = _OpenGroups(get_tp_group(), get_dp_group(), ep, settings=_OPEN[ep].settings, watchdog=watchdog)


def open_watchdog(
    groups: Groups,
    vote: Transport,  # a CPU group of all ranks of the groups
    deadline: float,  # seconds
) -> Watchdog:
    """Make errors in these groups and in the vote's group name the ranks that ended or are late. COLLECTIVE over the vote's
    group."""
    watchdog = Watchdog.open(
        vote.rank,
        lambda text: gather_texts(vote, text, MAX_ADDRESS_BYTES),
        address=get_ip(),
        deadline=deadline,
    )
    groups.watch(watchdog)
    vote.watch(watchdog)
    return watchdog
