"""vLLM's platform on a machine without NPU and GPU: a CPU, with expert and data parallelism for MoE models."""

import os
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.platforms.cpu import CpuPlatform

from vllm_npu import envs
from vllm_npu.core.limits import PORTABLE
from vllm_npu.core.token_layout import ceil_div
from vllm_npu.plugin import compat
from vllm_npu.plugin.engine_check import check_engine
from vllm_npu.plugin.options import check_config

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig

logger = init_logger("vllm.npu.plugin.cpu.platform")

_own_binding: str | None = None  # the last value that this process gave to VLLM_CPU_OMP_THREADS_BIND


class CpuMoEPlatform(CpuPlatform):
    """CpuPlatform with our communicator, and with a plan for each step. vLLM's CPU worker and attention run on it."""

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Run our checks, then vLLM's: vLLM turns dual batch overlap off without an error. Raises UnsupportedConfigError."""
        from vllm_npu.plugin.cpu.eplb import check_eplb

        options = check_config(vllm_config)
        release = compat.current()
        check_eplb(vllm_config)
        release.set_worker(vllm_config)
        super().check_and_update_config(vllm_config)
        check_engine(vllm_config, options, PORTABLE)
        parallel_config = vllm_config.parallel_config
        if not parallel_config.worker_extension_cls:
            parallel_config.worker_extension_cls = "vllm_npu.plugin.worker_extension.MoECommWorkerExtension"
        _bind_threads(parallel_config)
        _share_memory(vllm_config)

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        """The path of our communicator class."""
        return "vllm_npu.plugin.cpu.communicator.CpuMoECommunicator"

    @classmethod
    def set_additional_forward_context(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Plan the step for our MoE layers. vLLM calls this once a step. COLLECTIVE if the model has MoE layers of ours."""
        from vllm_npu.plugin.step_planner import plan_step

        return {**super().set_additional_forward_context(*args, **kwargs), **plan_step(**kwargs)}


def _ranks_here(parallel_config: "ParallelConfig") -> int:
    """Number of ranks on this host.

    vLLM does not know it if the user launches each data-parallel rank by hand (VLLM_DP_RANK_LOCAL). Then all ranks count.
    """
    dp_size = max(parallel_config.data_parallel_size_local, 1)
    if parallel_config.data_parallel_rank_local is not None:
        dp_size = parallel_config.data_parallel_size
    return parallel_config.world_size * dp_size


def _bind_threads(parallel_config: "ParallelConfig") -> None:
    """Share this process's CPUs among the ranks, if there are fewer NUMA nodes than ranks.

    vLLM's own binding refuses more tensor-parallel ranks than NUMA nodes. It also gives the same CPUs to all data-parallel
    ranks of a node. On 2 cores both ranks then get the first core, and decode steps take twice as long.

    A binding that the user set stays. A binding that this process made for an earlier engine is replaced.
    """
    global _own_binding
    if _own_binding is not None and os.environ.get(envs.CPU_OMP_THREADS_BIND) == _own_binding:
        del os.environ[envs.CPU_OMP_THREADS_BIND]
    _own_binding = None
    ranks = _ranks_here(parallel_config)
    if os.environ.get(envs.CPU_OMP_THREADS_BIND, "auto") != "auto" or ranks <= compat.current().numa_nodes():
        return
    cpus = sorted(os.sched_getaffinity(0))
    shares = [
        cpus[rank * len(cpus) // ranks : max((rank + 1) * len(cpus) // ranks, rank * len(cpus) // ranks + 1)]
        for rank in range(ranks)
    ]
    _own_binding = os.environ[envs.CPU_OMP_THREADS_BIND] = "|".join(",".join(map(str, share)) for share in shares)
    logger.info(
        "%s=%s: %d ranks share %d CPUs, because there are fewer NUMA nodes than ranks",
        envs.CPU_OMP_THREADS_BIND,
        os.environ[envs.CPU_OMP_THREADS_BIND],
        ranks,
        len(cpus),
    )


def _share_memory(vllm_config: "VllmConfig") -> None:
    """Give each rank a share of its NUMA node's memory, unless the user set the size of the cache.

    By default vLLM gives each rank nearly all memory of the node. Then a second rank on the node does not start, or both fill
    the memory. Here other processes of the machine get a share too.
    """
    from vllm.config import CacheConfig  # not at the top: vllm.config itself imports the platform

    cache_config, default = vllm_config.cache_config, CacheConfig.gpu_memory_utilization
    ranks_of_a_node = ceil_div(_ranks_here(vllm_config.parallel_config), compat.current().numa_nodes())
    is_set = cache_config.kv_cache_memory_bytes is not None or cache_config.gpu_memory_utilization != default
    if ranks_of_a_node < 2 or is_set:
        return
    cache_config.gpu_memory_utilization = default / (ranks_of_a_node + 1)
    logger.info(
        "gpu_memory_utilization=%.2f for each rank: %d share the memory of a NUMA node",
        cache_config.gpu_memory_utilization,
        ranks_of_a_node,
    )
