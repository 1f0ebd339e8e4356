"""Transport over NCCL: CUDA tensors."""

import torch
import torch.distributed as dist

from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.transport.torch_dist import TorchDistTransport


class NcclTransport(TorchDistTransport):
    """c10d's NCCL backend does uneven gathers, scatters and all-to-alls itself; nothing is added here."""

    def __init__(self, process_group: dist.ProcessGroup, group: str) -> None:
        if not torch.cuda.is_available():
            raise UnsupportedConfigError("transport nccl needs a CUDA device and torch sees none; use gloo")
        super().__init__(process_group, group)
