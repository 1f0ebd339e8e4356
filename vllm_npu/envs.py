"""Every environment variable of this package, with its default and its meaning. The import of this module reads none."""

import os
from dataclasses import dataclass
from enum import Enum

from vllm_npu.errors import UnsupportedConfigError


class Kind(Enum):
    """What a variable holds."""

    TEXT = "text"
    SWITCH = "0 or 1"
    SWITCH_OR_UNSET = "0, 1 or unset"
    WHOLE_NUMBER = "whole number, 0 or more"
    SECONDS = "positive number of seconds"


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable. An unset or empty variable means `default`."""

    name: str
    default: str
    meaning: str
    kind: Kind = Kind.TEXT

    def read(self) -> str:
        """The variable's text, or its default if it is unset or empty."""
        return self.read_if_set() or self.default

    def read_if_set(self) -> str | None:
        """The variable's text, or None if it is unset or empty."""
        return os.environ.get(self.name) or None

    def value(self) -> str | bool | int | float:
        """The variable as its kind. Raises UnsupportedConfigError for a text that is not of this kind."""
        match self.kind:
            case Kind.TEXT:
                return self.read()
            case Kind.SWITCH:
                return self.read_flag()
            case Kind.SWITCH_OR_UNSET:
                return str(int(self.read_flag())) if self.read_if_set() else ""
            case Kind.WHOLE_NUMBER:
                return self.read_whole_number()
            case Kind.SECONDS:
                return self.read_seconds()

    def read_flag(self) -> bool:
        """The variable as a switch, 0 or 1. Raises UnsupportedConfigError for other texts."""
        text = self.read()
        if text not in ("0", "1"):
            raise UnsupportedConfigError(f"{self.name}={text!r}: not a switch; set it to 0 or 1")
        return text == "1"

    def read_whole_number(self) -> int:
        """The variable as a whole number, 0 or more. Raises UnsupportedConfigError for other texts."""
        text = self.read()
        if not (text.isascii() and text.isdecimal()):
            raise UnsupportedConfigError(
                f"{self.name}={text!r}: not a whole number; set it to one, such as {self.default}"
            )
        return int(text)

    def read_seconds(self) -> float:
        """The variable as a positive number of seconds. Raises UnsupportedConfigError for other texts."""
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
    "Strategy, if --additional-config names none: auto, mc2, all2all, allgather or naive; with vllm-ascend also "
    "fused_mc2, off, compare and compare:STRATEGY.",
)
CUDA_PLATFORM = Variable(
    "VLLM_NPU_CUDA_PLATFORM",
    "0",
    "1: this package is vLLM's platform on GPUs and offers its all2all managers; 0: vLLM's own platform runs there.",
    Kind.SWITCH,
)
COUNT_COLLECTIVES = Variable(
    "VLLM_NPU_COUNT_COLLECTIVES",
    "0",
    "1: count the calls and bytes of every collective; the worker call moe_comm_counters returns them.",
    Kind.SWITCH,
)
METRICS = Variable(
    "VLLM_NPU_METRICS",
    "0",
    "1: count the steps, tokens, bytes, fallbacks and failed votes of each rank for vLLM's /metrics.",
    Kind.SWITCH,
)
RECORD = Variable(
    "VLLM_NPU_RECORD",
    "",
    "Folder where each rank writes a trace of its last collectives, for `vllm-npu doctor --trace`; empty: no trace.",
)
TRANSPORT_TIMEOUT = Variable(
    "VLLM_NPU_TRANSPORT_TIMEOUT",
    "60",
    "Seconds after which a collective fails, in groups that this package opens itself.",
    Kind.SECONDS,
)
COLLECTIVE_DEADLINE = Variable(
    "VLLM_NPU_COLLECTIVE_DEADLINE",
    "600",
    "Seconds after which a gloo collective or a kernel of symmetric fails and names the late ranks. A gloo group with a "
    "shorter time-out keeps it; HCCL obeys HCCL_EXEC_TIMEOUT.",
    Kind.SECONDS,
)
SHARED_WINDOW = Variable(
    "VLLM_NPU_SHARED_WINDOW",
    "1",
    "1: large gloo messages between ranks of one host go through shared memory; 0 on one rank: all messages of "
    "its group go through sockets.",
    Kind.SWITCH,
)
SHARE_GPUS = Variable(
    "VLLM_NPU_SHARE_GPUS",
    "0",
    "1: ranks of `vllm-npu verify`, `vllm-npu bench` and tests/cuda share the GPUs of a machine that has fewer. They take "
    "turns, so times mean nothing; vLLM's ranks take no notice.",
    Kind.SWITCH,
)
HCCL_OPS = Variable(
    "VLLM_NPU_HCCL_OPS",
    "1",
    "1: C++ operators that call HCCL move tokens, if they are built; 0: torch.distributed moves tokens.",
    Kind.SWITCH,
)
HCCL_BUFFSIZE = Variable(
    "HCCL_BUFFSIZE", "200", "HCCL's own variable: MiB of the buffer that MC2's ops use.", Kind.WHOLE_NUMBER
)
HCCL_INTRA_PCIE_ENABLE = Variable(
    "HCCL_INTRA_PCIE_ENABLE",
    "",
    "HCCL's own variable: 1, beside HCCL_INTRA_ROCE_ENABLE=0, makes MC2's ops on A2 take their hierarchy.",
    Kind.SWITCH_OR_UNSET,
)
HCCL_INTRA_ROCE_ENABLE = Variable(
    "HCCL_INTRA_ROCE_ENABLE",
    "",
    "HCCL's own variable: 0 has an effect beside HCCL_INTRA_PCIE_ENABLE=1 only.",
    Kind.SWITCH_OR_UNSET,
)
EMULATOR = Variable(
    "VLLM_NPU_EMULATOR", "0", "1: torch_npu finds the emulated Ascend device in every Python process.", Kind.SWITCH
)
EMULATOR_SOC = Variable("VLLM_NPU_EMULATOR_SOC", "A2", "Chip, or family of chips, that is emulated.")
EMULATOR_LIBRARIES = Variable(
    "VLLM_NPU_EMULATOR_LIBRARIES", "", "Folder of built libraries, which is used unchanged; empty: build them."
)
EMULATOR_RUN = Variable(
    "VLLM_NPU_EMULATOR_RUN", "", "Set by the launcher: a part of the names of a run's shared memory."
)
EMULATOR_TRACE = Variable(
    "VLLM_NPU_EMULATOR_TRACE", "0", "1: list the calls of ACL, HCCL and aclnn on standard error.", Kind.SWITCH
)
EMULATOR_ASYNC = Variable(
    "VLLM_NPU_EMULATOR_ASYNC",
    "",
    "Seed of random delays of streams, which then run on threads; empty: synchronous streams.",
)
EMULATOR_DEVICES = Variable("VLLM_NPU_EMULATOR_DEVICES", "16", "Number of emulated devices on this machine.")
EMULATOR_MEMORY_GB = Variable(
    "VLLM_NPU_EMULATOR_MEMORY_GB", "0", "GB of memory of one device; 0: as much as the chip has."
)
EMULATOR_LIMITS = Variable(
    "VLLM_NPU_EMULATOR_LIMITS", "device", "device: refuse sizes that the chip's ops refuse; none: accept any size."
)
EMULATOR_UNDEFINED = Variable(
    "VLLM_NPU_EMULATOR_UNDEFINED",
    "nan",
    "Content of memory that an op does not write: nan (for integers, the least value), or zero.",
)
EMULATOR_CANN = Variable("VLLM_NPU_EMULATOR_CANN", "8.5.0", "Version that the emulated CANN reports.")
EMULATOR_LOG = Variable(
    "VLLM_NPU_EMULATOR_LOG",
    "",
    "Least level of ACL log messages that are shown: 0 (all) to 3 (errors); empty: no messages.",
)

# Variables of other packages that more than one module here reads.
PROMETHEUS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client: folder of all processes' counters, for /metrics
SOCKET_FOLDER = "VLLM_RPC_BASE_PATH"  # vLLM: folder of its sockets, which it does not delete
CPU_OMP_THREADS_BIND = "VLLM_CPU_OMP_THREADS_BIND"  # vLLM: the cores of each rank

RANK_VARIABLES = (
    MOE_COMM,
    CUDA_PLATFORM,
    COUNT_COLLECTIVES,
    METRICS,
    RECORD,
    TRANSPORT_TIMEOUT,
    COLLECTIVE_DEADLINE,
    SHARED_WINDOW,
    SHARE_GPUS,
    HCCL_OPS,
    HCCL_BUFFSIZE,
    HCCL_INTRA_PCIE_ENABLE,
    HCCL_INTRA_ROCE_ENABLE,
    EMULATOR,
)
"""Every rank reads all of them before the first collective of its groups (trust/settings.py)."""

EQUAL_ON_ALL_RANKS = (
    MOE_COMM,  # the strategy decides which collectives run
    CUDA_PLATFORM,  # the platform decides which exchange runs
    HCCL_BUFFSIZE,  # MC2's capacity follows from it, and auto's choice from the capacity
    HCCL_INTRA_PCIE_ENABLE,  # MC2's algorithm on A2 follows from it and the next one
    HCCL_INTRA_ROCE_ENABLE,
    TRANSPORT_TIMEOUT,  # a rank that gives up before the others accuses ranks that still wait for it
    COLLECTIVE_DEADLINE,  # as TRANSPORT_TIMEOUT
)
"""The ranks compare them when their groups are made. Every other variable may differ from rank to rank: SHARED_WINDOW and
HCCL_OPS take effect only if all ranks of a group have 1, and the others change no collective."""

EMULATOR_VARIABLES = (
    EMULATOR_SOC,
    EMULATOR_LIBRARIES,
    EMULATOR_RUN,
    EMULATOR_TRACE,
    EMULATOR_ASYNC,
    EMULATOR_DEVICES,
    EMULATOR_MEMORY_GB,
    EMULATOR_LIMITS,
    EMULATOR_UNDEFINED,
    EMULATOR_CANN,
    EMULATOR_LOG,
)
"""The emulated device reads them when a process loads it, which is before the process has groups, and refuses others."""

VARIABLES = RANK_VARIABLES + EMULATOR_VARIABLES


def check_variables() -> None:
    """Raise UnsupportedConfigError for the first variable whose text is not of its kind. LOCAL."""
    for variable in RANK_VARIABLES:
        variable.value()
