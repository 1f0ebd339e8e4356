"""The strategies: one row each. Classes are named here, and imported when a pipeline is first built."""

from dataclasses import dataclass

AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyRow:
    """One strategy. Classes are named, and imported when first used."""

    prepare_finalize: str
    dispatcher: str
    needs_expert_parallel: bool
    summary: str


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
        summary="each token once to each rank that needs it; many tokens, many ranks",
    ),
    "allgather": StrategyRow(
        prepare_finalize="vllm_npu.strategies.prepare_finalize.allgather:AllGatherPrepareAndFinalize",
        dispatcher="vllm_npu.strategies.dispatch.local_permute:LocalPermuteDispatcher",
        needs_expert_parallel=False,
        summary="all tokens to all ranks, shares added by a reduce-scatter; few ranks, or no expert parallelism",
    ),
    "naive": StrategyRow(
        prepare_finalize="vllm_npu.strategies.prepare_finalize.naive_multicast:NaiveMulticastPrepareAndFinalize",
        dispatcher="vllm_npu.strategies.dispatch.local_permute:LocalPermuteDispatcher",
        needs_expert_parallel=False,
        summary="as allgather, by one broadcast a rank; where the fabric has no gather",
    ),
}

# Those that run on one kind of device only, by what DeviceLimits says.
GPU_STRATEGIES = {
    "symmetric": StrategyRow(
        prepare_finalize="vllm_npu.strategies.prepare_finalize.mc2:EvenPrepareAndFinalize",
        dispatcher="vllm_npu.strategies.dispatch.symmetric:SymmetricDispatcher",
        needs_expert_parallel=True,
        summary="NVLink symmetric memory: fixed slots, one kernel each way, no host sync; GPUs of one host",
    ),
}
ALL_STRATEGIES = STRATEGIES | GPU_STRATEGIES
