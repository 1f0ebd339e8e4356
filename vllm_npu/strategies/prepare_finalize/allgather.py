"""AllGather: every rank receives all tokens and computes the share of its own experts. A reduce-scatter adds the shares.

For layers without expert parallelism, and where a token goes to most ranks anyway (few ranks, or a large top-k).

                     attention ends with      prepare              finalize
    REPLICATED       all-reduce over tp       all-gather over dp   reduce-scatter over dp, all-reduce over tp
    SLICED_OVER_TP   reduce-scatter over tp   all-gather over ep   reduce-scatter over ep
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.core.token_layout import TokenSlice, pad_rows, share_messages
from vllm_npu.strategies.prepare_finalize.base import Finalized, PrepareAndFinalize, Prepared, PrepareHandle
from vllm_npu.strategies.sequence_parallel import reduce_scatter_and_pad
from vllm_npu.transport.base import Transport


@dataclass(frozen=True, slots=True, kw_only=True)
class AllGatherHandle(PrepareHandle):
    """Returned by AllGatherPrepareAndFinalize.prepare, consumed by its finalize."""

    transport: Transport  # the group that prepare gathered over: dp, or ep for a sliced input
    real_rows: tuple[int, ...]  # rows of each rank of this group, without padding
    input_rows: int  # rows of this rank's input, padding included


class AllGatherPrepareAndFinalize(PrepareAndFinalize):
    """Gather over dp, or over ep for a sliced input. Ranks may have different numbers of rows; padding does not travel."""

    gathers_tokens = True

    def prepare(self, hidden_states: torch.Tensor, per_token: tuple[torch.Tensor, ...], step: StepPlan) -> Prepared:
        """Gather the real rows of all ranks of the group.

        COLLECTIVE over dp (ep for a sliced input): one all-gather, or two for a large message. Bytes sent: (group size - 1) *
        own rows * row size. Host sync: no. Graph capture: yes, for the captured sizes.
        """
        self._check_prepare(hidden_states, per_token, step)
        if step.sharding is TokenSharding.SLICED_OVER_TP:
            transport, real_rows = self.groups.ep, tuple(step.sliced_tokens_across_ep(self.groups.topology.tp_size))
        else:
            transport, real_rows = self.groups.dp, step.num_tokens_across_dp
        own = TokenSlice(0, real_rows[transport.rank])
        gathered = self.gather_rows([own.take(x) for x in (hidden_states, *per_token)], real_rows, transport)
        return Prepared(
            hidden_states=gathered[0],
            per_token=tuple(gathered[1:]),
            mask=None,
            handle=AllGatherHandle(
                step=step,
                rows=sum(real_rows),
                transport=transport,
                real_rows=real_rows,
                input_rows=hidden_states.shape[0],
            ),
        )

    def finalize(self, routed_output: torch.Tensor, handle: PrepareHandle, *, reduce_results: bool = True) -> Finalized:
        """Add the shares of all ranks and keep this rank's rows.

        COLLECTIVE over dp (ep for a sliced input): one reduce-scatter. For replicated input and reduce_results, one
        all-reduce over tp follows. Host sync: no. Graph capture: yes, for the captured sizes.
        """
        handle = self._consume(handle, AllGatherHandle, routed_output)
        if handle.transport.size == 1:
            output = pad_rows(routed_output, handle.input_rows)
        else:
            output = reduce_scatter_and_pad(routed_output, handle.real_rows, handle.input_rows, handle.transport)
        missing_tp_sum = handle.step.is_replicated(self.groups.topology.tp_size)
        if missing_tp_sum and reduce_results:
            output = self.groups.tp.all_reduce(output)
        return Finalized(
            hidden_states=output, sharding=handle.step.sharding, reduced=reduce_results or not missing_tp_sum
        )

    def gather_rows(
        self,
        tensors: Sequence[torch.Tensor],  # each [real_rows[rank], width]
        real_rows: Sequence[int],  # rows of each rank of the group
        transport: Transport,
    ) -> list[torch.Tensor]:  # each [sum(real_rows), width]; may be views of one message
        """Gather the rows of all ranks, in rank order. COLLECTIVE over the transport's group, with the cost of prepare.

        In a group of one rank these are the tensors themselves.
        """
        if transport.size == 1:
            return list(tensors)
        gathered: list[torch.Tensor] = []
        for together in share_messages(tensors, max(real_rows)):
            gathered += self._gather(together, real_rows, transport)
        return gathered

    def _gather(
        self,
        tensors: Sequence[torch.Tensor],  # each [real_rows[rank], width]
        real_rows: Sequence[int],
        transport: Transport,
    ) -> list[torch.Tensor]:  # each [sum(real_rows), width]
        """Gather the tensors in one message."""
        return transport.gather_tokens(tensors, real_rows)
