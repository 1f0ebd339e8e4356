"""Transport over NCCL: CUDA tensors."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from vllm_npu.transport.torch_dist import TorchDistTransport, all_gather_single


class NcclTransport(TorchDistTransport):
    """NCCL process groups of torch.distributed take uneven gathers, scatters and all-to-alls without help."""

    backend = "nccl"
    device_type = "cuda"

    def _gather_tokens(self, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        """Gather tensors of equal sizes unpacked, in one launch. Packing would cost two more copies."""
        if len(set(sizes)) > 1:
            return super()._gather_tokens(tensors, sizes)
        gathered = [tensor.new_empty((sum(sizes), tensor.shape[1])) for tensor in tensors]
        with self._collective("gather_tokens"):
            with dist._coalescing_manager(group=self.process_group, device=tensors[0].device):
                for whole, own in zip(gathered, tensors, strict=True):
                    all_gather_single(whole, own.contiguous(), group=self.process_group)
        return gathered
