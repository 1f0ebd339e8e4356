"""Transport over NCCL: CUDA tensors."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from vllm_npu.transport.torch_dist import TorchDistTransport, all_gather_single


class NcclTransport(TorchDistTransport):
    """NCCL process groups of torch.distributed take uneven gathers, scatters and all-to-alls without help."""

    backend = "nccl"
    device_type = "cuda"

    def abort(self) -> None:
        """End the group's kernels that wait on this rank's GPU, with undefined results. LOCAL. The group is of no use after.

        Without it they wait until NCCL's time-out, which ends the process. Safe to call in another thread than the waiting one.
        """
        self.process_group.abort()

    def _barrier(self) -> None:
        with self._collective("barrier"):  # without device_ids, torch guesses the device and warns
            dist.barrier(group=self.process_group, device_ids=[torch.cuda.current_device()])

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
