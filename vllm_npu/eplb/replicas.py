"""The replica of its expert that a token goes to, and the number of tokens of each replica. The same for every strategy."""

import torch

from vllm_npu.core.limits import BalanceMode
from vllm_npu.core.step_plan import TokenSharding
from vllm_npu.core.token_layout import TokenSlice
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.device import ops_of
from vllm_npu.eplb.placement import mapping_rank


def to_physical(
    topk_ids: torch.Tensor,  # [num_tokens, top_k] int32 or int64, logical experts
    eplb_table: torch.Tensor,  # [num_experts, 1 + most replicas] int32, see ReplicaPlacement.eplb_table
    topology: ParallelTopology,
    sharding: TokenSharding,
    balance_mode: BalanceMode = BalanceMode.BY_TOKEN,
) -> torch.Tensor:  # [num_tokens, top_k] of the same dtype, physical experts
    """Map logical to physical expert ids. It runs before prepare, so that prepare and dispatch see physical ids only.

    The default is BY_TOKEN, since placements are balanced for replicas that share their load evenly. With BY_RANK the TP ranks
    of one DP rank, which map the same tokens alike, would use only one replica. LOCAL. Host sync: no. Raises InvalidInputError
    as npu_moe_update_expert does.
    """
    physical: torch.Tensor = ops_of(topk_ids).npu_moe_update_expert(
        topk_ids,
        eplb_table,
        local_rank_id=mapping_rank(topology, sharding),
        world_size=topology.world_size,
        balance_mode=balance_mode,
    )
    return physical


def own_load(
    physical_ids: torch.Tensor,  # [rows, top_k]: the choices of the rows that this rank brings to the layer
    num_physical: int,
    topology: ParallelTopology,
    sharding: TokenSharding,
    num_tokens: int,  # real tokens of this DP rank; further rows are padding
) -> torch.Tensor:  # [num_physical] int64
    """Count this rank's tokens for each physical expert. LOCAL.

    The sum over all ranks counts each choice of a real token once: where TP ranks hold the same tokens, only TP rank 0 counts.
    """
    if sharding is TokenSharding.REPLICATED:
        real = TokenSlice(0, num_tokens if topology.tp_rank == 0 else 0)
    else:
        start = topology.tp_rank * physical_ids.shape[0]
        real = TokenSlice(0, min(max(num_tokens - start, 0), physical_ids.shape[0]))
    return torch.bincount(real.take(physical_ids).flatten(), minlength=num_physical)
