"""vLLM's expert load balancing (EPLB) with our parts: communicators behind its interface, and what its router does on GPUs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.eplb.eplb_communicator import EplbCommunicator as VllmEplbCommunicator
from vllm.distributed.eplb.eplb_state import EplbLayerState
from vllm.platforms import current_platform

from vllm_npu.core.step_plan import TokenSharding
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.eplb import EplbCommunicator, open_communicator, pynccl
from vllm_npu.eplb.communicator import Tensors
from vllm_npu.eplb.gloo_staged import GlooStagedEplbCommunicator
from vllm_npu.eplb.pynccl import GroupedPointToPoint
from vllm_npu.eplb.replicas import own_load
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin import compat
from vllm_npu.transport.gloo import GlooTransport
from vllm_npu.transport.table import transport_class

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from vllm.config import VllmConfig

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

    def __init__(self, communicator: EplbCommunicator, stream: torch.Stream | None = None) -> None:
        self.communicator = communicator
        self.experts_received = 0
        self.set_stream(stream)

    @property
    def needs_profile_buffer_reservation(self) -> bool:
        """Whether a profiling run has to make the communication library allocate its buffers: NCCL's and HCCL's are large."""
        return current_platform.device_type != "cpu"

    def add_send(self, tensors: Tensors, dst_rank: int, expert_id: int | None = None) -> None:
        """Queue for a rank of the group."""
        self.communicator.add_send(tensors, dst_rank, expert_id)

    def add_recv(self, tensors: Tensors, src_rank: int, expert_id: int | None = None) -> None:
        """Queue for what a rank of the group sends."""
        self.communicator.add_recv(tensors, src_rank, expert_id)
        self.experts_received += 1

    def execute(self) -> None:
        """Move all that is queued."""
        self.communicator.execute()

    def set_stream(self, stream: torch.Stream | None) -> None:
        """Where execute() works."""
        self.communicator.set_stream(stream)


# The original design's names and constructors, for code that makes them itself; create_eplb_communicator does not.


class PyNcclEplbCommunicator(NPUEplbCommunicator):
    """ncclSend and ncclRecv in one group, through vLLM's PyNcclCommunicator."""

    def __init__(self, pynccl_comm: GroupedPointToPoint, cuda_stream: torch.Stream | None = None) -> None:
        super().__init__(pynccl.PyNcclEplbCommunicator(pynccl_comm), cuda_stream)


class TorchDistGlooStagedEplbCommunicator(NPUEplbCommunicator):
    """gloo, through CPU memory."""

    def __init__(self, cpu_group: "ProcessGroup", cuda_stream: torch.Stream | None = None) -> None:
        super().__init__(GlooStagedEplbCommunicator(GlooTransport(cpu_group, "eplb")), cuda_stream)


class TorchDistNcclEplbCommunicator(NPUEplbCommunicator):
    """isend and irecv in one batch, over the device's own backend: NCCL on GPUs, HCCL on NPUs, gloo on CPUs."""

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


def check_eplb(vllm_config: "VllmConfig") -> None:
    """Raise UnsupportedConfigError where EPLB is on and this platform cannot run it, before any process is started."""
    parallel_config, model_config = vllm_config.parallel_config, vllm_config.model_config
    if not parallel_config.enable_eplb or model_config is None:
        return
    if parallel_config.eplb_config.use_async:
        raise UnsupportedConfigError(
            "asynchronous EPLB moves experts on a stream of the device beside the model, and a CPU has none; add "
            '"use_async": false to --eplb-config'
        )
    if parallel_config.enable_elastic_ep:
        raise UnsupportedConfigError(
            "EPLB of an elastic engine is not supported on a CPU; leave out --enable-elastic-ep"
        )
    if model_config.runner_type == "pooling":
        raise UnsupportedConfigError(
            "EPLB takes its steps where tokens are sampled, and a pooling model samples none; leave out --enable-eplb"
        )
    if parallel_config.pipeline_parallel_size > 1:
        raise UnsupportedConfigError(
            "EPLB on a CPU takes its steps where tokens are sampled, the last pipeline stage; set --pipeline-parallel-size 1"
        )
    if vllm_config.use_v2_model_runner:
        raise UnsupportedConfigError("EPLB on a CPU needs vLLM's first model runner; set VLLM_USE_V2_MODEL_RUNNER=0")
    logical = model_config.get_num_experts()
    redundant = parallel_config.eplb_config.num_redundant_experts
    ranks = parallel_config.tensor_parallel_size * parallel_config.data_parallel_size
    if (logical + redundant) % ranks:
        fitting = redundant + -(logical + redundant) % ranks
        raise UnsupportedConfigError(
            f"{logical} experts and {redundant} redundant ones do not divide over {ranks} ranks; set "
            f'"num_redundant_experts": {fitting} in --eplb-config'
        )


def table_of(layer: EplbLayerState) -> torch.Tensor:  # [logical experts, 1 + most replicas] int32
    """vLLM's placement of a layer as npu_moe_update_expert takes it. LOCAL. Host sync: yes."""
    places, counts = layer.logical_to_physical_map, layer.logical_replica_count
    return torch.cat([counts[:, None], places[:, : int(counts.max())]], dim=1).to(torch.int32)


def count_load(
    layer: EplbLayerState,
    physical_ids: torch.Tensor,  # [rows, top_k]
    topology: ParallelTopology,
    sharding: TokenSharding,
) -> None:
    """Add the step's tokens to vLLM's load of each physical expert, in the steps in which vLLM records it. LOCAL. Host sync:
    yes."""
    if not bool(layer.should_record_tensor):
        return
    num_tokens = int(layer.num_unpadded_tokens_tensors[compat.current().micro_batch()])
    load = layer.expert_load_view
    load += own_load(physical_ids, load.shape[0], topology, sharding, num_tokens).to(load.dtype)
