"""vLLM's device communicator on GPUs, with the all2all manager and the all-reduce that the options name."""

from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.distributed import get_dp_group, get_tp_group
from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger

from vllm_npu.all2all import All2AllManager, manager_class
from vllm_npu.all2all.flashinfer import ALL_REDUCE_MAX_BYTES, FlashInferAllReduce
from vllm_npu.all2all.pplx import PPLXAll2AllManager
from vllm_npu.errors import InvalidInputError, UnsupportedConfigError
from vllm_npu.plugin.gpu.strategy_manager import StrategyAll2AllManager
from vllm_npu.plugin.options import Options, topology_of
from vllm_npu.transport.base import Groups
from vllm_npu.transport.nccl import NcclTransport

logger = init_logger("vllm.npu.plugin.gpu.communicator")


class CudaMoECommunicator(CudaCommunicator):
    """CudaCommunicator, unchanged where no option names a manager or an all-reduce."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is None or self.world_size < 2:
            return
        options = Options.of(vllm_config)
        if self.use_all2all and (options.all2all is not None or options.exchange is not None):
            manager = self.build_manager(vllm_config, options)
            if manager is not None:
                self.all2all_manager: Any = manager  # replaces vLLM's gathering manager, which holds nothing
                logger.info_once("All2all manager: %s", type(manager).__name__)
        if options.flashinfer_all_reduce and self.unique_name.split(":")[0] == "tp":
            major, minor = torch.cuda.get_device_capability()
            self.fi_ar_comm = FlashInferAllReduce(
                self.cpu_group, self.device_group, max_bytes=ALL_REDUCE_MAX_BYTES.get(10 * major + minor, {})
            )

    def build_manager(self, vllm_config: VllmConfig, options: Options) -> All2AllManager | None:
        """Build the manager that the options name. None: vLLM's own manager stays. COLLECTIVE over the group."""
        if self.device_group is None:
            raise UnsupportedConfigError("all2all managers of vllm_npu need torch's process groups, not stateless ones")
        groups = self._groups(vllm_config)
        num_experts = int(vllm_config.model_config.get_num_experts())
        if options.exchange is not None:
            return StrategyAll2AllManager(
                groups,
                self.cpu_group,
                strategy=options.exchange,
                num_experts=num_experts,
                graphs=not vllm_config.model_config.enforce_eager,
            )
        found = manager_class(options.all2all or "")
        if found is None:
            return None
        if found is PPLXAll2AllManager:
            return PPLXAll2AllManager(
                groups,
                rows_of_ranks,
                self.cpu_group,
                num_experts=num_experts,
                max_tokens_per_rank=int(vllm_config.scheduler_config.max_num_batched_tokens),
                internode=bool(getattr(self.all2all_manager, "internode", False)),
            )
        return found(groups, rows_of_ranks, self.cpu_group)

    def _groups(self, vllm_config: VllmConfig) -> Groups:
        tp, dp = get_tp_group(), get_dp_group()
        return Groups(
            topology_of(vllm_config.parallel_config, tp_rank=tp.rank_in_group, dp_rank=dp.rank_in_group),
            NcclTransport(tp.device_group, "tp"),
            NcclTransport(dp.device_group, "dp"),
            NcclTransport(self.device_group, "ep"),
        )


def rows_of_ranks() -> list[int]:
    """Return the rows that each rank of the exchanging group brings to the running step, as vLLM counts them. LOCAL."""
    dp_metadata = get_forward_context().dp_metadata
    rows = None if dp_metadata is None else dp_metadata.get_chunk_sizes_across_dp_rank()
    if rows is None:
        raise InvalidInputError("an all2all manager ran in a step that counts no tokens across data-parallel ranks")
    return [int(each) for each in rows]
