"""vLLM's device communicator on CPUs, with three methods that vLLM's all2all managers call and vLLM's own class lacks."""

from collections.abc import Sequence
from functools import cached_property

import torch
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

from vllm_npu.errors import InvalidInputError
from vllm_npu.transport.gloo import GlooTransport


class CpuMoECommunicator(CpuCommunicator):
    """Adds all_gatherv, reduce_scatter and reduce_scatterv. COLLECTIVE over the group: one collective for each tensor."""

    def all_gatherv(
        self,
        input_: torch.Tensor | list[torch.Tensor],  # [sizes[rank], ...]
        dim: int = 0,
        sizes: list[int] | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """The rows of all ranks. For a list of tensors: a list with the rows of each tensor."""
        _check_dim(dim, "all_gatherv")
        if isinstance(input_, list):
            return [self._transport.all_gather(tensor, sizes) for tensor in input_]
        return self._transport.all_gather(input_, sizes)

    def reduce_scatter(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """This rank's part of the sum over ranks. All ranks get equal parts along `dim`."""
        rows_first = input_.movedim(dim, 0)
        return self._transport.reduce_scatter(rows_first).movedim(0, dim).contiguous()

    def reduce_scatterv(self, input_: torch.Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> torch.Tensor:
        """This rank's sizes[rank] rows of the sum over ranks. `sizes` None: equal parts."""
        _check_dim(dim, "reduce_scatterv")
        return self._transport.reduce_scatter(input_, sizes)

    @cached_property
    def _transport(self) -> GlooTransport:
        return GlooTransport(self.device_group, self.unique_name)


def _check_dim(dim: int, operation: str) -> None:
    if dim != 0:
        raise InvalidInputError(f"{operation} along dimension {dim} is not supported; move that dimension to the front")
