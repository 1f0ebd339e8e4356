"""MC2 (Ascend's fused matrix computation and communication): every rank brings the same number of rows, some masked.

Chosen for few tokens (decode): shapes depend only on the agreed length, so nothing is counted and graphs can be captured.
"""

from dataclasses import dataclass

import torch

from vllm_npu.handles import check_handle
from vllm_npu.prepare_finalize.base import Finalized, PrepareAndFinalize, Prepared, PrepareHandle
from vllm_npu.step_plan import StepPlan, TokenSharding
from vllm_npu.token_layout import TokenSlice, pad_rows, unpad_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class MC2Handle(PrepareHandle):
    """Returned by MC2PrepareAndFinalize.prepare, consumed by its finalize."""

    input_rows: int  # rows of this rank's input, padding included
    real_rows: int  # those of prepared_rows that are tokens: a prefix


class MC2PrepareAndFinalize(PrepareAndFinalize):
    """Pad to the agreed length, slice over TP, mask the padding."""

    def prepare(self, hidden_states: torch.Tensor, per_token: tuple[torch.Tensor, ...], step: StepPlan) -> Prepared:
        """Pad to step.padded_tokens, then take this TP rank's slice. LOCAL. Host sync: no. Graph capture: yes.

        Padding rows hold 0 in floating-point tensors and -1 in integer ones; the mask is False there, and only there. Where
        the step is full on every rank there is no mask on any, and no kernel runs.
        """
        self._check_prepare(hidden_states, per_token, step)
        topology = self.groups.topology
        padded_tokens = step.padded_tokens(topology.tp_size)
        rows = padded_tokens // topology.tp_size
        num_tokens = step.num_tokens_across_dp[topology.dp_rank]
        if step.sharding is TokenSharding.REPLICATED:
            own = TokenSlice.chunk(padded_tokens, rank=topology.tp_rank, size=topology.tp_size)
            real_rows = min(max(num_tokens - own.start, 0), rows)
        else:
            own = TokenSlice(0, rows)
            real_rows = TokenSlice.chunk(num_tokens, rank=topology.tp_rank, size=topology.tp_size).length
        handle = MC2Handle(step=step, prepared_rows=rows, input_rows=hidden_states.shape[0], real_rows=real_rows)
        return Prepared(
            hidden_states=pad_rows(own.take(hidden_states), rows),
            per_token=tuple(
                pad_rows(own.take(tensor), rows, 0 if tensor.is_floating_point() else -1) for tensor in per_token
            ),
            mask=None if step.is_full(topology.tp_size) else _first(real_rows, rows, hidden_states.device),
            handle=handle,
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


def _first(real_rows: int, rows: int, device: torch.device) -> torch.Tensor:
    """[rows] bool, True for the first real_rows."""
    return torch.arange(rows, device=device) < real_rows
