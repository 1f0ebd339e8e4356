"""vLLM's platform on a machine without NPU and GPU: a CPU, with expert and data parallelism for MoE models."""

import os
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.platforms.cpu import CpuPlatform

from vllm_npu import envs
from vllm_npu.core.limits import PORTABLE
from vllm_npu.plugin import compat
from vllm_npu.plugin.compat.fault_tolerance import start_retries
from vllm_npu.plugin.cpu.placement import LocalRanks, RankPlace, bind_this_process, nodes_in_use, place_ranks
from vllm_npu.plugin.engine_check import check_engine
from vllm_npu.plugin.options import check_config

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig

logger = init_logger("vllm.npu.plugin.cpu.platform")

SIMULATED_NODES = "VLLM_CPU_SIM_MULTI_NUMA"  # of vLLM, which then shares the CPUs among all ranks itself

_own_binding: str | None = None  # the last value that this process gave to VLLM_CPU_OMP_THREADS_BIND
_own_affinity: tuple[set[int], set[int]] | None = None  # this process's CPUs before it bound itself, and after


class CpuMoEPlatform(CpuPlatform):
    """CpuPlatform with our communicator, and with a plan for each step. vLLM's CPU worker and attention run on it."""

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Run our checks, then vLLM's: vLLM turns dual batch overlap off without an error. Raises UnsupportedConfigError."""
        from vllm_npu.plugin.cpu.eplb import check_eplb

        options = check_config(vllm_config)
        release = compat.current()
        check_eplb(vllm_config)
        release.set_worker(vllm_config, retries=options.retries)
        _forget_own_binding()
        ranks = LocalRanks.of(vllm_config.parallel_config, os.environ)  # before vLLM, which changes LOCAL_WORLD_SIZE
        cpus_of_nodes = release.cpus_of_nodes()
        places = place_ranks(cpus_of_nodes, ranks.total)
        nodes = nodes_in_use(os.environ.get(envs.CPU_OMP_THREADS_BIND, "auto"), ranks, places, cpus_of_nodes)
        super().check_and_update_config(vllm_config)
        check_engine(vllm_config, options, PORTABLE)
        if options.retries:
            start_retries(vllm_config)
        parallel_config = vllm_config.parallel_config
        if not parallel_config.worker_extension_cls:
            parallel_config.worker_extension_cls = "vllm_npu.plugin.worker_extension.MoECommWorkerExtension"
        _bind_threads(parallel_config, ranks, places)
        _share_memory(vllm_config, ranks, nodes)

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        """The path of our communicator class."""
        return "vllm_npu.plugin.cpu.communicator.CpuMoECommunicator"

    @classmethod
    def get_punica_wrapper(cls) -> str:
        """The path of our operators of LoRA adapters."""
        return "vllm_npu.plugin.cpu.adapters.CpuAdapters"

    @classmethod
    def set_additional_forward_context(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Plan the step for our MoE layers. vLLM calls this once a step. COLLECTIVE if the model has MoE layers of ours."""
        from vllm_npu.plugin.step_planner import plan_step

        return {**super().set_additional_forward_context(*args, **kwargs), **plan_step(**kwargs)}


def _bind_threads(parallel_config: "ParallelConfig", ranks: LocalRanks, places: list[RankPlace]) -> None:
    """Give each rank the CPUs of its place, unless vLLM's own binding does so, or the user bound the threads.

    vLLM's own binding refuses more tensor-parallel ranks than NUMA nodes. It also gives all data-parallel ranks of a host the
    CPUs of the first nodes. On 2 cores both ranks then get the first core, and decode steps take twice as long. Workers that
    torchrun starts are not bound at all.

    A binding that the user set stays. A binding that this process made for an earlier engine is replaced.
    """
    global _own_binding, _own_affinity
    if os.environ.get(envs.CPU_OMP_THREADS_BIND, "auto") != "auto" or os.environ.get(SIMULATED_NODES, "0") != "0":
        return
    if ranks.others_unknown:
        logger.warning(
            "This rank takes CPUs and memory as if no other data-parallel rank ran on this host. If one does, set "
            "CPU_VISIBLE_MEMORY_NODES to another NUMA node for each, or %s and --gpu-memory-utilization",
            envs.CPU_OMP_THREADS_BIND,
        )
    if ranks.in_this_process:
        cpus = places[ranks.own.start].cpus
        _own_affinity = os.sched_getaffinity(0), set(cpus)
        bind_this_process(cpus)
        torch.set_num_threads(len(cpus))
        logger.info("rank %d of the %d ranks here runs on the CPUs %s", ranks.own.start, ranks.total, list(cpus))
        return
    nodes = {place.node for place in places}
    if len(nodes) == ranks.total == parallel_config.world_size and ranks.own.start == 0:
        return
    _own_binding = "|".join(",".join(map(str, places[rank].cpus)) for rank in ranks.listed)
    os.environ[envs.CPU_OMP_THREADS_BIND] = _own_binding
    logger.info(
        "%s=%s: the %d ranks here are spread over %d NUMA nodes",
        envs.CPU_OMP_THREADS_BIND,
        _own_binding,
        ranks.total,
        len(nodes),
    )


def _forget_own_binding() -> None:
    """Take back what this process did to its environment and its CPUs for an earlier engine."""
    global _own_binding, _own_affinity
    if _own_binding is not None and os.environ.get(envs.CPU_OMP_THREADS_BIND) == _own_binding:
        del os.environ[envs.CPU_OMP_THREADS_BIND]
    if _own_affinity is not None and os.sched_getaffinity(0) == _own_affinity[1]:
        bind_this_process(_own_affinity[0])
    _own_binding = _own_affinity = None


def _share_memory(vllm_config: "VllmConfig", ranks: LocalRanks, nodes: list[int]) -> None:
    """Give each rank a share of its NUMA node's memory, unless the user set the size of the cache.

    By default vLLM gives each rank nearly all memory of the node. Then a second rank on the node does not start, or both fill
    the memory. Here other processes of the machine get a share too.
    """
    from vllm.config import CacheConfig  # not at the top: vllm.config itself imports the platform

    cache_config, default = vllm_config.cache_config, CacheConfig.gpu_memory_utilization
    is_set = cache_config.kv_cache_memory_bytes is not None or cache_config.gpu_memory_utilization != default
    if is_set:
        return
    ranks_of_node = Counter(nodes)
    sharers = max(ranks_of_node[nodes[rank]] for rank in ranks.own)
    if compat.current().one_memory_limit(set(ranks_of_node)):
        sharers = ranks.total
    if sharers < 2:
        return
    cache_config.gpu_memory_utilization = default / (sharers + 1)
    logger.info(
        "gpu_memory_utilization=%.2f for each rank: %d share the memory of a NUMA node, or of this container",
        cache_config.gpu_memory_utilization,
        sharers,
    )
