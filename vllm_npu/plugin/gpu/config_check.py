"""Checks a configuration for GPUs before any process starts."""

from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vllm_npu import envs
from vllm_npu.all2all import FLASHINFER, GATHERING, manager_row
from vllm_npu.core.limits import NVLINK
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin.options import Options, check_expert_placement, topology_of
from vllm_npu.strategies.select import check_strategy
from vllm_npu.strategies.table import AUTO

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.npu.plugin.gpu.config_check")

WORKER = "vllm_npu.plugin.gpu.worker.CudaMoEWorker"


def required_backend(vllm_config: "VllmConfig") -> str | None:
    """The all2all_backend of vLLM that the options need. None if vLLM's own choice stays.

    Raises UnsupportedConfigError for options and environment variables that this package cannot serve.
    """
    envs.check_variables()
    parallel_config, model_config = vllm_config.parallel_config, vllm_config.model_config
    options = Options.of(vllm_config)
    if options.flashinfer_all_reduce:
        FLASHINFER.require("flashinfer_all_reduce")
    if options.all2all is None and options.exchange is None:
        return None
    if options.all2all is not None and options.exchange is not None:
        raise UnsupportedConfigError(
            f"all2all={options.all2all!r} and moe_comm={options.exchange!r} each choose how tokens travel; give one of them"
        )
    if parallel_config.enable_eplb:
        raise UnsupportedConfigError(
            "EPLB moves experts between ranks, and these exchanges know only the first placement of experts; leave out "
            "--enable-eplb"
        )
    check_expert_placement(parallel_config)
    if parallel_config.prefill_context_parallel_size > 1:
        raise UnsupportedConfigError(
            "these exchanges are between data- and tensor-parallel ranks only; set --prefill-context-parallel-size 1"
        )
    if options.all2all is not None:
        return manager_row(options.all2all).backend
    check_strategy(options.exchange or AUTO, topology_of(parallel_config), device=NVLINK)
    if options.exchange == "all2all" and model_config is not None and not model_config.enforce_eager:
        raise UnsupportedConfigError(
            "moe_comm all2all reads sizes on the host, so no CUDA graph can hold it; set --enforce-eager, or choose symmetric "
            "or allgather"
        )
    return GATHERING


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
