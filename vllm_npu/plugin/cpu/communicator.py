"""vLLM's device communicator on CPUs, with three methods that vLLM's all2all managers call and vLLM's own class lacks."""

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

from vllm_npu.errors import InvalidInputError
from vllm_npu.transport.gloo import GlooTransport

if TYPE_CHECKING:
    import torch.distributed as dist

NAME_OF_JOB = "VLLM_DIST_IDENT"  # vLLM's worker sets it to what follows the last colon of the init method
NO_NAME = "//"  # from "env://", the init method of vLLM's external launcher


class CpuMoECommunicator(CpuCommunicator):
    """Adds all_gatherv, reduce_scatter and reduce_scatterv. COLLECTIVE over the group: one collective for each tensor."""

    def __init__(self, cpu_group: "dist.ProcessGroup", *args: Any, **kwargs: Any) -> None:
        """As vLLM's. COLLECTIVE over the group."""
        with _name_of_its_own(cpu_group):
            super().__init__(cpu_group, *args, **kwargs)

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


@contextmanager
def _name_of_its_own(cpu_group: "dist.ProcessGroup") -> Iterator[None]:
    """Give the group's shared memory a name that no other job has. COLLECTIVE if the job was started by an external launcher.

    vLLM 0.32 puts NAME_OF_JOB into the file's name. Two jobs of external launchers would have the same file, and a job that was
    killed would leave a file that stops each later job: "create shm in SHMManager failed. errno: 17".
    """
    if os.environ.get(NAME_OF_JOB) != NO_NAME:
        yield
        return
    number = GlooTransport(cpu_group, "names").broadcast(torch.tensor([secrets.randbits(63)]), 0)
    os.environ[NAME_OF_JOB] = f"{number.item():x}"
    try:
        yield
    finally:
        os.environ[NAME_OF_JOB] = NO_NAME


def _check_dim(dim: int, operation: str) -> None:
    if dim != 0:
        raise InvalidInputError(f"{operation} along dimension {dim} is not supported; move that dimension to the front")
