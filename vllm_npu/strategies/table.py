"""All strategies, one row for each. A row names its classes by "module:class"; select.build imports them.

Doctor reads this table where torch cannot be imported.
"""

from dataclasses import dataclass

from vllm_npu.core.ascend_recipes import FusedOperator

AUTO = "auto"  # the user's request that select chooses the strategy of each step


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyRow:
    """One strategy."""

    prepare_finalize: str  # "module:class" of the group-level stages
    dispatcher: str  # "module:class" of the expert-level stages
    needs_expert_parallel: bool  # whether ep_size must be more than 1
    summary: str  # one line for the user


STRATEGIES = {
    "mc2": StrategyRow(
        prepare_finalize="vllm_npu.strategies.prepare_finalize.mc2:MC2PrepareAndFinalize",
        dispatcher="vllm_npu.strategies.dispatch.mc2:MC2Dispatcher",
        needs_expert_parallel=True,
        summary="fixed shapes, masked padding, one collective each way; few tokens",
    ),
    "all2all": StrategyRow(
        prepare_finalize="vllm_npu.strategies.prepare_finalize.all2all:All2AllPrepareAndFinalize",
        dispatcher="vllm_npu.strategies.dispatch.all2allv:All2AllVDispatcher",
        needs_expert_parallel=True,
        summary="each token goes once to each rank that needs it; many tokens, many ranks",
    ),
    "allgather": StrategyRow(
        prepare_finalize="vllm_npu.strategies.prepare_finalize.allgather:AllGatherPrepareAndFinalize",
        dispatcher="vllm_npu.strategies.dispatch.local_permute:LocalPermuteDispatcher",
        needs_expert_parallel=False,
        summary="all tokens go to all ranks, a reduce-scatter adds the shares; few ranks, or no expert parallelism",
    ),
    "naive": StrategyRow(
        prepare_finalize="vllm_npu.strategies.prepare_finalize.naive_multicast:NaiveMulticastPrepareAndFinalize",
        dispatcher="vllm_npu.strategies.dispatch.local_permute:LocalPermuteDispatcher",
        needs_expert_parallel=False,
        summary="as allgather, but one broadcast for each rank; where the fabric has no gather",
    ),
}

# These run on one kind of device only. DeviceLimits says on which.
GPU_STRATEGIES = {
    "symmetric": StrategyRow(
        prepare_finalize="vllm_npu.strategies.prepare_finalize.mc2:EvenPrepareAndFinalize",
        dispatcher="vllm_npu.strategies.dispatch.symmetric:SymmetricDispatcher",
        needs_expert_parallel=True,
        summary="NVLink symmetric memory: fixed slots, one kernel each way, no host sync; GPUs of one host",
    ),
}
ALL_STRATEGIES = STRATEGIES | GPU_STRATEGIES

# These operators compute the experts too, on the weights that vllm-ascend prepared for them. So their strategy runs beside
# vllm-ascend only, and tools with experts of their own leave it out. vllm-ascend's enable_fused_mc2 names the operator.
FUSED_OPERATORS = {
    FusedOperator.FFN_COMBINE: StrategyRow(
        prepare_finalize="vllm_npu.strategies.prepare_finalize.mc2:EvenPrepareAndFinalize",
        dispatcher="vllm_npu.strategies.dispatch.fused_mc2:FfnCombine",
        needs_expert_parallel=True,
        summary="dispatch, experts and combine in one operator of vllm-ascend; A3",
    ),
    FusedOperator.GMM_COMBINE_DECODE: StrategyRow(
        prepare_finalize="vllm_npu.strategies.prepare_finalize.mc2:MC2PrepareAndFinalize",
        dispatcher="vllm_npu.strategies.dispatch.fused_mc2:GmmCombineDecode",
        needs_expert_parallel=True,
        summary="the same for decode steps in W8A8; A3 with vllm-ascend 0.23",
    ),
}
FUSED_STRATEGIES = {"fused_mc2": FUSED_OPERATORS[FusedOperator.FFN_COMBINE]}
CHOICES = (AUTO, *STRATEGIES, *FUSED_STRATEGIES)  # of moe_comm on CPUs and NPUs
