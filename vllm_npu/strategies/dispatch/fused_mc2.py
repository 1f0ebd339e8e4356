"""Fused MC2: one operator of vllm-ascend that dispatches the tokens, computes the experts and combines their rows."""

from abc import ABC, abstractmethod
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
    scale1: list[torch.Tensor]
    """A number for each column. For dispatch_ffn_combine int64, the bits of a float32, and without elements if weights are not
    int8. For dispatch_gmm_combine_decode float32, or as the tokens."""
    scale2: list[torch.Tensor]
    bias1: list[torch.Tensor] | None  # only dispatch_ffn_combine has biases, and reads those of 4-bit weights only
    bias2: list[torch.Tensor] | None
    swiglu_limit: float  # 0: the activation clamps nothing. Only dispatch_ffn_combine has it
    max_rows: int | None  # rows that a rank of dispatch_ffn_combine can receive; it drops more without an error


class FusedMC2(ABC):
    """The expert-level stage of fused_mc2. It holds its groups and the placement, and no state of a call."""

    def __init__(self, groups: Groups, num_experts: int, quant_mode: QuantMode = QuantMode.NONE) -> None:
        self.groups = groups
        self.placement = ExpertPlacement(num_experts, groups.topology.ep_size)
        self.quant_mode = quant_mode

    @abstractmethod
    def run(self, tokens: RoutedTokens, experts: FusedExperts) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weighted sum of each token's experts [num_tokens, hidden_size], and the rows of each expert of this rank
        [experts of a rank]. COLLECTIVE over ep: one. Host sync: no. Graph capture: yes. Rows of masked tokens are undefined."""

    def _unmasked_ids(self, tokens: RoutedTokens) -> torch.Tensor:
        """The ids [num_tokens, top_k] int32, where an operator takes no mask: those of masked tokens are valid ids, distinct in
        each row and spread over all experts. Their rows are computed too."""
        ids = tokens.topk_ids.int()
        if tokens.mask is not None:
            in_turn = torch.arange(ids.numel(), dtype=ids.dtype, device=ids.device).view(ids.shape)
            ids = torch.where(tokens.mask.unsqueeze(-1), ids, in_turn % self.placement.num_experts)
        return ids.contiguous()


class FfnCombine(FusedMC2):
    """dispatch_ffn_combine. All ranks bring the same number of rows, at least one, as EvenPrepareAndFinalize does.

    The operator for int8 leaves masked rows out. That for 16-bit weights has no mask, so received_rows of the limits counts
    them. The counts are int32.
    """

    def run(self, tokens: RoutedTokens, experts: FusedExperts) -> tuple[torch.Tensor, torch.Tensor]:
        """See FusedMC2. Raises InvalidInputError where ranks differ in rows, or where no room for rows is given."""
        tokens.check(self.placement.num_experts, takes_mask=True, distinct_for="fused_mc2")
        if tokens.max_rows is not None:
            raise InvalidInputError(
                f"fused_mc2 needs as many rows on every rank, but max_rows={tokens.max_rows} says that they differ"
            )
        if experts.max_rows is None:
            raise InvalidInputError("dispatch_ffn_combine needs max_rows, the rows that a rank has room for")
        takes_mask = self.quant_mode is not QuantMode.NONE
        ids = tokens.topk_ids.int().contiguous() if takes_mask else self._unmasked_ids(tokens)
        output: tuple[torch.Tensor, torch.Tensor] = ops_of(tokens.hidden_states).dispatch_ffn_combine(
            tokens.hidden_states.contiguous(),
            ids,
            tokens.topk_weights.float().contiguous(),
            weights=(experts.w1, experts.w2),
            scales=(experts.scale1, experts.scale2),
            biases=(experts.bias1 or [], experts.bias2 or []),
            group_ep=self.groups.ep,
            num_local_experts=self.placement.experts_per_rank,
            max_output_size=experts.max_rows,
            x_active_mask=tokens.mask if takes_mask else None,
            swiglu_limit=experts.swiglu_limit,
        )
        return output


class GmmCombineDecode(FusedMC2):
    """dispatch_gmm_combine_decode, for int8 weights. Ranks bring rows as for MC2's ops: as many on each rank, or max_rows is
    set. Each rank brings at least one row. The counts are int64.

    The operator's mask is not used: vllm-ascend passes none.
    """

    def run(self, tokens: RoutedTokens, experts: FusedExperts) -> tuple[torch.Tensor, torch.Tensor]:
        """See FusedMC2."""
        tokens.check(self.placement.num_experts, takes_mask=True, distinct_for="fused_mc2")
        output: tuple[torch.Tensor, torch.Tensor] = ops_of(tokens.hidden_states).dispatch_gmm_combine_decode(
            tokens.hidden_states.contiguous(),
            self._unmasked_ids(tokens),
            tokens.topk_weights.float().contiguous(),
            weights=(experts.w1, experts.w2),
            scales=(experts.scale1, experts.scale2),
            group_ep=self.groups.ep,
            moe_expert_num=self.placement.num_experts,
            global_bs=(tokens.max_rows or 0) * self.placement.ep_size,
        )
        return output
