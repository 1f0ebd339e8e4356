"""MC2: Ascend's distribute-dispatch and distribute-combine. Fixed shapes, nothing counted, one collective each way."""

from dataclasses import dataclass

import torch

from vllm_npu.core.handles import check_handle
from vllm_npu.device import ops_of
from vllm_npu.strategies.dispatch.base import Dispatched, Dispatcher, DispatchHandle, RoutedTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class MC2DispatchHandle(DispatchHandle):
    """Returned by MC2Dispatcher.dispatch, consumed by its combine. Holds the routing tensors, not copies of them."""

    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    mask: torch.Tensor | None
    combine_index: torch.Tensor
    ep_recv_counts: torch.Tensor
    expand_scales: torch.Tensor | None
    comm_alg: str
    global_bs: int


class MC2Dispatcher(Dispatcher):
    """Ranks bring as many rows each, or tokens.max_rows says how many the fullest brings and none is masked:
    MC2PrepareAndFinalize sees to that. int8 is made by the op.

    Ascend's ops alternate on a group: there, a second dispatch before the first one's combine is an InvalidInputError.
    """

    def dispatch(self, tokens: RoutedTokens) -> Dispatched:
        """The op's distribute_dispatch. COLLECTIVE over ep: one. Host sync: no. Graph capture: yes."""
        tokens.check(self.placement.num_experts, takes_mask=True)
        global_bs = (tokens.max_rows or 0) * self.placement.ep_size
        output = ops_of(tokens.hidden_states).distribute_dispatch(
            tokens.hidden_states,
            tokens.topk_ids,
            group_ep=self.groups.ep,
            moe_expert_num=self.placement.num_experts,
            expert_scales=tokens.topk_weights,
            x_active_mask=tokens.mask,
            shared_expert_rank_num=self.placement.shared_expert_ranks,
            quant_mode=self.quant_mode,
            global_bs=global_bs,
        )
        handle = MC2DispatchHandle(
            expert_rows=output.expand_x.shape[0],
            topk_ids=tokens.topk_ids,
            topk_weights=tokens.topk_weights,
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
        """The op's distribute_combine. COLLECTIVE over ep: one. Host sync: no. Graph capture: yes.

        Rows of masked tokens are undefined (NaN from the portable op): finalize drops them.
        """
        handle = check_handle(handle, MC2DispatchHandle, "MC2Dispatcher.combine")
        self._check_combine(expert_output, handle)
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
            shared_expert_rank_num=self.placement.shared_expert_ranks,
            global_bs=handle.global_bs,
        )
        return combined
