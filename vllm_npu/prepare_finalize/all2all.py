"""All2All: each rank of the grid works on tokens of its own, which then travel to their experts' ranks.

Chosen for many tokens (prefill) with expert parallelism; MC2 takes over below its capacity.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from vllm_npu.handles import check_handle
from vllm_npu.prepare_finalize.base import Finalized, PrepareAndFinalize, Prepared, PrepareHandle
from vllm_npu.step_plan import StepPlan, TokenSharding
from vllm_npu.token_layout import TokenSlice, pad_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class All2AllHandle(PrepareHandle):
    """Returned by All2AllPrepareAndFinalize.prepare, consumed by its finalize."""

    tp_rows: tuple[int, ...]  # rows of each TP rank
    input_rows: int


@lru_cache(maxsize=64)  # all layers of a step ask the same; a few micro-batches are in flight
def _slices_over_tp(
    num_tokens: int, tp_rank: int, tp_size: int, sharding: TokenSharding
) -> tuple[TokenSlice, tuple[int, ...]]:
    """This TP rank's rows of its input, and the rows of each TP rank."""
    sliced = sharding is TokenSharding.SLICED_OVER_TP
    cut = TokenSlice.chunk if sliced else TokenSlice.even
    slices = [cut(num_tokens, rank=rank, size=tp_size) for rank in range(tp_size)]
    own = slices[tp_rank]
    return (TokenSlice(0, own.length) if sliced else own), tuple(each.length for each in slices)


class All2AllPrepareAndFinalize(PrepareAndFinalize):
    """Slice over TP as evenly as the count allows, without padding."""

    def prepare(self, hidden_states: torch.Tensor, per_token: tuple[torch.Tensor, ...], step: StepPlan) -> Prepared:
        """Take this TP rank's slice of the real tokens (views). LOCAL. Host sync: no."""
        self._check_prepare(hidden_states, per_token, step)
        topology = self.groups.topology
        num_tokens = step.num_tokens_across_dp[topology.dp_rank]
        own, tp_rows = _slices_over_tp(num_tokens, topology.tp_rank, topology.tp_size, step.sharding)
        handle = All2AllHandle(step=step, prepared_rows=own.length, tp_rows=tp_rows, input_rows=hidden_states.shape[0])
        return Prepared(
            hidden_states=own.take(hidden_states),
            per_token=tuple(own.take(tensor) for tensor in per_token),
            mask=None,
            handle=handle,
        )

    def finalize(self, routed_output: torch.Tensor, handle: PrepareHandle, *, reduce_results: bool = True) -> Finalized:
        """Gather the TP ranks' slices where the input was replicated. The output is complete: reduce_results has no say.

        COLLECTIVE over tp, replicated input only: one all-gather of uneven sizes. Host sync: no.
        """
        handle = check_handle(handle, All2AllHandle, "All2AllPrepareAndFinalize.finalize")
        self._check_finalize(routed_output, handle)
        if handle.step.sharding is TokenSharding.SLICED_OVER_TP:
            output = pad_rows(routed_output, handle.input_rows)
        elif self.groups.topology.tp_size > 1:
            output = self.groups.tp.all_gather(routed_output, handle.tp_rows)
        else:
            output = routed_output
        return Finalized(hidden_states=output, sharding=handle.step.sharding, reduced=True)
