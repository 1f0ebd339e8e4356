"""Facts of one forward step that are known before any tensor moves, and that are equal on every rank."""

from dataclasses import dataclass
from enum import Enum

from vllm_npu.core.token_layout import ceil_div, chunk_sizes
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.errors import InvalidInputError


class TokenSharding(Enum):
    """How the tokens of a DP rank are divided over its tensor-parallel ranks.

    Decode context parallelism divides the KV cache over TP ranks, and no tokens: they stay as without it. With prefill context
    parallelism each rank of that group has tokens of its own, as a DP rank has. The expert-parallel group then has dp * pcp *
    tp ranks, and no topology here says so: such an engine is refused.
    """

    REPLICATED = "replicated"
    """Every TP rank holds all tokens of its DP rank."""

    SLICED_OVER_TP = "sliced_over_tp"
    """TP rank t holds rows [t*c, (t+1)*c) with c = ceil(num_tokens / tp_size). Rows past num_tokens are padding."""

    @classmethod
    def from_flags(
        cls, *, enable_shared_expert_dp: bool, replace_allreduce: bool, sequence_parallel: bool
    ) -> "TokenSharding":
        """The sharding for the three flags of the original design. Each flag says that the input is already sliced."""
        sliced = enable_shared_expert_dp or replace_allreduce or sequence_parallel
        return cls.SLICED_OVER_TP if sliced else cls.REPLICATED


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Token counts of one step. Equal on every rank of the grid: no field but own_tokens depends on the rank."""

    num_tokens_across_dp: tuple[int, ...]  # real tokens of each DP rank, or the bound of each where own_tokens is set
    sharding: TokenSharding
    captured: bool = False
    """Whether a graph is captured from the step, or replayed for it. The counts are then those of the graph, with padding."""
    own_tokens: int | None = None
    """Tokens of this DP rank, where the ranks agreed on a bound in place of counts. None: they agreed on the counts."""

    def __post_init__(self) -> None:
        if not self.num_tokens_across_dp or min(self.num_tokens_across_dp) < 0:
            raise InvalidInputError(
                f"num_tokens_across_dp={self.num_tokens_across_dp}: give one count >= 0 for each DP rank"
            )
        if self.own_tokens is not None and not 0 < self.own_tokens <= min(self.num_tokens_across_dp):
            raise InvalidInputError(
                f"own_tokens={self.own_tokens}: give 1 to {min(self.num_tokens_across_dp)} tokens, which is the bound"
            )
        if self.captured and len(set(self.num_tokens_across_dp)) > 1:
            raise InvalidInputError(
                f"num_tokens_across_dp={self.num_tokens_across_dp} of a captured step: a graph freezes the counts, so pad "
                "every DP rank to the graph's size, or run the step eagerly"
            )

    @property
    def max_tokens_across_dp(self) -> int:
        """Number of tokens of the DP rank that has most."""
        return max(self.num_tokens_across_dp)

    def tokens_of(self, dp_rank: int) -> int:
        """Number of tokens of this rank's DP rank, `dp_rank`."""
        return self.num_tokens_across_dp[dp_rank] if self.own_tokens is None else self.own_tokens

    def is_replicated(self, tp_size: int) -> bool:
        """Whether several TP ranks hold the same tokens."""
        return self.sharding is TokenSharding.REPLICATED and tp_size > 1

    def divides_over_tp(self, tp_size: int) -> bool:
        """Whether every rank of the grid has a token, and all TP ranks of one DP rank have the same number of tokens."""
        return all(count > 0 and count % tp_size == 0 for count in self.num_tokens_across_dp)

    def padded_tokens(self, tp_size: int) -> int:
        """Number of tokens of each DP rank after all ranks are padded to one size: a multiple of tp_size, at least tp_size.

        It is never 0, since the Ascend dispatch op needs a row on every rank.
        """
        return max(1, ceil_div(self.max_tokens_across_dp, tp_size)) * tp_size

    def is_full(self, tp_size: int) -> bool:
        """Whether every rank of the grid has padded_tokens / tp_size real rows. Such a step needs no padding and no mask."""
        return min(self.num_tokens_across_dp) == self.padded_tokens(tp_size)

    def input_rows(self, topology: ParallelTopology) -> int:
        """Number of rows of hidden_states on this rank, before and after the layer. Padding is counted."""
        num_tokens = self.tokens_of(topology.dp_rank)
        if self.sharding is TokenSharding.REPLICATED:
            return num_tokens
        return ceil_div(num_tokens, topology.tp_size)

    def sliced_tokens_across_ep(self, tp_size: int) -> list[int]:
        """Number of real tokens on each rank of the grid under SLICED_OVER_TP. Padding is not counted."""
        return [size for num_tokens in self.num_tokens_across_dp for size in chunk_sizes(num_tokens, tp_size)]

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
        bound = "" if self.own_tokens is None else f"{self.own_tokens} of up to "
        captured = " captured" if self.captured else ""
        return f"tokens={bound}{list(self.num_tokens_across_dp)} sharding={self.sharding.value}{captured}"
