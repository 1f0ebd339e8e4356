"""Fused MC2: one operator of vllm-ascend that dispatches the tokens, computes the experts and combines their rows."""

from dataclasses import dataclass

import torch

from vllm_npu.core.limits import QuantMode
from vllm_npu.core.topology import ExpertPlacement
from vllm_npu.device import ops_of
from vllm_npu.errors import InvalidInputError
from vllm_npu.strategies.dispatch.base import RoutedTokens
from vllm_npu.transport.base import Groups


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedExperts:
    """The weights of this rank's experts, as vllm-ascend prepares them for the operator, and the room for rows.

    A list has one tensor for all experts, or one for each.
    """

    w1: list[
        torch.Tensor
    ]  # [experts, hidden_size, 2 * intermediate_size], or without the first dimension: gate, then up
    w2: list[torch.Tensor]  # [experts, intermediate_size, hidden_size]
    scale1: list[torch.Tensor]  # int64, the bits of a float32 for each column; without elements if weights are not int8
    scale2: list[torch.Tensor]
    bias1: list[torch.Tensor]  # the operator reads biases of 4-bit weights only
    bias2: list[torch.Tensor]
    swiglu_limit: float  # 0: the activation clamps nothing
    max_rows: int  # the rows that a rank can receive; the operator drops more without an error


class FusedMC2:
    """The expert-level stage of fused_mc2. It holds its groups and the placement, and no state of a call.

    All ranks bring the same number of rows, at least one. EvenPrepareAndFinalize brings such rows.
    """

    def __init__(self, groups: Groups, num_experts: int, quant_mode: QuantMode = QuantMode.NONE) -> None:
        self.groups = groups
        self.placement = ExpertPlacement(num_experts, groups.topology.ep_size)
        self.quant_mode = quant_mode

    def run(self, tokens: RoutedTokens, experts: FusedExperts) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weighted sum of each token's experts [num_tokens, hidden_size], and the rows of each expert of this rank
        [experts of a rank] int32. COLLECTIVE over ep: one. Host sync: no. Graph capture: yes.

        Rows of masked tokens are undefined. The operator for int8 leaves them out. That for 16-bit weights has no mask: there a
        masked row goes to experts in turn, so received_rows of the limits counts it.
        """
        tokens.check(self.placement.num_experts, takes_mask=True, distinct_for="fused_mc2")
        if tokens.max_rows is not None:
            raise InvalidInputError(
                f"fused_mc2 needs as many rows on every rank, but max_rows={tokens.max_rows} says that they differ"
            )
        ids, mask = tokens.topk_ids.int(), tokens.mask
        if mask is not None and self.quant_mode is QuantMode.NONE:
            ids, mask = torch.where(mask.unsqueeze(-1), ids, self._experts_in_turn(ids)), None
        output: tuple[torch.Tensor, torch.Tensor] = ops_of(tokens.hidden_states).dispatch_ffn_combine(
            tokens.hidden_states.contiguous(),
            ids.contiguous(),
            tokens.topk_weights.float().contiguous(),
            weights=(experts.w1, experts.w2),
            scales=(experts.scale1, experts.scale2),
            biases=(experts.bias1, experts.bias2),
            group_ep=self.groups.ep,
            num_local_experts=self.placement.experts_per_rank,
            max_output_size=experts.max_rows,
            x_active_mask=mask,
            swiglu_limit=experts.swiglu_limit,
        )
        return output

    def _experts_in_turn(self, ids: torch.Tensor) -> torch.Tensor:
        """Valid ids of the shape of `ids`, distinct in each row and spread over all experts."""
        return (
            torch.arange(ids.numel(), dtype=ids.dtype, device=ids.device).view(ids.shape) % self.placement.num_experts
        )
