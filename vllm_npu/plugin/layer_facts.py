"""What is known of an MoE layer before it runs: what limits depend on, and what all ranks must have in common."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

from vllm_npu.core.limits import MoELayer, QuantMode
from vllm_npu.core.step_plan import TokenSharding

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFacts:
    """One MoE layer whose tokens this package moves. Equal on every rank."""

    num_experts: int  # over all ranks, redundant ones included
    top_k: int
    hidden_size: int
    dtype: torch.dtype  # of hidden_states
    use_ep: bool  # whether ranks own whole experts
    sharding: TokenSharding
    experts: str  # class that computes them
    quant_mode: QuantMode = QuantMode.NONE

    @classmethod
    def of(
        cls,
        moe_config: "FusedMoEConfig",
        *,
        sharding: TokenSharding,
        experts: object,
        quant_mode: QuantMode = QuantMode.NONE,
    ) -> Self:
        """From vLLM's description of the layer."""
        return cls(
            num_experts=int(moe_config.num_experts),
            top_k=int(moe_config.experts_per_token),
            hidden_size=int(moe_config.hidden_dim),
            dtype=moe_config.in_dtype,
            use_ep=bool(moe_config.use_ep),
            sharding=sharding,
            experts=type(experts).__name__,
            quant_mode=quant_mode,
        )

    @property
    def moe_layer(self) -> MoELayer:
        """What limits depend on."""
        return MoELayer(
            num_experts=self.num_experts,
            top_k=self.top_k,
            hidden_size=self.hidden_size,
            dtype=self.dtype,
            quant_mode=self.quant_mode,
        )

    def __str__(self) -> str:
        return (
            f"{self.num_experts} experts top {self.top_k} hidden {self.hidden_size} "
            f"{str(self.dtype).removeprefix('torch.')} {self.experts} {self.quant_mode.name.lower()}"
        )


def exchanges_tokens(moe_config: "FusedMoEConfig") -> bool:
    """Whether the layer's tokens travel to other ranks. Where not, vLLM's own layer is right, and fast."""
    return bool(moe_config.ep_size > 1 or moe_config.dp_size > 1)
