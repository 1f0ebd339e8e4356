"""vLLM's expert load balancing over our communicators: its interface in front of them, and its factory."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.distributed.eplb.eplb_communicator import EplbCommunicator as VllmEplbCommunicator

from vllm_npu.eplb import EplbCommunicator, open_communicator
from vllm_npu.eplb.communicator import Tensors
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.transport import transport_class
from vllm_npu.transport.gloo import GlooTransport

# vLLM's names of communicators, by device of the weights. None: the device chooses.
NAMES: dict[str | None, dict[str, str | None]] = {
    None: {"cpu": None, "cuda": None, "npu": None},
    "torch_gloo": {"cpu": "torch_dist", "cuda": "gloo_staged", "npu": "gloo_staged"},
    "torch_nccl": {"cpu": "torch_dist", "cuda": "torch_dist", "npu": "hccl"},
    "pynccl": {"cuda": "pynccl"},
}
DEVICE_TRANSPORTS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}


class NPUEplbCommunicator(VllmEplbCommunicator):
    """One of ours as one of vLLM's. An expert's tensors come together with its id, as vLLM 0.23 and 0.32 queue them, or one
    by one without, as the original design does."""

    def __init__(self, communicator: EplbCommunicator) -> None:
        self.communicator = communicator

    def add_send(self, tensors: Tensors, dst_rank: int, expert_id: int | None = None) -> None:
        """Queue for a rank of the group."""
        self.communicator.add_send(tensors, dst_rank, expert_id)

    def add_recv(self, tensors: Tensors, src_rank: int, expert_id: int | None = None) -> None:
        """Queue for what a rank of the group sends."""
        self.communicator.add_recv(tensors, src_rank, expert_id)

    def execute(self) -> None:
        """Move all that is queued."""
        self.communicator.execute()

    def set_stream(self, stream: torch.Stream | None) -> None:
        """Where execute() works."""
        self.communicator.set_stream(stream)


def create_eplb_communicator(
    group_coordinator: Any,  # vLLM's GroupCoordinator
    backend: str | None,
    expert_weights: Sequence[Sequence[torch.Tensor]],
    expert_buffer: Sequence[torch.Tensor],
) -> NPUEplbCommunicator:
    """In place of vLLM's function of this name, with its arguments. LOCAL. Raises UnsupportedConfigError as open_communicator
    does, and for names of vLLM's that have no counterpart here."""
    weights = [tensor for layer in expert_weights for tensor in layer]
    device_type = weights[0].device.type if weights else "cpu"
    if backend not in NAMES or device_type not in NAMES[backend]:
        there = ", ".join(str(name) for name, devices in NAMES.items() if device_type in devices and name is not None)
        raise UnsupportedConfigError(
            f"vllm_npu has no EPLB communicator {backend!r} for weights on {device_type}; set --eplb-config.communicator to "
            f"one of: {there}"
        )
    transport = transport_class(DEVICE_TRANSPORTS[device_type])
    device_group = group_coordinator.cpu_group if device_type == "cpu" else group_coordinator.device_group
    made = open_communicator(
        device_type,
        NAMES[backend][device_type],
        device_group=transport(device_group, group_coordinator.unique_name),  # type: ignore[call-arg]
        cpu_group=GlooTransport(group_coordinator.cpu_group, group_coordinator.unique_name),
        pynccl=getattr(group_coordinator.device_communicator, "pynccl_comm", None),
    )
    return NPUEplbCommunicator(made)
