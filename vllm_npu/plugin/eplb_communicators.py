"""Our EPLB communicators behind vLLM's interface. They move experts between ranks when vLLM balances the load (EPLB)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.eplb.eplb_communicator import EplbCommunicator as VllmEplbCommunicator
from vllm.platforms import current_platform

from vllm_npu.eplb import EplbCommunicator, open_communicator, pynccl
from vllm_npu.eplb.communicator import Tensors
from vllm_npu.eplb.gloo_staged import GlooStagedEplbCommunicator
from vllm_npu.eplb.pynccl import GroupedPointToPoint
from vllm_npu.errors import UnsupportedConfigError, VllmNpuError
from vllm_npu.transport.base import Transport
from vllm_npu.transport.gloo import GlooTransport
from vllm_npu.transport.table import transport_class
from vllm_npu.trust.agreement import prepare_on_all

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# vLLM's name of a communicator -> device of the weights -> our name. Our name None: eplb.open_communicator chooses.
NAMES: dict[str | None, dict[str, str | None]] = {
    None: {"cpu": None, "cuda": None, "npu": None},
    "torch_gloo": {"cpu": "torch_dist", "cuda": "gloo_staged", "npu": "gloo_staged"},
    "torch_nccl": {"cpu": "torch_dist", "cuda": "torch_dist", "npu": "hccl"},
    "pynccl": {"cuda": "pynccl"},
}
NOT_READY = "some ranks cannot move the experts of this layer, and none was moved; free memory on them, and start again"
DEVICE_TRANSPORTS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}


class AdaptedEplbCommunicator(VllmEplbCommunicator):
    """Offers one of our communicators through vLLM's interface.

    vLLM 0.23 and 0.32 queue all tensors of an expert together, with the expert's id. The original design queues one tensor at
    a time, without an id. Both work.
    """

    def __init__(
        self,
        communicator: EplbCommunicator,
        stream: torch.Stream | None = None,
        voters: Transport | None = None,  # over CPU tensors, of the same ranks; None: ranks do not vote
    ) -> None:
        self.communicator = communicator
        self._voters = voters
        self.experts_received = 0
        self.set_stream(stream)

    @property
    def needs_profile_buffer_reservation(self) -> bool:
        """Whether a profiling run must make the communication library allocate its buffers: NCCL's and HCCL's are large."""
        return current_platform.device_type != "cpu"

    def add_send(self, tensors: Tensors, dst_rank: int, expert_id: int | None = None) -> None:
        """Queue tensors for a rank of the group. LOCAL."""
        self.communicator.add_send(tensors, dst_rank, expert_id)

    def add_recv(self, tensors: Tensors, src_rank: int, expert_id: int | None = None) -> None:
        """Queue tensors that a rank of the group sends. LOCAL."""
        self.communicator.add_recv(tensors, src_rank, expert_id)
        self.experts_received += 1

    def execute(self) -> None:
        """Move everything that is queued. COLLECTIVE over the group, as in vLLM, where every rank calls it for every layer.

        Every rank first allocates what it needs, and all agree that all are ready. If one is not, no rank moves anything, and
        every rank raises PlanDisagreementError, which names it. The engine cannot go on: vLLM may have moved earlier layers.
        Without voters, COLLECTIVE among the ranks that queued something, and only the rank's own error names it.
        """
        if self._voters is not None:
            try:
                prepare_on_all(self._prepare, self._voters, NOT_READY)
            except VllmNpuError:
                self.communicator.clear()
                raise
        self.communicator.execute()

    def _prepare(self) -> str:
        self.communicator.prepare()
        return "ready"

    def set_stream(self, stream: torch.Stream | None) -> None:
        """Set the stream on which execute() works. None: the current stream."""
        self.communicator.set_stream(stream)


# The names and constructors of the original design, for code that calls them. create_eplb_communicator does not use them.


class PyNcclEplbCommunicator(AdaptedEplbCommunicator):
    """Moves experts by ncclSend and ncclRecv in one group, through vLLM's PyNcclCommunicator."""

    def __init__(self, pynccl_comm: GroupedPointToPoint, cuda_stream: torch.Stream | None = None) -> None:
        super().__init__(pynccl.PyNcclEplbCommunicator(pynccl_comm), cuda_stream)


class TorchDistGlooStagedEplbCommunicator(AdaptedEplbCommunicator):
    """Moves experts by gloo, through CPU memory."""

    def __init__(self, cpu_group: "ProcessGroup", cuda_stream: torch.Stream | None = None) -> None:
        transport = GlooTransport(cpu_group, "eplb")
        super().__init__(GlooStagedEplbCommunicator(transport), cuda_stream, transport)


class TorchDistNcclEplbCommunicator(AdaptedEplbCommunicator):
    """Moves experts by one batch of isend and irecv over NCCL on GPUs, HCCL on NPUs, gloo on CPUs."""

    def __init__(self, ep_group: "ProcessGroup", cuda_stream: torch.Stream | None = None) -> None:
        device_type = current_platform.device_type
        transport = transport_class(DEVICE_TRANSPORTS[device_type])(ep_group, "eplb")  # type: ignore[call-arg, arg-type]
        name = NAMES["torch_nccl"][device_type]
        super().__init__(open_communicator(device_type, name, device_group=transport), cuda_stream)


def create_eplb_communicator(
    group_coordinator: Any,  # vLLM's GroupCoordinator
    backend: str | None,
    expert_weights: Sequence[Sequence[torch.Tensor]],
    expert_buffer: Sequence[torch.Tensor],
) -> AdaptedEplbCommunicator:
    """Replaces vLLM's function of this name, and takes its arguments. LOCAL.

    Raises UnsupportedConfigError for a name of vLLM's that vllm_npu has no communicator for, and as open_communicator does.
    """
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
    cpu_group = GlooTransport(group_coordinator.cpu_group, group_coordinator.unique_name)
    communicator = open_communicator(
        device_type,
        NAMES[backend][device_type],
        device_group=transport(device_group, group_coordinator.unique_name),  # type: ignore[call-arg]
        cpu_group=cpu_group,
        pynccl=getattr(group_coordinator.device_communicator, "pynccl_comm", None),
    )
    return AdaptedEplbCommunicator(communicator, voters=cpu_group)
