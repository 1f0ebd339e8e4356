"""Every environment variable of this package: its default and its meaning. Read when asked, never at import."""

import os
from dataclasses import dataclass

from vllm_npu.errors import UnsupportedConfigError


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable; `default` is the text that an unset variable stands for."""

    name: str
    default: str
    meaning: str

    def read(self) -> str:
        """The variable's text, or its default where it is unset or empty."""
        return os.environ.get(self.name) or self.default

    def read_flag(self) -> bool:
        """The variable as a switch. Raises UnsupportedConfigError for anything but 0 and 1."""
        text = self.read()
        if text not in ("0", "1"):
            raise UnsupportedConfigError(f"{self.name}={text!r}: not a switch; set it to 0 or 1")
        return text == "1"

    def read_seconds(self) -> float:
        """The variable as a positive number of seconds. Raises UnsupportedConfigError for anything else."""
        text = self.read()
        try:
            seconds = float(text)
        except ValueError:
            seconds = -1.0
        if not 0 < seconds < float("inf"):
            raise UnsupportedConfigError(f"{self.name}={text!r}: not a positive number of seconds")
        return seconds


MOE_COMM = Variable(
    "VLLM_NPU_MOE_COMM",
    "auto",
    "Strategy where --additional-config does not name one: auto, mc2, all2all, allgather or naive.",
)
COUNT_COLLECTIVES = Variable(
    "VLLM_NPU_COUNT_COLLECTIVES",
    "0",
    "1 counts calls and bytes of every collective, for the worker call moe_comm_counters.",
)
TRANSPORT_TIMEOUT = Variable(
    "VLLM_NPU_TRANSPORT_TIMEOUT",
    "60",
    "Seconds after which a collective of a group that this package opens itself fails.",
)
VARIABLES = (MOE_COMM, COUNT_COLLECTIVES, TRANSPORT_TIMEOUT)
