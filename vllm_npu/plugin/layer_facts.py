"""What is known of an MoE layer before it runs. The limits of strategies depend on it, and all ranks must agree on it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from vllm_npu.core.limits import MoELayer, QuantMode
from vllm_npu.core.step_plan import TokenSharding

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFacts:
    """One MoE layer whose tokens this package moves. Equal on every rank. Built once for each layer."""

    moe_layer: MoELayer  # redundant experts included
    use_ep: bool  # whether ranks own whole experts
    sharding: TokenSharding  # of the layer's input over TP
    experts_class: str  # name of vLLM's class that computes the experts

    @classmethod
    def of(
        cls,
        moe_config: "FusedMoEConfig",
        *,
        sharding: TokenSharding,
        experts: object,
        shared_experts: int = 0,  # among moe_config.num_experts; every token goes to each of them
        ids_of_expert: int = 1,  # more than one where the id of an expert says which adapter the row has
        quant_mode: QuantMode = QuantMode.NONE,
        int4_weights: bool = False,
        swiglu_limit: float = 0.0,  # 0: the activation clamps nothing
    ) -> Self:
        """Take the facts from vLLM's description of the layer."""
        return cls(
            moe_layer=MoELayer(
                num_experts=int(moe_config.num_experts) * ids_of_expert,
                top_k=int(moe_config.experts_per_token) + shared_experts,
                hidden_size=int(moe_config.hidden_dim),
                dtype=moe_config.in_dtype,
                quant_mode=quant_mode,
                int4_weights=int4_weights,
                intermediate_size=int(moe_config.intermediate_size_per_partition),
                activation=str(getattr(moe_config.activation, "value", moe_config.activation)),
                swiglu_limit=swiglu_limit,
                has_bias=bool(moe_config.has_bias),
            ),
            use_ep=bool(moe_config.use_ep),
            sharding=sharding,
            experts_class=type(experts).__name__,
        )

    def __str__(self) -> str:
        layer = self.moe_layer
        return (
            f"{layer.num_experts} experts top {layer.top_k} hidden {layer.hidden_size} "
            f"{str(layer.dtype).removeprefix('torch.')} {self.experts_class} {layer.quant_mode.name.lower()}"
        )


def exchanges_tokens(moe_config: "FusedMoEConfig") -> bool:
    """Whether the layer's tokens travel to other ranks. If they do not, vLLM's own layer runs: it is correct, and faster."""
    return bool(moe_config.ep_size > 1 or moe_config.dp_size > 1)
