"""What is known of one forward step before any tensor moves, equal on every rank."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from vllm_npu.core.token_layout import TokenSlice, ceil_div
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.errors import InvalidInputError


class TokenSharding(Enum):
    """How a DP rank's tokens lie over its tensor-parallel ranks."""

    REPLICATED = "replicated"
    """Every TP rank holds all tokens of its DP rank."""

    SLICED_OVER_TP = "sliced_over_tp"
    """TP rank t holds rows [t*c, (t+1)*c) with c = ceil(num_tokens / tp_size); rows past num_tokens are padding."""

    @classmethod
    def from_flags(
        cls, *, enable_shared_expert_dp: bool, replace_allreduce: bool, sequence_parallel: bool
    ) -> "TokenSharding":
        """The sharding that the original design's three flags describe: each says that the input is already sliced."""
        sliced = enable_shared_expert_dp or replace_allreduce or sequence_parallel
        return cls.SLICED_OVER_TP if sliced else cls.REPLICATED


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Token counts of one step. Equal on every rank of the grid; no field depends on the rank that holds it."""

    num_tokens_across_dp: tuple[int, ...]
    sharding: TokenSharding
    captured: bool = False
    """Whether a graph is captured from the step, or replayed for it: the counts are then the graph's, padding included."""

    derived: dict[object, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What follows from the step for who keeps it here: each layer asks the same, and host time counts. Not of the plan."""

    def __post_init__(self) -> None:
        if not self.num_tokens_across_dp or min(self.num_tokens_across_dp) < 0:
            raise InvalidInputError(
                f"num_tokens_across_dp={self.num_tokens_across_dp}: give one count >= 0 for each DP rank"
            )
        if self.captured and len(set(self.num_tokens_across_dp)) > 1:
            raise InvalidInputError(
                f"num_tokens_across_dp={self.num_tokens_across_dp} of a captured step: a graph freezes the counts, so pad "
                "every DP rank to the graph's size, or run the step eagerly"
            )

    @property
    def max_tokens_across_dp(self) -> int:
        """Tokens of the fullest DP rank."""
        return max(self.num_tokens_across_dp)

    def divides_over_tp(self, tp_size: int) -> bool:
        """Whether every rank of the grid has a token, and the TP ranks of each DP rank as many."""
        return all(count > 0 and count % tp_size == 0 for count in self.num_tokens_across_dp)

    def padded_tokens(self, tp_size: int) -> int:
        """Tokens per DP rank once every rank is padded alike: the maximum over DP, up to a multiple of tp_size, >= tp_size.

        Never 0: the Ascend dispatch op wants at least one row on every rank.
        """
        return max(1, ceil_div(self.max_tokens_across_dp, tp_size)) * tp_size

    def is_full(self, tp_size: int) -> bool:
        """Whether no rank of the grid pads: every one brings padded_tokens / tp_size real rows. Then nothing is masked."""
        return min(self.num_tokens_across_dp) == self.padded_tokens(tp_size)

    def input_rows(self, topology: ParallelTopology) -> int:
        """Rows of hidden_states that this rank brings to the layer and takes back from it."""
        num_tokens = self.num_tokens_across_dp[topology.dp_rank]
        if self.sharding is TokenSharding.REPLICATED:
            return num_tokens
        return ceil_div(num_tokens, topology.tp_size)

    def sliced_tokens_across_ep(self, tp_size: int) -> list[int]:
        """Real tokens on each rank of the grid under SLICED_OVER_TP: padding rows are not counted."""
        return [
            TokenSlice.chunk(num_tokens, rank=tp_rank, size=tp_size).length
            for num_tokens in self.num_tokens_across_dp
            for tp_rank in range(tp_size)
        ]

    def check_input(self, hidden_states_rows: int, topology: ParallelTopology) -> None:
        """Raise InvalidInputError unless the plan fits the topology and this rank's hidden_states."""
        if len(self.num_tokens_across_dp) != topology.dp_size:
            raise InvalidInputError(
                f"the step plan counts {len(self.num_tokens_across_dp)} DP ranks, but dp_size={topology.dp_size}"
            )
        expected = self.input_rows(topology)
        if hidden_states_rows != expected:
            raise InvalidInputError(
                f"hidden_states has {hidden_states_rows} rows on rank {topology.rank}, but the step plan "
                f"({self}) gives this rank {expected}"
            )

    def __str__(self) -> str:
        return f"tokens={list(self.num_tokens_across_dp)} sharding={self.sharding.value}{' captured' if self.captured else ''}"
