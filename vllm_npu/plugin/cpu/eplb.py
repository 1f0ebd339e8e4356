"""vLLM's expert load balancing (EPLB) on a CPU: which configurations can run it, and what vLLM's router does on GPUs only."""

from typing import TYPE_CHECKING

import torch
from vllm.distributed.eplb.eplb_state import EplbLayerState

from vllm_npu.core.step_plan import TokenSharding
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.eplb.replicas import own_load
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin import compat

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def check_eplb(vllm_config: "VllmConfig") -> None:
    """Raise UnsupportedConfigError if EPLB is on and a CPU cannot run it. Runs before any process starts."""
    parallel_config, model_config = vllm_config.parallel_config, vllm_config.model_config
    if not parallel_config.enable_eplb or model_config is None:
        return
    if parallel_config.eplb_config.use_async:
        raise UnsupportedConfigError(
            "asynchronous EPLB moves experts on a second stream of the device, and a CPU has no streams; add "
            '"use_async": false to --eplb-config'
        )
    if parallel_config.enable_elastic_ep:
        raise UnsupportedConfigError(
            "EPLB of an elastic engine is not supported on a CPU; leave out --enable-elastic-ep"
        )
    if model_config.runner_type == "pooling":
        raise UnsupportedConfigError(
            "EPLB takes its steps where tokens are sampled, and a pooling model samples none; leave out --enable-eplb"
        )
    if parallel_config.pipeline_parallel_size > 1:
        raise UnsupportedConfigError(
            "EPLB on a CPU takes its steps where tokens are sampled, and only the last pipeline stage samples; set "
            "--pipeline-parallel-size 1"
        )
    if vllm_config.use_v2_model_runner:
        raise UnsupportedConfigError("EPLB on a CPU needs vLLM's first model runner; set VLLM_USE_V2_MODEL_RUNNER=0")
    logical = model_config.get_num_experts()
    redundant = parallel_config.eplb_config.num_redundant_experts
    ranks = parallel_config.tensor_parallel_size * parallel_config.data_parallel_size
    if (logical + redundant) % ranks:
        fitting = redundant + -(logical + redundant) % ranks
        raise UnsupportedConfigError(
            f"{logical} experts and {redundant} redundant ones do not divide over {ranks} ranks; set "
            f'"num_redundant_experts": {fitting} in --eplb-config'
        )


def replica_table(layer: EplbLayerState) -> torch.Tensor:  # [logical experts, 1 + most replicas] int32
    """vLLM's placement of a layer's experts as npu_moe_update_expert takes it. LOCAL. Host sync: yes.

    A row holds the number of replicas of a logical expert, then their physical ids.
    """
    places, counts = layer.logical_to_physical_map, layer.logical_replica_count
    return torch.cat([counts[:, None], places[:, : int(counts.max())]], dim=1).to(torch.int32)


def count_load(
    layer: EplbLayerState,
    physical_ids: torch.Tensor,  # [rows, top_k]
    topology: ParallelTopology,
    sharding: TokenSharding,
) -> None:
    """Add the step's tokens to vLLM's load of each physical expert, if vLLM records this step. LOCAL. Host sync: yes."""
    if not bool(layer.should_record_tensor):
        return
    num_tokens = int(layer.num_unpadded_tokens_tensors[compat.current().micro_batch()])
    load = layer.expert_load_view
    load += own_load(physical_ids, load.shape[0], topology, sharding, num_tokens).to(load.dtype)
