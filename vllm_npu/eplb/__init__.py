"""Moving experts between ranks. COMMUNICATORS lists the communicators, CHOICE the default of each device."""

import logging
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from vllm_npu.eplb.communicator import EplbCommunicator
from vllm_npu.errors import UnsupportedConfigError

logger = logging.getLogger("vllm.npu.eplb")


@dataclass(frozen=True, slots=True)
class CommunicatorRow:
    """One communicator."""

    target: str  # "module:class"
    argument: str  # the argument of open_communicator that its constructor takes
    device_types: frozenset[str]  # devices whose tensors it moves


COMMUNICATORS = {
    "torch_dist": CommunicatorRow(
        "vllm_npu.eplb.torch_dist:TorchDistEplbCommunicator", "device_group", frozenset({"cpu", "cuda", "npu"})
    ),
    "gloo_staged": CommunicatorRow(
        "vllm_npu.eplb.gloo_staged:GlooStagedEplbCommunicator", "cpu_group", frozenset({"cpu", "cuda", "npu"})
    ),
    "pynccl": CommunicatorRow("vllm_npu.eplb.pynccl:PyNcclEplbCommunicator", "pynccl", frozenset({"cuda"})),
    "hccl": CommunicatorRow("vllm_npu.eplb.hccl:HcclEplbCommunicator", "device_group", frozenset({"npu"})),
    "pyhccl": CommunicatorRow("vllm_npu.eplb.hccl:HcclEplbCommunicator", "pyhccl", frozenset({"npu"})),
}

# Communicators by device of the weights, with the reason for each. The first one whose group exists is taken.
CHOICE = {
    "cpu": {"torch_dist": "weights in CPU memory go over gloo as they are"},
    "cuda": {
        "gloo_staged": "NCCL on a stream of its own can deadlock with the model's collectives",
        "torch_dist": "there is no group for CPU tensors to stage through",
        "pynccl": "an elastic group has no torch.distributed",
    },
    "npu": {
        "hccl": "batches of bounded pieces between devices",
        "pyhccl": "the group has no torch.distributed",
        "gloo_staged": "the group has no HCCL",
    },
}


def open_communicator(device_type: str, name: str | None = None, **groups: Any) -> EplbCommunicator:
    """Make the communicator for weights on a type of device, by name or by CHOICE, and log the reason. LOCAL.

    Groups: device_group, cpu_group and pyhccl are Transports, and pynccl is a GroupedPointToPoint. None stands for a group that
    does not exist. Raises UnsupportedConfigError for an unknown name, for a device that the communicator does not serve, and
    where the communicator's group does not exist.
    """
    present = {argument for argument, group in groups.items() if group is not None}
    reason = "it was asked for"
    if name is None:
        choices = CHOICE.get(device_type, {})
        name = next((each for each in choices if COMMUNICATORS[each].argument in present), None)
        if name is None:
            needed = sorted({COMMUNICATORS[each].argument for each in choices})
            raise UnsupportedConfigError(
                f"no EPLB communicator moves weights on {device_type} with {', '.join(sorted(present)) or 'no group'}; "
                + (f"give one of {', '.join(needed)}" if needed else f"supported: {', '.join(CHOICE)}")
            )
        reason = choices[name]
    if name not in COMMUNICATORS:
        raise UnsupportedConfigError(f"unknown EPLB communicator {name!r}; there are: {', '.join(COMMUNICATORS)}")
    row = COMMUNICATORS[name]
    if device_type not in row.device_types:
        raise UnsupportedConfigError(
            f"EPLB communicator {name} moves weights on {', '.join(sorted(row.device_types))}, not on {device_type}; leave the "
            "choice to the device"
        )
    if row.argument not in present:
        raise UnsupportedConfigError(f"EPLB communicator {name} needs {row.argument}, which does not exist")
    module, _, attribute = row.target.partition(":")
    made: EplbCommunicator = getattr(import_module(module), attribute)(groups[row.argument])
    logger.info("EPLB communicator of rank %d of %d: %s (%s)", made.rank, made.size, name, reason)
    return made


__all__ = ["CHOICE", "COMMUNICATORS", "EplbCommunicator", "open_communicator"]
