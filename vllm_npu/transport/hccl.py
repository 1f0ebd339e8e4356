"""Transport over HCCL: NPU tensors, through torch_npu's ProcessGroupHCCL."""

from collections.abc import Sequence
from typing import Any

import torch

from vllm_npu.device import npu_ops  # noqa: F401  # importing torch_npu is what makes c10d know hccl
from vllm_npu.errors import UnknownGroupError
from vllm_npu.transport.torch_dist import TorchDistTransport


class HcclTransport(TorchDistTransport):
    """HCCL's own collectives where all ranks bring the same number of rows, exchanges without padding where not.

    HCCL has AllGatherV and ReduceScatterV on some chips only, and torch_npu's calls of them refuse empty ranks or groups
    over several machines; its all-to-all and batched send/receive take any sizes everywhere (op-plugin's documents).
    """

    backend = "hccl"
    device_type = "npu"

    @property
    def name_for_ops(self) -> str:
        """HCCL's name of the communicator. Raises UnknownGroupError where HCCL has none."""
        try:
            backend: Any = self.process_group._get_backend(torch.device("npu"))
            name = str(backend.get_hccl_comm_name(self.rank))
        except (RuntimeError, AttributeError) as error:
            raise UnknownGroupError(self._unknown(str(error))) from error
        if not name:
            raise UnknownGroupError(self._unknown("its name is empty"))
        return name

    def _unknown(self, detail: str) -> str:
        return (
            f"HCCL does not know the group '{self.group}' of rank {self.rank}, over which mc2 has to communicate ({detail}); "
            "create the group with the hccl backend, or choose all2all or allgather"
        )

    def _all_gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        return super()._all_gather(x, sizes) if len(set(sizes)) == 1 else self._all_gather_from_peers(x, sizes)

    def _reduce_scatter(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        even = len(set(sizes)) == 1
        return super()._reduce_scatter(x, sizes) if even else self._reduce_scatter_by_exchange(x, sizes)
