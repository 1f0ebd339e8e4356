"""Times of the move of experts: every communicator of the ranks' device moves the same experts in turn."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from vllm_npu.eplb import COMMUNICATORS, open_communicator
from vllm_npu.errors import TransportError, UnsupportedConfigError
from vllm_npu.tools.launch import Rank
from vllm_npu.transport.base import Transport
from vllm_npu.transport.gloo import GlooTransport
from vllm_npu.transport.torch_dist import TorchDistTransport

HIDDEN_SIZE, INTERMEDIATE_SIZE = 7168, 2048  # of DeepSeek-V3's routed experts; source: its config.json
WARM_UP_ROUNDS = 1


class Mover(Protocol):
    """A communicator that can be measured: an EplbCommunicator of this package or of vLLM."""

    def add_send(self, tensors: Sequence[torch.Tensor], dst_rank: int, expert_id: int) -> None: ...
    def add_recv(self, tensors: Sequence[torch.Tensor], src_rank: int, expert_id: int) -> None: ...
    def execute(self) -> None: ...


Peers = Callable[[torch.device, Mapping[str, Transport]], Mapping[str, Mover]]
"""Makes further communicators by name, on a device and the groups of open_communicator. Every rank calls it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EplbWorkload:
    """Each rank sends `experts` experts to the next rank: gate and up projection, and down projection.

    `scale` divides the sizes.
    """

    experts: int
    scale: int
    dtype: torch.dtype
    rounds: int

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of the two weights of an expert."""
        hidden, intermediate = HIDDEN_SIZE // self.scale, INTERMEDIATE_SIZE // self.scale
        return (2 * intermediate, hidden), (hidden, intermediate)

    @property
    def bytes_per_rank(self) -> int:
        """Bytes that each rank receives in a round."""
        return self.experts * self.dtype.itemsize * sum(rows * columns for rows, columns in self.shapes)


@dataclass(frozen=True, slots=True, kw_only=True)
class EplbResult:
    """One communicator. Times are in milliseconds. The slowest rank gives the time of a round."""

    name: str
    ms_median: float
    ms_min: float
    ms_max: float
    gb_per_second: float  # that a rank receives, at the median time


def measure_eplb(rank: Rank, workload: EplbWorkload, peers: Peers | None = None) -> list[EplbResult]:
    """Measure every communicator and check the received weights.

    COLLECTIVE over all ranks, which all return the same results.
    """
    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    following, before = (ep.rank + 1) % ep.size, (ep.rank - 1) % ep.size
    sent, received = (
        [[torch.full(shape, value, dtype=workload.dtype, device=rank.device) for shape in workload.shapes]
         for _ in range(workload.experts)]
        for value in (ep.rank + 1.0, 0.0)
    )  # fmt: skip

    def run(communicator: Mover) -> float:
        for expert, tensors in enumerate(sent):
            communicator.add_send(tensors, following, expert)
        for expert, tensors in enumerate(received):
            communicator.add_recv(tensors, before, expert)
        _wait(rank.device)
        ep.barrier()
        began = time.perf_counter()
        communicator.execute()
        _wait(rank.device)
        return time.perf_counter() - began

    communicators = _communicators(rank, peers)
    seconds: dict[str, list[float]] = {name: [] for name in communicators}
    for turn in range(WARM_UP_ROUNDS + workload.rounds):
        for name, communicator in communicators.items():
            own = run(communicator)
            if turn >= WARM_UP_ROUNDS:
                seconds[name].append(own)
            for tensor in (each for tensors in received for each in tensors):
                if not bool((tensor == before + 1).all()):
                    raise TransportError("execute", ep.group, ep.rank, f"{name} delivered other weights than were sent")
                tensor.zero_()
    times = torch.tensor(list(seconds.values()), dtype=torch.float32, device=rank.device)
    slowest = 1e3 * ep.all_gather(times[None]).amax(0).cpu()  # [communicators, rounds]
    return [
        EplbResult(
            name=name,
            ms_median=float(each.median()),
            ms_min=float(each.min()),
            ms_max=float(each.max()),
            gb_per_second=workload.bytes_per_rank / float(each.median()) / 1e6,
        )
        for name, each in zip(communicators, slowest, strict=True)
    ]


def _communicators(rank: Rank, peers: Peers | None) -> dict[str, Mover]:
    """The communicators of the ranks' device, and those of `peers`.

    pynccl needs an object of vLLM, so only `peers` can open it.
    """
    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    if not isinstance(ep, TorchDistTransport):
        raise UnsupportedConfigError("EPLB is measured between processes; choose the transport gloo, hccl or nccl")
    device_type = rank.device.type
    groups: dict[str, Transport] = {
        "device_group": ep,
        "cpu_group": ep if device_type == "cpu" else GlooTransport(dist.new_group(backend="gloo"), "ep"),
    }
    if device_type == "npu":
        from vllm_npu.transport.hccl_direct.communicator import PyHcclTransport

        groups["pyhccl"] = PyHcclTransport(ep.process_group, "ep")
    ours: dict[str, Mover] = {
        name: open_communicator(device_type, name, **groups)
        for name, row in COMMUNICATORS.items()
        if device_type in row.device_types and row.argument in groups
    }
    return ours | dict(peers(rank.device, groups) if peers is not None else {})


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
