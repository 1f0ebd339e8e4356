"""The classes of the original design, with their names and signatures, on top of strategies/prepare_finalize.

Their interface passes no handle from prepare to finalize. So an object keeps the handle of each micro-batch between the two
calls. No other code of this package keeps the state of a call.
"""

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
    """prepare() runs before the experts, and finalize() after them."""

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
        """Return (hidden_states, router_logits, mask) of the tokens that this rank works on. COLLECTIVE as the strategy is.

        Each flag means that the input is already this TP rank's slice. A flag overrides the sharding of the step's plan. A
        handle of an earlier prepare without finalize is dropped.
        """
        check_router_logits(hidden_states, router_logits, int(self.moe_config.num_logical_experts))
        plan = current_step().plan
        sharding = TokenSharding.from_flags(
            enable_shared_expert_dp=enable_shared_expert_dp,
            replace_allreduce=replace_allreduce,
            sequence_parallel=plan.sharding is TokenSharding.SLICED_OVER_TP,
        )
        step = plan if sharding is plan.sharding else replace(plan, sharding=sharding)
        prepared = self._stages.prepare(hidden_states, (router_logits,), step)
        self._in_flight[compat.current().micro_batch()] = prepared.handle
        return prepared.hidden_states, prepared.per_token[0], prepared.mask

    def finalize(self, hidden_states: torch.Tensor, reduce_results: bool) -> torch.Tensor:
        """Return the output for the input rows of this micro-batch's prepare. COLLECTIVE as the strategy is.

        Raises HandleMismatchError if there was no prepare.
        """
        handle = self._in_flight.pop(compat.current().micro_batch(), None)
        if handle is None:
            raise HandleMismatchError(
                f"{type(self).__name__}.finalize without a prepare in micro-batch {compat.current().micro_batch()}"
            )
        return self._stages.finalize(hidden_states, handle, reduce_results=reduce_results).hidden_states


class FusedMoEPrepareAndFinalizeWithMC2(FusedMoEPrepareAndFinalize):
    """Each rank works on a slice over TP, padded to the same length on all ranks, with a mask."""

    strategy = EvenPrepareAndFinalize


class FusedMoEPrepareAndFinalizeWithAll2All(FusedMoEPrepareAndFinalize):
    """Each rank works on a slice over TP, without padding."""

    strategy = All2AllPrepareAndFinalize


class FusedMoEPrepareAndFinalizeWithAllGather(FusedMoEPrepareAndFinalize):
    """Each rank works on the tokens of all DP ranks, gathered over DP. A sliced input is gathered over EP."""

    strategy = AllGatherPrepareAndFinalize


class FusedMoEPrepareAndFinalizeWithNaiveMulticast(FusedMoEPrepareAndFinalize):
    """As FusedMoEPrepareAndFinalizeWithAllGather, with one broadcast from each rank in place of the gather."""

    strategy = NaiveMulticastPrepareAndFinalize
