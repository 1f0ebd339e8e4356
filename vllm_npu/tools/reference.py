"""A dense mixture of experts in one process: the reference for every strategy."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


def select_topk(
    router_logits: torch.Tensor,  # [num_tokens, num_experts]
    top_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # weights float32, ids int32, both [num_tokens, top_k]
    """Softmax, then the top k. In a tie the lower id wins, as on Ascend; torch.topk on a CPU decides otherwise."""
    scores = router_logits.float().softmax(-1)
    ids = scores.neg().argsort(dim=-1, stable=True)[:, :top_k]
    return scores.gather(1, ids), ids.to(torch.int32)


@dataclass(frozen=True, slots=True)
class LinearExperts:
    """Experts that are one matrix each. Results differ by expert, token and weight, and are exact for small integers."""

    weights: torch.Tensor  # [num_experts, hidden_size, width]; int8 if there are scales
    scales: torch.Tensor | None = None  # [num_experts, width] float32: value = weight * scale

    @classmethod
    def integer(
        cls, num_experts: int, hidden_size: int, width: int, *, seed: int, dtype: torch.dtype
    ) -> "LinearExperts":
        """Weights of -1, 0 and 1, at most two nonzero in a column. Outputs of small integers are exact in bfloat16."""
        generator = torch.Generator().manual_seed(seed)
        weights = torch.zeros(num_experts, hidden_size, width)
        for _ in range(2):
            rows = torch.randint(hidden_size, (num_experts, 1, width), generator=generator)
            signs = torch.randint(2, (num_experts, 1, width), generator=generator) * 2.0 - 1
            weights.scatter_(1, rows, signs)
        return cls(weights.to(dtype))

    @classmethod
    def random(
        cls, num_experts: int, hidden_size: int, width: int, *, seed: int, dtype: torch.dtype
    ) -> "LinearExperts":
        """Gaussian weights. Outputs have the scale of the input."""
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(num_experts, hidden_size, width, generator=generator) * hidden_size**-0.5
        return cls(weights.to(dtype))

    def to(self, device: torch.device) -> "LinearExperts":
        """Copies on another device."""
        return LinearExperts(self.weights.to(device), None if self.scales is None else self.scales.to(device))

    def shard(self, rank: int, size: int) -> "LinearExperts":
        """The part of every expert on one of `size` ranks without expert parallelism.

        The outputs of all parts add up to the output.
        """
        own = torch.arange(self.weights.shape[1], device=self.weights.device) % size == rank
        return LinearExperts(torch.where(own[None, :, None], self.weights, 0), self.scales)

    def on_rank(self, first_expert: int, num_local_experts: int) -> "LinearExperts":
        """The experts of one rank under expert parallelism, as views."""
        own = slice(first_expert, first_expert + num_local_experts)
        return LinearExperts(self.weights[own], None if self.scales is None else self.scales[own])

    def at(self, ids: Sequence[int]) -> "LinearExperts":
        """The experts with these ids, as copies."""
        own = list(ids)
        return LinearExperts(self.weights[own], None if self.scales is None else self.scales[own])

    def quantized(self) -> "LinearExperts":
        """The same experts in int8, with a scale for each output column.

        Scales are powers of two, so small integers stay exact.
        """
        weights = self.weights.float()
        scales = (weights.abs().amax(1).clamp_min(2.0**-20) / 127).log2().ceil().exp2()
        return LinearExperts((weights / scales[:, None]).round().to(torch.int8), scales)

    def dequantized(self) -> "LinearExperts":
        """The same experts in float32, without scales."""
        return LinearExperts(self.weights.float() if self.scales is None else self.weights * self.scales[:, None])


def reference_moe(
    hidden_states: torch.Tensor,  # [num_tokens, hidden_size]
    topk_weights: torch.Tensor,  # [num_tokens, top_k] float32
    topk_ids: torch.Tensor,  # [num_tokens, top_k], global expert ids
    experts: LinearExperts,
) -> torch.Tensor:  # [num_tokens, width], dtype of hidden_states
    """Sum over k of weight * expert(token), in float32 and in order of k. An expert's output has the tokens' dtype."""
    total = torch.zeros(hidden_states.shape[0], experts.weights.shape[2])
    for k in range(topk_ids.shape[1]):
        for expert in topk_ids[:, k].unique().tolist():
            rows = (topk_ids[:, k] == expert).nonzero().squeeze(1)
            output = (hidden_states[rows].float() @ experts.weights[expert].float()).to(hidden_states.dtype).float()
            total[rows] += output * topk_weights[rows, k, None]
    return total.to(hidden_states.dtype)
