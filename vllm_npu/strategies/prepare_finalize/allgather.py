"""AllGather: every rank sees all tokens and computes its own experts' share of each; a reduce-scatter adds the shares.

Chosen without expert parallelism, and where tokens go to most ranks anyway (few ranks, large top-k).

    REPLICATED:      Attn -> TP AR -> DP AG -> experts -> DP RS -> TP AR
    SLICED_OVER_TP:  TP AG -> Attn -> TP RS -> EP AG -> experts -> EP RS
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_npu.core.handles import check_handle
from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.core.token_layout import move_together
from vllm_npu.strategies.prepare_finalize.base import Finalized, PrepareAndFinalize, Prepared, PrepareHandle
from vllm_npu.strategies.sequence_parallel import reduce_scatter_and_pad
from vllm_npu.transport.base import Transport


@dataclass(frozen=True, slots=True, kw_only=True)
class AllGatherHandle(PrepareHandle):
    """Returned by AllGatherPrepareAndFinalize.prepare, consumed by its finalize."""

    transport: Transport  # the group that was gathered over: DP, or EP where the input was sliced over TP
    real_rows: tuple[int, ...]  # rows of each rank of that group
    input_rows: int  # rows of this rank's input, padding included


class AllGatherPrepareAndFinalize(PrepareAndFinalize):
    """Gather over DP (or over EP under sequence parallelism), uneven sizes, no padding on the wire."""

    gathers_tokens = True

    def prepare(self, hidden_states: torch.Tensor, per_token: tuple[torch.Tensor, ...], step: StepPlan) -> Prepared:
        """Gather the real rows of all ranks of the group.

        COLLECTIVE over dp (ep where sliced): one all-gather, two where the message is large. Bytes sent: (W-1) * own rows *
        row size. Host sync: no. Graph capture: yes, for the captured sizes.
        """
        self._check_prepare(hidden_states, per_token, step)
        transport, real_rows = self._group(step)
        gathered = self.gather_rows((hidden_states, *per_token), real_rows, transport)
        handle = AllGatherHandle(
            step=step,
            prepared_rows=sum(real_rows),
            transport=transport,
            real_rows=tuple(real_rows),
            input_rows=hidden_states.shape[0],
        )
        return Prepared(hidden_states=gathered[0], per_token=tuple(gathered[1:]), mask=None, handle=handle)

    def finalize(self, routed_output: torch.Tensor, handle: PrepareHandle, *, reduce_results: bool = True) -> Finalized:
        """Add the ranks' shares and keep this rank's rows.

        COLLECTIVE over dp (ep where sliced): one reduce-scatter; then, where the input was replicated over TP and
        reduce_results, one all-reduce over tp. Host sync: no. Graph capture: yes, for the captured sizes.
        """
        handle = check_handle(handle, AllGatherHandle, "AllGatherPrepareAndFinalize.finalize")
        self._check_finalize(routed_output, handle)
        output = reduce_scatter_and_pad(routed_output, handle.real_rows, handle.input_rows, handle.transport)
        missing_tp_sum = handle.step.sharding is TokenSharding.REPLICATED and self.groups.topology.tp_size > 1
        if missing_tp_sum and reduce_results:
            output = self.groups.tp.all_reduce(output)
        return Finalized(
            hidden_states=output, sharding=handle.step.sharding, reduced=reduce_results or not missing_tp_sum
        )

    def gather_rows(
        self,
        tensors: Sequence[torch.Tensor],  # each [rows, width]; rows past rows_of_ranks[rank] stay here
        rows_of_ranks: Sequence[int],  # rows that each rank of the group brings
        transport: Transport,
    ) -> list[torch.Tensor]:  # each [sum(rows_of_ranks), width]; may be views of one message
        """Gather the tensors of all ranks, in rank order. COLLECTIVE over the transport's group: see prepare."""
        return move_together(
            tensors, max(rows_of_ranks), lambda message: self._gather(message, rows_of_ranks, transport)
        )

    def _group(self, step: StepPlan) -> tuple[Transport, list[int]]:
        if step.sharding is TokenSharding.SLICED_OVER_TP:
            return self.groups.ep, step.sliced_tokens_across_ep(self.groups.topology.tp_size)
        return self.groups.dp, list(step.num_tokens_across_dp)

    def _gather(
        self, tensors: Sequence[torch.Tensor], real_rows: Sequence[int], transport: Transport
    ) -> list[torch.Tensor]:
        own_rows = real_rows[transport.rank]
        own = tensors if tensors[0].shape[0] == own_rows else [tensor[:own_rows] for tensor in tensors]
        return transport.gather_tokens(own, real_rows)
