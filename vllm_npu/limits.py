"""What an implementation of a strategy can take, as data with its source. Enforced by strategies.select()."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MC2Limits:
    """Limits of one implementation of the MC2 dispatch and combine ops."""

    max_tokens_per_rank: int
    native: bool
    """Whether a fused kernel runs it. Where not, `auto` does not choose mc2: the portable op sends top_k rows back for
    each token, all2all one a rank."""
    source: str


PORTABLE_MC2 = MC2Limits(
    max_tokens_per_rank=512,
    native=False,
    source="portable_ops has no limit of its own; 512 is what npu_moe_distribute_dispatch_v2 takes on A3 (CANN 8.5), kept "
    "so that a choice made on a laptop is the one made on a cluster",
)
