"""MC2 (Ascend's fused matrix computation and communication): each rank of the grid works on one slice of the tokens.

For few tokens (decode): shapes follow from the planned counts, so nothing is counted, and graphs can be captured.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.core.token_layout import TokenSlice, ceil_div, pad_rows, unpad_rows
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.strategies.prepare_finalize.base import Finalized, PrepareAndFinalize, Prepared, PrepareHandle


@dataclass(frozen=True, slots=True, kw_only=True)
class MC2Handle(PrepareHandle):
    """Returned by MC2PrepareAndFinalize.prepare, consumed by its finalize."""

    input_rows: int  # rows of this rank's input, padding included
    real_rows: int  # number of prepared rows that are tokens; they come first


class MC2PrepareAndFinalize(PrepareAndFinalize):
    """Slice over TP. Where the ranks' slices cannot be dispatched as they are, pad all of them to one length and mask."""

    takes_uneven_ranks: ClassVar[bool] = True
    """Whether the dispatcher takes a different number of tokens from each rank. Every rank must then have a token."""

    def prepare(self, hidden_states: torch.Tensor, per_token: tuple[torch.Tensor, ...], step: StepPlan) -> Prepared:
        """Take this TP rank's slice, and pad it where the step needs padding. LOCAL. Host sync: no. Graph capture: yes.

        Padding rows hold 0 in floating-point tensors and -1 in integer ones. The mask is False for padding rows, and True
        for all others. A step without padding has no mask, and its tensors are views of the input. Where the ranks agreed on
        no counts, MC2's op takes no mask: the padding rows then go to the first experts, and finalize drops what comes back.
        """
        self._check_prepare(hidden_states, per_token, step)
        own = own_rows(step, self.groups.topology, takes_uneven_ranks=self.takes_uneven_ranks)
        return Prepared(
            hidden_states=pad_rows(own.slice.take(hidden_states), own.rows),
            per_token=tuple([_padded(own.slice.take(x), own.rows, chosen=not own.padded) for x in per_token]),
            mask=torch.arange(own.rows, device=hidden_states.device) < own.real_rows if own.padded else None,
            max_rows=own.max_rows,
            handle=MC2Handle(step=step, rows=own.rows, input_rows=hidden_states.shape[0], real_rows=own.real_rows),
        )

    def finalize(self, routed_output: torch.Tensor, handle: PrepareHandle, *, reduce_results: bool = True) -> Finalized:
        """Gather the slices of the TP ranks where the input was replicated, and drop the padding.

        COLLECTIVE over tp for replicated input: one all-gather of equal sizes. LOCAL for sliced input, whose padding rows
        come back as zeros. Host sync: no. Graph capture: yes. The output is complete, so reduce_results has no effect.
        """
        handle = self._consume(handle, MC2Handle, routed_output)
        if handle.step.is_replicated(self.groups.topology.tp_size):
            output = unpad_rows(self.groups.tp.all_gather(routed_output), handle.input_rows)
        else:
            output = pad_rows(unpad_rows(routed_output, handle.real_rows), handle.input_rows)
        return Finalized(hidden_states=output, sharding=handle.step.sharding, reduced=True)


class EvenPrepareAndFinalize(MC2PrepareAndFinalize):
    """MC2's pair for a dispatcher that needs the same number of rows from every rank."""

    takes_uneven_ranks = False


class OwnRows(NamedTuple):
    """The rows that one rank works on in one step."""

    slice: TokenSlice  # of this rank's input; it may end past the last row
    rows: int  # number of rows after padding
    real_rows: int  # number of rows that are tokens
    padded: bool  # whether any rank pads: then every rank has a mask
    max_rows: int | None  # the most rows of any rank, where ranks differ; None: all ranks have the same number


def own_rows(step: StepPlan, topology: ParallelTopology, *, takes_uneven_ranks: bool) -> OwnRows:
    """The rows of this rank. A step is padded where some rank has no token or TP ranks differ, and also where any two ranks
    differ unless takes_uneven_ranks."""
    tp_rank, tp_size = topology.tp_rank, topology.tp_size
    num_tokens = step.tokens_of(topology.dp_rank)
    most_rows = step.padded_tokens(tp_size) // tp_size
    full = step.is_full(tp_size) and step.own_tokens is None
    padded = not full and not (takes_uneven_ranks and step.divides_over_tp(tp_size))
    rows = most_rows if padded else ceil_div(num_tokens, tp_size)
    if step.sharding is TokenSharding.REPLICATED:
        taken = TokenSlice(tp_rank * rows, (tp_rank + 1) * rows)
        real_rows = min(max(num_tokens - taken.start, 0), rows)
    else:
        real_rows = TokenSlice.chunk(num_tokens, rank=tp_rank, size=tp_size).length
        taken = TokenSlice(0, rows if step.own_tokens is None else real_rows)
    return OwnRows(taken, rows, real_rows, padded, None if padded or full else most_rows)


def _padded(
    x: torch.Tensor,  # [num_rows, ...]
    rows: int,
    *,
    chosen: bool,  # whether the padding rows go to experts
) -> torch.Tensor:
    """The rows of x and then padding: 0 in floating-point tensors. In ids it is -1, or the first experts if `chosen`."""
    if x.is_floating_point():
        return pad_rows(x, rows)
    padded = pad_rows(x, rows, -1)
    if chosen and x.shape[0] < rows:
        padded[x.shape[0] :] = torch.arange(x.shape[1], device=x.device)  # distinct, as the op demands
    return padded
