"""Checks a configuration for GPUs before any process starts."""

from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vllm_npu import envs
from vllm_npu.all2all import FLASHINFER, GATHERING, manager_row
from vllm_npu.all2all.flashinfer import ALL_REDUCE_MAX_BYTES
from vllm_npu.all2all.pplx import PPLXSizes
from vllm_npu.core.limits import NVLINK, MoELayer
from vllm_npu.core.topology import ExpertPlacement, ParallelTopology
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin.compat.fault_tolerance import check_retry, refuse_fault_tolerance
from vllm_npu.plugin.engine_check import check_routing
from vllm_npu.plugin.options import Options, check_expert_placement, topology_of
from vllm_npu.strategies.select import check_strategy
from vllm_npu.strategies.table import AUTO

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.npu.plugin.gpu.config_check")

WORKER = "vllm_npu.plugin.gpu.worker.CudaMoEWorker"
ALL_REDUCE_RANKS = sorted({ranks for by_ranks in ALL_REDUCE_MAX_BYTES.values() for ranks in by_ranks})


def required_backend(vllm_config: "VllmConfig") -> str | None:
    """The all2all_backend of vLLM that the options need. None if vLLM's own choice stays.

    Raises UnsupportedConfigError for options and environment variables that this package cannot serve, and for tokens that
    choose more experts than there are.
    """
    envs.check_variables()
    check_routing(vllm_config)
    parallel_config, model_config = vllm_config.parallel_config, vllm_config.model_config
    options, topology = Options.of(vllm_config), topology_of(parallel_config)
    if options.retries:
        check_retry(vllm_config, on_cpus=False)
    if options.flashinfer_all_reduce:
        FLASHINFER.require("flashinfer_all_reduce")
        if topology.tp_size > 1 and topology.tp_size not in ALL_REDUCE_RANKS:
            raise UnsupportedConfigError(
                f"flashinfer_all_reduce takes {', '.join(map(str, ALL_REDUCE_RANKS))} tensor-parallel ranks, not "
                f"{topology.tp_size}; leave it out"
            )
    if options.all2all is None and options.exchange is None:
        return None
    if options.all2all is not None and options.exchange is not None:
        raise UnsupportedConfigError(
            f"all2all={options.all2all!r} and moe_comm={options.exchange!r} each choose how tokens travel; give one of them"
        )
    if parallel_config.enable_eplb:
        raise UnsupportedConfigError(
            "EPLB was never run with these exchanges on GPUs: they count the model's experts, without redundant ones; leave "
            "out --enable-eplb, or the option of vllm_npu that names an exchange"
        )
    check_expert_placement(parallel_config)
    if parallel_config.prefill_context_parallel_size > 1:
        raise UnsupportedConfigError(
            "these exchanges are between data- and tensor-parallel ranks only; set --prefill-context-parallel-size 1"
        )
    moves_tokens = model_config is not None and model_config.is_moe and topology.dp_size > 1 and topology.ep_size > 1
    if options.all2all is not None:
        row = manager_row(options.all2all)
        refuse_fault_tolerance(parallel_config, row.backend)
        if options.all2all == "pplx" and moves_tokens:
            check_pplx(vllm_config, topology)
        return row.backend
    refuse_fault_tolerance(parallel_config)
    layer = None
    if moves_tokens:
        num_experts = int(model_config.get_num_experts())
        ExpertPlacement(num_experts, topology.ep_size)
        layer = MoELayer(
            num_experts=num_experts,
            top_k=1,  # no strategy on GPUs depends on it
            hidden_size=model_config.get_hidden_size(),
            dtype=model_config.dtype,
        )
    check_strategy(options.exchange or AUTO, topology, layer, NVLINK)
    if options.exchange == "symmetric" and parallel_config.nnodes > 1:
        raise UnsupportedConfigError(
            f"moe_comm symmetric cannot run here: the ranks are on {parallel_config.nnodes} hosts; choose allgather"
        )
    return GATHERING


def check_pplx(vllm_config: "VllmConfig", topology: ParallelTopology) -> None:
    """Raise UnsupportedConfigError where PPLX's kernels cannot carry the model's tokens, quantised ones aside."""
    model_config = vllm_config.model_config
    num_experts = int(model_config.get_num_experts())
    ExpertPlacement(num_experts, topology.ep_size)
    if vllm_config.parallel_config.enable_dbo:
        raise UnsupportedConfigError(
            "all2all pplx has buffers for one exchange at a time, and dual batch overlap needs two; leave out --enable-dbo"
        )
    PPLXSizes.of(
        max_num_tokens=int(vllm_config.scheduler_config.max_num_batched_tokens),
        num_experts=num_experts,
        top_k=1,  # the size of a row does not depend on it
        hidden_size=model_config.get_hidden_size(),
        element_size=model_config.dtype.itemsize,
    )


def set_worker(vllm_config: "VllmConfig") -> None:
    """Let vLLM start CudaMoEWorker, where an option names an exchange of this package and the user names no worker."""
    parallel_config, options = vllm_config.parallel_config, Options.of(vllm_config)
    ours = options.exchange is not None or (
        options.all2all is not None and manager_row(options.all2all).manager is not None
    )
    if not ours:
        return
    if parallel_config.worker_cls == "auto":
        parallel_config.worker_cls = WORKER
    elif parallel_config.worker_cls != WORKER:
        logger.warning(
            "The worker class is %s: nothing looks for a failed step of the symmetric strategy before its tokens leave, and "
            "no step is counted for /metrics. Leave out --worker-cls, or derive that class from %s.",
            parallel_config.worker_cls,
            WORKER,
        )
