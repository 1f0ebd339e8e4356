"""MC2: Ascend's distribute-dispatch and distribute-combine ops, one collective each way. Shapes are fixed: no count is sent."""

from dataclasses import dataclass

import torch

from vllm_npu.core.handles import Handle
from vllm_npu.device import ops_of
from vllm_npu.strategies.dispatch.base import Dispatched, Dispatcher, DispatchHandle, RoutedTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class MC2DispatchHandle(DispatchHandle):
    """Returned by MC2Dispatcher.dispatch, consumed by its combine. Holds the routing tensors, not copies of them.

    hidden_states and expert_input are left out, so that their memory is free while the experts run.
    """

    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    mask: torch.Tensor | None
    combine_index: torch.Tensor
    ep_recv_counts: torch.Tensor
    expand_scales: torch.Tensor | None
    comm_alg: str
    global_bs: int


class MC2Dispatcher(Dispatcher):
    """Either all ranks bring the same number of rows, or tokens.max_rows is set and no row is masked.

    MC2PrepareAndFinalize brings such rows. The op itself makes int8 rows. On NPUs the two ops must alternate on a group: a
    second dispatch before the combine of the first raises InvalidInputError. The ids of a row must be distinct (op-plugin's
    document of npu_moe_distribute_dispatch_v2). On a CPU this is checked; on NPUs the result is undefined.
    """

    def dispatch(self, tokens: RoutedTokens) -> Dispatched:
        """Run distribute_dispatch. COLLECTIVE over ep: one. Host sync: no. Graph capture: yes."""
        tokens.check(self.placement.num_experts, takes_mask=True, distinct_for="mc2")
        weights = tokens.topk_weights.float()  # the op takes no other dtype
        global_bs = (tokens.max_rows or 0) * self.placement.ep_size
        output = ops_of(tokens.hidden_states).distribute_dispatch(
            tokens.hidden_states,
            tokens.topk_ids,
            group_ep=self.groups.ep,
            moe_expert_num=self.placement.num_experts,
            expert_scales=weights,
            x_active_mask=tokens.mask,
            quant_mode=self.quant_mode,
            global_bs=global_bs,
            asked=self.asked,
        )
        handle = MC2DispatchHandle(
            rows=output.expand_x.shape[0],
            topk_ids=tokens.topk_ids,
            topk_weights=weights,
            mask=tokens.mask,
            combine_index=output.combine_index,
            ep_recv_counts=output.ep_recv_counts,
            expand_scales=output.expand_scales,
            comm_alg=output.comm_alg,
            global_bs=global_bs,
        )
        return Dispatched(
            expert_input=output.expand_x,
            tokens_per_expert=output.expert_token_nums,
            handle=handle,
            dynamic_scales=output.dynamic_scales,
        )

    def combine(self, expert_output: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """Run distribute_combine. COLLECTIVE over ep: one. Host sync: no. Graph capture: yes.

        Rows of masked tokens are undefined (NaN from the portable op). MC2's finalize drops them.
        """
        handle = self._consume(handle, MC2DispatchHandle, expert_output)
        combined: torch.Tensor = ops_of(expert_output).distribute_combine(
            expert_output,
            handle.topk_ids,
            handle.combine_index,
            handle.ep_recv_counts,
            handle.topk_weights,
            group_ep=self.groups.ep,
            moe_expert_num=self.placement.num_experts,
            x_active_mask=handle.mask,
            expand_scales=handle.expand_scales,
            comm_alg=handle.comm_alg,
            comm_quant_mode=self.asked.combine_quant_mode,
            global_bs=handle.global_bs,
        )
        return combined

    def _release(self, handle: Handle) -> None:
        if isinstance(handle, MC2DispatchHandle):
            ops_of(handle.combine_index).forget_dispatch(handle.combine_index, group_ep=self.groups.ep)
