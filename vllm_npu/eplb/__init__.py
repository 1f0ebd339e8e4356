"""Moving experts between ranks. COMMUNICATORS names every way, CHOICE the one that a device takes unless told otherwise."""

import logging
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from vllm_npu.eplb.communicator import EplbCommunicator
from vllm_npu.errors import UnsupportedConfigError

logger = logging.getLogger("vllm.npu.eplb")


@dataclass(frozen=True, slots=True)
class Row:
    """A communicator: where it is, which of open_communicator's arguments it is made of, and whose tensors it moves."""

    target: str
    argument: str
    device_types: frozenset[str]


COMMUNICATORS = {
    "torch_dist": Row(
        "vllm_npu.eplb.torch_dist:TorchDistEplbCommunicator", "device_group", frozenset({"cpu", "cuda", "npu"})
    ),
    "gloo_staged": Row(
        "vllm_npu.eplb.gloo_staged:GlooStagedEplbCommunicator", "cpu_group", frozenset({"cpu", "cuda", "npu"})
    ),
    "pynccl": Row("vllm_npu.eplb.pynccl:PyNcclEplbCommunicator", "pynccl", frozenset({"cuda"})),
    "hccl": Row("vllm_npu.eplb.hccl:HcclEplbCommunicator", "device_group", frozenset({"npu"})),
    "pyhccl": Row("vllm_npu.eplb.hccl:HcclEplbCommunicator", "pyhccl", frozenset({"npu"})),
}

# By device of the weights: the communicators that may be chosen, the first whose group is there is taken, and why.
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
    """The communicator for weights on a type of device, by name or by CHOICE; the reason is logged. LOCAL.

    Groups: device_group, cpu_group and pyhccl are Transports, pynccl is a GroupedPointToPoint; None stands for one that is
    not there. Raises UnsupportedConfigError for an unknown name, another device, or a group that is needed and not there.
    """
    there = {argument for argument, group in groups.items() if group is not None}
    reason = "it was asked for"
    if name is None:
        choices = CHOICE.get(device_type, {})
        name = next((each for each in choices if COMMUNICATORS[each].argument in there), None)
        if name is None:
            needed = sorted({COMMUNICATORS[each].argument for each in choices})
            raise UnsupportedConfigError(
                f"no EPLB communicator moves weights on {device_type} with {', '.join(sorted(there)) or 'no group'}; "
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
    if row.argument not in there:
        raise UnsupportedConfigError(f"EPLB communicator {name} needs {row.argument}, which is not there")
    module, _, attribute = row.target.partition(":")
    made: EplbCommunicator = getattr(import_module(module), attribute)(groups[row.argument])
    logger.info("EPLB communicator of rank %d of %d: %s (%s)", made.rank, made.size, name, reason)
    return made


__all__ = ["CHOICE", "COMMUNICATORS", "EplbCommunicator", "open_communicator"]
