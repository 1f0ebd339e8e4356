"""MC2 (Ascend's fused matrix computation and communication): every rank brings the same number of rows, some masked.

Chosen for few tokens (decode): shapes depend only on the agreed length, so nothing is counted and graphs can be captured.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_npu.core.handles import check_handle
from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.core.token_layout import TokenSlice, pad_rows, unpad_rows
from vllm_npu.strategies.prepare_finalize.base import Finalized, PrepareAndFinalize, Prepared, PrepareHandle


@dataclass(frozen=True, slots=True, kw_only=True)
class MC2Handle(PrepareHandle):
    """Returned by MC2PrepareAndFinalize.prepare, consumed by its finalize."""

    input_rows: int  # rows of this rank's input, padding included
    real_rows: int  # those of prepared_rows that are tokens: a prefix


@dataclass(frozen=True, slots=True)
class _Share:
    """What one rank works on in a step."""

    own: TokenSlice  # of this rank's input
    rows: int  # after padding
    real_rows: int
    padded: bool  # on any rank: then all mask
    max_rows: int | None


class MC2PrepareAndFinalize(PrepareAndFinalize):
    """Slice over TP; where that leaves some rank without a token or TP ranks uneven, pad to the agreed length and mask."""

    takes_uneven_ranks: ClassVar[bool] = True
    """Whether the dispatcher takes a different number of tokens from each rank, where every rank has one: max_rows."""

    def prepare(self, hidden_states: torch.Tensor, per_token: tuple[torch.Tensor, ...], step: StepPlan) -> Prepared:
        """Take this TP rank's slice, as it is or padded to step.padded_tokens. LOCAL. Host sync: no. Graph capture: yes.

        Padding rows hold 0 in floating-point tensors and -1 in integer ones; the mask is False there, and only there. A
        step that needs no padding has no mask: views of the input, nothing is copied.
        """
        self._check_prepare(hidden_states, per_token, step)
        share: _Share = step.derived.get(self) or self._share(step)
        rows, own = share.rows, share.own
        return Prepared(
            hidden_states=pad_rows(own.take(hidden_states), rows),
            per_token=tuple(
                pad_rows(own.take(tensor), rows, 0 if tensor.is_floating_point() else -1) for tensor in per_token
            ),
            mask=torch.arange(rows, device=hidden_states.device) < share.real_rows if share.padded else None,
            max_rows=share.max_rows,
            handle=MC2Handle(
                step=step, prepared_rows=rows, input_rows=hidden_states.shape[0], real_rows=share.real_rows
            ),
        )

    def finalize(self, routed_output: torch.Tensor, handle: PrepareHandle, *, reduce_results: bool = True) -> Finalized:
        """Gather the TP ranks' slices where the input was replicated, then drop the padding.

        COLLECTIVE over tp, replicated input only: one all-gather of equal sizes. Host sync: no. Graph capture: yes. The
        output is complete: reduce_results has no say. Padding rows of a sliced input come back as zeros.
        """
        handle = check_handle(handle, MC2Handle, "MC2PrepareAndFinalize.finalize")
        self._check_finalize(routed_output, handle)
        if handle.step.sharding is TokenSharding.REPLICATED and self.groups.topology.tp_size > 1:
            output = unpad_rows(self.groups.tp.all_gather(routed_output), handle.input_rows)
        else:
            output = pad_rows(unpad_rows(routed_output, handle.real_rows), handle.input_rows)
        return Finalized(hidden_states=output, sharding=handle.step.sharding, reduced=True)

    def _share(self, step: StepPlan) -> _Share:
        topology = self.groups.topology
        tp_size = topology.tp_size
        most_rows = step.padded_tokens(tp_size) // tp_size
        num_tokens = step.num_tokens_across_dp[topology.dp_rank]
        full = step.is_full(tp_size)
        padded = not full and not (self.takes_uneven_ranks and step.divides_over_tp(tp_size))
        rows = most_rows if padded else num_tokens // tp_size
        if step.sharding is TokenSharding.REPLICATED:
            own = TokenSlice.chunk(rows * tp_size, rank=topology.tp_rank, size=tp_size)
            real_rows = min(max(num_tokens - own.start, 0), rows)
        else:
            own = TokenSlice(0, rows)
            real_rows = TokenSlice.chunk(num_tokens, rank=topology.tp_rank, size=tp_size).length
        share = step.derived[self] = _Share(own, rows, real_rows, padded, None if padded or full else most_rows)
        return share


class EvenPrepareAndFinalize(MC2PrepareAndFinalize):
    """As MC2, for a dispatcher that needs as many rows of every rank."""

    takes_uneven_ranks = False
