"""Transport over NCCL: CUDA tensors."""

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

from vllm_npu import envs
from vllm_npu.transport.torch_dist import TorchDistTransport, all_gather_single


class NcclTransport(TorchDistTransport):
    """NCCL process groups of torch.distributed take uneven gathers, scatters and all-to-alls without help."""

    backend = "nccl"
    device_type = "cuda"

    @classmethod
    def device_of(cls, local_rank: int) -> torch.device:
        """The GPU of rank `local_rank` of this machine. Raises UnsupportedConfigError if torch sees too few GPUs.

        With VLLM_NPU_SHARE_GPUS several ranks get one GPU, and this process's variables say so to NCCL and torch: NCCL refuses
        two ranks of a host on one GPU, so it takes each rank for a host, and its messages go through sockets.
        """
        count = torch.cuda.device_count()
        if not count or not envs.SHARE_GPUS.read_flag():
            return super().device_of(local_rank)
        os.environ |= {
            "NCCL_HOSTID": f"vllm_npu_rank_{local_rank}",
            "NCCL_NET": "Socket",
            "NCCL_SOCKET_IFNAME": "lo",
            "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
        }
        return torch.device("cuda", local_rank % count)

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
