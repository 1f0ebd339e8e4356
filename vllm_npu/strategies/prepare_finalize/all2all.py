"""All2All: each rank of the grid works on tokens of its own, which then travel to their experts' ranks.

Chosen for many tokens (prefill) with expert parallelism; MC2 takes over below its capacity.
"""

from dataclasses import dataclass

import torch

from vllm_npu.core.handles import check_handle
from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.core.token_layout import TokenSlice, pad_rows
from vllm_npu.strategies.prepare_finalize.base import Finalized, PrepareAndFinalize, Prepared, PrepareHandle


@dataclass(frozen=True, slots=True)
class _Cut:
    """A step's tokens over the TP ranks."""

    own: slice | None  # rows of the input that this rank works on; None: all
    own_rows: int
    input_rows: int
    tp_rows: tuple[int, ...]  # rows of each TP rank
    gathers: bool  # whether finalize brings the TP ranks' rows together again


@dataclass(frozen=True, slots=True, kw_only=True)
class All2AllHandle(PrepareHandle):
    """Returned by All2AllPrepareAndFinalize.prepare, consumed by its finalize."""

    cut: _Cut


class All2AllPrepareAndFinalize(PrepareAndFinalize):
    """Slice over TP as evenly as the count allows, without padding."""

    def prepare(self, hidden_states: torch.Tensor, per_token: tuple[torch.Tensor, ...], step: StepPlan) -> Prepared:
        """Take this TP rank's slice of the real tokens (views). LOCAL. Host sync: no."""
        self._check_prepare(hidden_states, per_token, step)
        cut: _Cut = step.derived.get(self) or self._cut(step)
        handle = All2AllHandle(step=step, prepared_rows=cut.own_rows, cut=cut)
        own = cut.own
        if own is not None:
            hidden_states, per_token = hidden_states[own], tuple([tensor[own] for tensor in per_token])
        return Prepared(hidden_states=hidden_states, per_token=per_token, mask=None, handle=handle)

    def finalize(self, routed_output: torch.Tensor, handle: PrepareHandle, *, reduce_results: bool = True) -> Finalized:
        """Gather the TP ranks' slices where the input was replicated. The output is complete: reduce_results has no say.

        COLLECTIVE over tp, replicated input only: one all-gather of uneven sizes. Host sync: no.
        """
        handle = check_handle(handle, All2AllHandle, "All2AllPrepareAndFinalize.finalize")
        self._check_finalize(routed_output, handle)
        if handle.cut.gathers:
            output = self.groups.tp.all_gather(routed_output, handle.cut.tp_rows)
        else:
            output = pad_rows(routed_output, handle.cut.input_rows)
        return Finalized(hidden_states=output, sharding=handle.step.sharding, reduced=True)

    def _cut(self, step: StepPlan) -> _Cut:
        topology = self.groups.topology
        num_tokens, tp_size = step.num_tokens_across_dp[topology.dp_rank], topology.tp_size
        sliced = step.sharding is TokenSharding.SLICED_OVER_TP
        parts = [
            (TokenSlice.chunk if sliced else TokenSlice.even)(num_tokens, rank=rank, size=tp_size)
            for rank in range(tp_size)
        ]
        own = parts[topology.tp_rank]
        start = 0 if sliced else own.start
        input_rows = step.input_rows(topology)
        cut = step.derived[self] = _Cut(
            own=None if own.length == input_rows else slice(start, start + own.length),
            own_rows=own.length,
            input_rows=input_rows,
            tp_rows=tuple(part.length for part in parts),
            gathers=not sliced and tp_size > 1,
        )
        return cut
