"""Transport over NCCL: CUDA tensors."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from vllm_npu.transport.torch_dist import TorchDistTransport, all_gather_single


class NcclTransport(TorchDistTransport):
    """c10d's NCCL backend does uneven gathers, scatters and all-to-alls itself."""

    backend = "nccl"
    device_type = "cuda"

    def _gather_tokens(self, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        """Equal sizes: each tensor as it is, all in one launch. A packed message would be copied before and after."""
        if len(set(sizes)) > 1:
            return super()._gather_tokens(tensors, sizes)
        gathered = [tensor.new_empty((sum(sizes), tensor.shape[1])) for tensor in tensors]
        with self._collective("gather_tokens"):
            with dist._coalescing_manager(group=self.process_group, device=tensors[0].device):
                for whole, own in zip(gathered, tensors, strict=True):
                    all_gather_single(whole, own.contiguous(), group=self.process_group)
        return gathered
