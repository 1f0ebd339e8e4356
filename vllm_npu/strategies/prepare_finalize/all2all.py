"""All2All: each rank of the grid works on tokens of its own. The dispatcher then sends them to the ranks of their experts.

For many tokens (prefill) with expert parallelism. MC2 is for steps within its capacity.
"""

from dataclasses import dataclass

import torch

from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.core.token_layout import TokenSlice, even_sizes, pad_rows
from vllm_npu.strategies.prepare_finalize.base import Finalized, PrepareAndFinalize, Prepared, PrepareHandle


@dataclass(frozen=True, slots=True, kw_only=True)
class All2AllHandle(PrepareHandle):
    """Returned by All2AllPrepareAndFinalize.prepare, consumed by its finalize."""


class All2AllPrepareAndFinalize(PrepareAndFinalize):
    """Each TP rank takes an even slice of the real tokens. Slices differ by at most one token; there is no padding."""

    def prepare(self, hidden_states: torch.Tensor, per_token: tuple[torch.Tensor, ...], step: StepPlan) -> Prepared:
        """Take this TP rank's slice of the real tokens, as views. LOCAL. Host sync: no."""
        self._check_prepare(hidden_states, per_token, step)
        topology = self.groups.topology
        num_tokens = step.num_tokens_across_dp[topology.dp_rank]
        if step.sharding is TokenSharding.REPLICATED:
            own = TokenSlice.even(num_tokens, rank=topology.tp_rank, size=topology.tp_size)
        else:  # the input is this rank's slice already, its real rows first
            own = TokenSlice(0, TokenSlice.chunk(num_tokens, rank=topology.tp_rank, size=topology.tp_size).length)
        return Prepared(
            hidden_states=own.take(hidden_states),
            per_token=tuple([own.take(tensor) for tensor in per_token]),
            mask=None,
            handle=All2AllHandle(step=step, rows=own.length),
        )

    def finalize(self, routed_output: torch.Tensor, handle: PrepareHandle, *, reduce_results: bool = True) -> Finalized:
        """Gather the slices of the TP ranks, or put the padding of a sliced input back as zeros.

        COLLECTIVE over tp for replicated input: one all-gather of uneven sizes. LOCAL for sliced input. Host sync: no. The
        output is complete, so reduce_results has no effect.
        """
        handle = self._consume(handle, All2AllHandle, routed_output)
        step, topology = handle.step, self.groups.topology
        if step.is_replicated(topology.tp_size):
            num_tokens = step.num_tokens_across_dp[topology.dp_rank]
            output = self.groups.tp.all_gather(routed_output, even_sizes(num_tokens, topology.tp_size))
        else:
            output = pad_rows(routed_output, step.input_rows(topology))
        return Finalized(hidden_states=output, sharding=step.sharding, reduced=True)
