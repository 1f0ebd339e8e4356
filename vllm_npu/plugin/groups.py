"""vLLM's process groups as transports. A process opens them once, and all layers use them."""

from functools import cache

from vllm.distributed import get_dp_group, get_ep_group, get_tp_group
from vllm.distributed.parallel_state import get_world_group
from vllm.utils.network_utils import get_ip

from vllm_npu import envs
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.plugin import compat
from vllm_npu.strategies.pipelines import Pipelines
from vllm_npu.transport.base import Groups, Transport, gather_texts
from vllm_npu.transport.gloo import GlooTransport
from vllm_npu.trust.recording import CollectiveCounter, open_ring, record
from vllm_npu.trust.trace import TraceRing
from vllm_npu.trust.watchdog import Watchdog

MAX_ADDRESS_BYTES = 512


@cache
def collective_counter() -> CollectiveCounter | None:
    """The counter of this process. None if VLLM_NPU_COUNT_COLLECTIVES and VLLM_NPU_METRICS are both 0."""
    return CollectiveCounter() if envs.COUNT_COLLECTIVES.read_flag() or envs.METRICS.read_flag() else None


@cache
def trace_ring() -> TraceRing | None:
    """The trace of this process. None if VLLM_NPU_RECORD is empty. vLLM must have initialised its groups."""
    return open_ring(get_world_group().rank, get_world_group().world_size)


@cache
def model_groups(*, expert_parallel: bool) -> Groups:
    """The groups of the model in this process. LOCAL. vLLM must have initialised its own groups."""
    tp, dp, ep = get_tp_group(), get_dp_group(), get_ep_group()
    topology = ParallelTopology(
        tp_rank=tp.rank_in_group,
        tp_size=tp.world_size,
        dp_rank=dp.rank_in_group,
        dp_size=dp.world_size,
        expert_parallel=expert_parallel,
    )
    counter, ring = collective_counter(), trace_ring()
    transports = zip(compat.current().transports(tp, dp, ep), (tp, dp, ep), strict=True)
    return Groups(topology, *(record(transport, counter, ring, group.ranks) for transport, group in transports))


@cache
def model_pipelines(*, expert_parallel: bool) -> Pipelines:
    """The pipelines of all MoE layers in this process, on the groups of model_groups. LOCAL."""
    return Pipelines(model_groups(expert_parallel=expert_parallel))


@cache
def vote_transport() -> Transport:
    """The CPU group over all ranks of the grid, for the vote on each step. It moves no tokens, so it is not counted."""
    ep = get_ep_group()
    return record(GlooTransport(ep.cpu_group, "ep-vote"), None, trace_ring(), ep.ranks)


def watch_groups(groups: Groups) -> None:
    """Make errors in these groups and in the vote's group name the ranks that ended or are late. COLLECTIVE over the grid."""
    vote = vote_transport()
    watchdog = Watchdog.open(
        vote.rank,
        lambda text: gather_texts(vote, text, MAX_ADDRESS_BYTES),
        address=get_ip(),
        deadline=envs.COLLECTIVE_DEADLINE.read_seconds(),
    )
    groups.watch(watchdog)
    vote.watch(watchdog)
