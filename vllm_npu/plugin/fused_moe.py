"""The original design's class names and signatures, as shells over prepare_finalize. The one place with state of a call:
vLLM's interface passes no handle from prepare to finalize, so it is kept here, one for each micro-batch."""

from abc import ABC
from dataclasses import replace

import torch
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

from vllm_npu.core.routing import check_router_logits
from vllm_npu.core.step_plan import TokenSharding
from vllm_npu.errors import HandleMismatchError
from vllm_npu.plugin import compat
from vllm_npu.plugin.forward_context import current_step
from vllm_npu.plugin.groups import model_groups
from vllm_npu.strategies.prepare_finalize.all2all import All2AllPrepareAndFinalize
from vllm_npu.strategies.prepare_finalize.allgather import AllGatherPrepareAndFinalize
from vllm_npu.strategies.prepare_finalize.base import PrepareAndFinalize, PrepareHandle
from vllm_npu.strategies.prepare_finalize.mc2 import EvenPrepareAndFinalize
from vllm_npu.strategies.prepare_finalize.naive_multicast import NaiveMulticastPrepareAndFinalize


class FusedMoEPrepareAndFinalize(ABC):
    """prepare() before the experts, finalize() after them. Where the flags differ from the step's own layout, they win."""

    strategy: type[PrepareAndFinalize]

    def __init__(self, moe_config: FusedMoEConfig) -> None:
        self.moe_config = moe_config
        self._stages = self.strategy(model_groups(expert_parallel=bool(moe_config.use_ep)))
        self._in_flight: dict[int, PrepareHandle] = {}

    def prepare(
        self,
        hidden_states: torch.Tensor,  # [num_tokens, hidden_size]
        router_logits: torch.Tensor,  # [num_tokens, num_experts]
        enable_shared_expert_dp: bool = False,
        replace_allreduce: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(hidden_states, router_logits, mask) of the tokens that this rank works on. Either flag says that the input is
        already this TP rank's slice. A handle that an exception left behind is dropped."""
        check_router_logits(hidden_states, router_logits, int(self.moe_config.num_logical_experts))
        plan = current_step().plan
        sharding = TokenSharding.from_flags(
            enable_shared_expert_dp=enable_shared_expert_dp,
            replace_allreduce=replace_allreduce,
            sequence_parallel=plan.sharding is TokenSharding.SLICED_OVER_TP,
        )
        prepared = self._stages.prepare(hidden_states, (router_logits,), replace(plan, sharding=sharding))
        self._in_flight[compat.current().micro_batch()] = prepared.handle
        return prepared.hidden_states, prepared.per_token[0], prepared.mask

    def finalize(self, hidden_states: torch.Tensor, reduce_results: bool) -> torch.Tensor:
        """The output for prepare's input rows, for the prepare of the same micro-batch. Raises HandleMismatchError without."""
        handle = self._in_flight.pop(compat.current().micro_batch(), None)
        if handle is None:
            raise HandleMismatchError(
                f"{type(self).__name__}.finalize without a prepare in micro-batch {compat.current().micro_batch()}"
            )
        return self._stages.finalize(hidden_states, handle, reduce_results=reduce_results).hidden_states


class FusedMoEPrepareAndFinalizeWithMC2(FusedMoEPrepareAndFinalize):
    """Padded to the agreed length, masked, sliced over TP."""

    strategy = EvenPrepareAndFinalize


class FusedMoEPrepareAndFinalizeWithAll2All(FusedMoEPrepareAndFinalize):
    """Sliced over TP."""

    strategy = All2AllPrepareAndFinalize


class FusedMoEPrepareAndFinalizeWithAllGather(FusedMoEPrepareAndFinalize):
    """Gathered over DP, or over EP where sliced."""

    strategy = AllGatherPrepareAndFinalize


class FusedMoEPrepareAndFinalizeWithNaiveMulticast(FusedMoEPrepareAndFinalize):
    """Broadcast over DP, or over EP where sliced."""

    strategy = NaiveMulticastPrepareAndFinalize
