"""Transport over NCCL: CUDA tensors."""

from vllm_npu.transport.torch_dist import TorchDistTransport


class NcclTransport(TorchDistTransport):
    """c10d's NCCL backend does uneven gathers, scatters and all-to-alls itself; nothing is added here."""

    backend = "nccl"
    device_type = "cuda"
