"""Which experts a token goes to, and with which weights: every scheme that vLLM's models ask for on a CPU.

vLLM's CPU router knows only some schemes: it ends in an assertion for the scores "sigmoid" without groups, and ignores the bias
and the scaling factor of ungrouped softmax. The measure for the schemes below is transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.fused_moe_router import FusedMoERouter
from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter

from vllm_npu.core.configured_routing import UNKNOWN_SCORES, WEIGHT_ON_INPUT, ZERO_EXPERTS
from vllm_npu.errors import UnsupportedConfigError

SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}
"""Scores of experts from the router's logits [rows, num_experts] in float32. Its names are SCORE_NAMES."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingScheme:
    """How a layer chooses experts. Equal on every rank."""

    top_k: int
    scoring: str  # a name in SCORES
    renormalize: bool  # whether the weights of a token add up to scaling_factor
    scaling_factor: float = 1.0  # of the weights
    num_groups: int = 1  # of consecutive experts; 1: no groups
    used_groups: int = 1  # groups that a token may use

    def __post_init__(self) -> None:
        if self.scoring not in SCORES:
            raise UnsupportedConfigError(UNKNOWN_SCORES.format(scores=self.scoring))

    @classmethod
    def of(cls, router: CPURouter) -> Self:
        """The scheme that a model asked vLLM's router for. Raises UnsupportedConfigError for unknown scores."""
        grouped = router.use_grouped_topk and router.num_expert_group is not None and router.topk_group is not None
        return cls(
            top_k=router.top_k,
            scoring=router.scoring_func,
            renormalize=router.renormalize,
            scaling_factor=router.routed_scaling_factor,
            num_groups=router.num_expert_group if grouped else 1,
            used_groups=router.topk_group if grouped else 1,
        )


def choose_experts(
    router_logits: torch.Tensor,  # [rows, num_experts], any floating type
    scheme: RoutingScheme,
    *,
    bias: torch.Tensor | None = None,  # [num_experts], added to scores for the choice, not for the weights
    given_ids: torch.Tensor | None = None,  # [rows, top_k], if something other than the scores chooses
) -> tuple[torch.Tensor, torch.Tensor]:  # weights [rows, top_k] float32, ids [rows, top_k] int32
    """Choose each token's experts. LOCAL. Host sync: no. The result does not depend on the other rows."""
    scores = SCORES[scheme.scoring](router_logits.float())
    ids = given_ids
    if ids is None:
        wanted = scores if bias is None else scores + bias.float()
        if scheme.used_groups < scheme.num_groups:
            wanted = _only_the_best_groups(wanted, scheme, by_two_experts=bias is not None)
        ids = wanted.topk(scheme.top_k, dim=-1, sorted=False).indices
    weights = scores.gather(1, ids.long())
    if scheme.renormalize:
        # 1e-20, as in transformers: the scores of a row may all round to 0.
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * scheme.scaling_factor, ids.to(torch.int32)


def _only_the_best_groups(wanted: torch.Tensor, scheme: RoutingScheme, *, by_two_experts: bool) -> torch.Tensor:
    """`wanted` with -inf for experts outside the used groups. A group counts as much as its best expert, or best two."""
    grouped = wanted.unflatten(-1, (scheme.num_groups, -1))
    best = grouped.topk(min(2, grouped.shape[-1]) if by_two_experts else 1, dim=-1).values.sum(dim=-1)
    used = torch.zeros_like(best, dtype=torch.bool)
    used.scatter_(1, best.topk(scheme.used_groups, dim=-1, sorted=False).indices, True)
    return grouped.masked_fill(~used.unsqueeze(-1), float("-inf")).flatten(1)


class CpuMoERouter(CPURouter):
    """vLLM's CPU router with choose_experts in place of its arithmetic. A model's own routing function stays in force."""

    def __init__(self, router: CPURouter) -> None:
        super().__init__(
            router.top_k,
            router.global_num_experts,
            use_grouped_topk=router.use_grouped_topk,
            num_expert_group=router.num_expert_group,
            topk_group=router.topk_group,
            renormalize=router.renormalize,
            scoring_func=router.scoring_func,
            routed_scaling_factor=router.routed_scaling_factor,
            e_score_correction_bias=router.e_score_correction_bias,
            custom_routing_function=router.custom_routing_function,
            hash_indices_table=router._hash_indices_table,
            eplb_state=router.eplb_state,
        )
        self._scheme = RoutingScheme.of(router) if router.custom_routing_function is None else None

    def _compute_routing(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._scheme is None:
            weights, ids = self.custom_routing_function(
                hidden_states=hidden_states, gating_output=router_logits, topk=self.top_k, renormalize=self.renormalize
            )
            return weights.float().contiguous(), ids.to(torch.int32).contiguous()
        table = self._hash_indices_table
        return choose_experts(
            router_logits,
            self._scheme,
            bias=self.e_score_correction_bias,
            given_ids=None if table is None else table[input_ids],
        )


def router_for_cpu(router: FusedMoERouter) -> FusedMoERouter:
    """The router that a layer uses in place of the one that vLLM made for it."""
    return CpuMoERouter(router) if type(router) is CPURouter else router


def why_not_used(router: FusedMoERouter, *, weight_on_input: bool, top_k: int) -> str | None:
    """Reason why a layer that exchanges tokens cannot use this router, or None."""
    if isinstance(router, ZeroExpertRouter):
        return ZERO_EXPERTS
    if weight_on_input and top_k > 1:
        return WEIGHT_ON_INPUT.format(top_k=top_k)
    return None
