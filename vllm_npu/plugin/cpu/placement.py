"""Which CPUs and which NUMA node each rank of this host gets."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import ParallelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlace:
    """The place of one rank."""

    node: int  # the NUMA node of its CPUs, and so of its memory
    cpus: tuple[int, ...]


def place_ranks(cpus_of_nodes: Mapping[int, Sequence[int]], ranks: int) -> list[RankPlace]:
    """Spread ranks over the NUMA nodes, neighbours together, and share each node's CPUs among its ranks. At least one CPU each.

    Fewer ranks than nodes: each gets a node of its own, because vLLM's worker uses the memory of one node.
    """
    nodes = sorted(node for node, cpus in cpus_of_nodes.items() if cpus)
    node_of = [nodes[rank * min(len(nodes), ranks) // ranks] for rank in range(ranks)]
    ranks_of_node = Counter(node_of)
    places = []
    for rank, node in enumerate(node_of):
        cpus, sharers = sorted(cpus_of_nodes[node]), ranks_of_node[node]
        index = rank - node_of.index(node)
        start, stop = index * len(cpus) // sharers, (index + 1) * len(cpus) // sharers
        places.append(RankPlace(node=node, cpus=tuple(cpus[start : max(stop, start + 1)])))
    return places


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRanks:
    """The ranks of a model on this host, and those among them that this process starts."""

    total: int
    own: range
    listed: range
    """Those whose CPUs VLLM_CPU_OMP_THREADS_BIND must list: vLLM takes its part of the list by the local data-parallel rank."""
    in_this_process: bool = False  # whether this process itself is the worker, started by torchrun
    others_unknown: bool = False  # whether other data-parallel ranks may be on this host

    @classmethod
    def of(cls, parallel_config: "ParallelConfig", environment: Mapping[str, str]) -> "LocalRanks":
        """Read them from vLLM's configuration, and from the variables of torchrun for ranks that it starts.

        Each data-parallel rank may be launched by hand. vLLM does not know then how many of them are here: all are, if the
        first one listens on a loopback address or the ranks have local numbers (VLLM_DP_RANK_LOCAL). Otherwise this rank counts
        alone.
        """
        world = int(parallel_config.world_size)  # of one data-parallel rank
        dp_size = int(parallel_config.data_parallel_size)
        if parallel_config.distributed_executor_backend == "external_launcher" and "LOCAL_RANK" in environment:
            rank, total = int(environment["LOCAL_RANK"]), _torchrun_ranks_here(environment)
            return cls(total=total, own=range(rank, rank + 1), listed=range(0), in_this_process=True)
        if parallel_config.data_parallel_rank_local is not None:
            first, total = int(parallel_config.data_parallel_rank_local) * world, dp_size * world
            return cls(total=total, own=range(first, first + world), listed=range(total))
        if dp_size > 1 and parallel_config.data_parallel_external_lb:
            if _is_loopback(parallel_config.data_parallel_master_ip):
                own = range(
                    parallel_config.data_parallel_rank * world, (parallel_config.data_parallel_rank + 1) * world
                )
                return cls(total=dp_size * world, own=own, listed=own)
            return cls(total=world, own=range(world), listed=range(world), others_unknown=True)
        total = world * max(int(parallel_config.data_parallel_size_local), 1)
        return cls(total=total, own=range(total), listed=range(total))


def _torchrun_ranks_here(environment: Mapping[str, str]) -> int:
    """vLLM's CPU platform overwrites LOCAL_WORLD_SIZE, so that of a process's second engine is wrong. The others stay."""
    if "WORLD_SIZE" in environment and "GROUP_WORLD_SIZE" in environment:
        return int(environment["WORLD_SIZE"]) // int(environment["GROUP_WORLD_SIZE"])
    return int(environment.get("LOCAL_WORLD_SIZE", "1"))


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False  # a name; the ranks may be anywhere


def nodes_in_use(
    binding: str,  # the value of VLLM_CPU_OMP_THREADS_BIND, or "auto"
    ranks: LocalRanks,
    places: Sequence[RankPlace],  # what place_ranks chose
    cpus_of_nodes: Mapping[int, Sequence[int]],
) -> list[int]:
    """The NUMA node whose memory each rank uses: that of the first CPU that it may run on. A user's binding decides it."""
    nodes = [place.node for place in places]
    if binding == "auto":
        return nodes
    node_of = {cpu: node for node, cpus in cpus_of_nodes.items() for cpu in cpus}
    first = node_of[min(node_of)]
    if binding == "nobind" or ranks.in_this_process:
        return [first] * ranks.total
    for rank, share in zip(ranks.listed, binding.split("|"), strict=False):  # vLLM checks the number of shares
        nodes[rank] = node_of.get(int(re.split("[,-]", share)[0]), first)
    return nodes


def bind_this_process(cpus: Iterable[int]) -> None:
    """Confine all threads of this process, and those that it starts later, to these CPUs. LOCAL."""
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # the thread has just ended
            os.sched_setaffinity(int(thread), cpus)
