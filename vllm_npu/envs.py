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
        return self.read_if_set() or self.default

    def read_if_set(self) -> str | None:
        """The variable's text, or None where it is unset or empty."""
        return os.environ.get(self.name) or None

    def read_flag(self) -> bool:
        """The variable as a switch. Raises UnsupportedConfigError for anything but 0 and 1."""
        text = self.read()
        if text not in ("0", "1"):
            raise UnsupportedConfigError(f"{self.name}={text!r}: not a switch; set it to 0 or 1")
        return text == "1"

    def read_whole_number(self) -> int:
        """The variable as a number, 0 or more. Raises UnsupportedConfigError for anything else."""
        text = self.read()
        if not (text.isascii() and text.isdecimal()):
            raise UnsupportedConfigError(
                f"{self.name}={text!r}: not a whole number; set it to one, such as {self.default}"
            )
        return int(text)

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
    "Strategy where --additional-config does not name one: auto, mc2, all2all, allgather or naive; beside vllm-ascend also "
    "off, compare and compare:STRATEGY.",
)
CUDA_PLATFORM = Variable(
    "VLLM_NPU_CUDA_PLATFORM",
    "0",
    "1 makes this package vLLM's platform on GPUs, so that its all2all managers can be asked for; 0 leaves vLLM alone there.",
)
COUNT_COLLECTIVES = Variable(
    "VLLM_NPU_COUNT_COLLECTIVES",
    "0",
    "1 counts calls and bytes of every collective, for the worker call moe_comm_counters.",
)
METRICS = Variable(
    "VLLM_NPU_METRICS",
    "0",
    "1 counts steps, tokens, bytes, fallbacks and failed votes of each rank for vLLM's /metrics.",
)
RECORD = Variable(
    "VLLM_NPU_RECORD",
    "",
    "Folder where each rank keeps a trace of its last collectives, for `vllm-npu doctor --trace`; empty: none.",
)
TRANSPORT_TIMEOUT = Variable(
    "VLLM_NPU_TRANSPORT_TIMEOUT",
    "60",
    "Seconds after which a collective of a group that this package opens itself fails.",
)
COLLECTIVE_DEADLINE = Variable(
    "VLLM_NPU_COLLECTIVE_DEADLINE",
    "600",
    "Seconds after which a collective of a served model fails over gloo, naming the ranks that are late, where vLLM gave the "
    "group no shorter time-out; HCCL obeys HCCL_EXEC_TIMEOUT.",
)
SHARED_WINDOW = Variable(
    "VLLM_NPU_SHARED_WINDOW",
    "1",
    "1: gloo's large messages between ranks of one host go through shared memory; 0: over sockets. The same on all ranks.",
)
HCCL_OPS = Variable(
    "VLLM_NPU_HCCL_OPS",
    "1",
    "1: tokens travel by C++ operators straight on HCCL where these are built; 0: by torch.distributed.",
)
HCCL_BUFFSIZE = Variable("HCCL_BUFFSIZE", "200", "HCCL's own: MiB of the buffer in which MC2's ops work.")
EMULATOR = Variable("VLLM_NPU_EMULATOR", "0", "1 puts the emulated Ascend device under torch_npu in every interpreter.")
EMULATOR_SOC = Variable("VLLM_NPU_EMULATOR_SOC", "A2", "Chip, or family of chips, that the emulated device passes for.")
EMULATOR_LIBRARIES = Variable(
    "VLLM_NPU_EMULATOR_LIBRARIES", "", "Folder of built libraries, used as it is; empty: build."
)
EMULATOR_RUN = Variable("VLLM_NPU_EMULATOR_RUN", "", "Set by the launcher: part of the names of a run's shared memory.")
EMULATOR_TRACE = Variable("VLLM_NPU_EMULATOR_TRACE", "0", "1 lists the calls of ACL, HCCL and aclnn on standard error.")
EMULATOR_ASYNC = Variable(
    "VLLM_NPU_EMULATOR_ASYNC", "", "Seed of random delays of streams that run on threads; empty: synchronous streams."
)
EMULATOR_DEVICES = Variable("VLLM_NPU_EMULATOR_DEVICES", "16", "Emulated devices of this machine.")
EMULATOR_MEMORY_GB = Variable("VLLM_NPU_EMULATOR_MEMORY_GB", "0", "Memory of one device; 0: what the chip has.")
EMULATOR_LIMITS = Variable(
    "VLLM_NPU_EMULATOR_LIMITS", "device", "device: refuse sizes that the chip's ops refuse; none: take any size."
)
EMULATOR_UNDEFINED = Variable(
    "VLLM_NPU_EMULATOR_UNDEFINED",
    "nan",
    "What memory holds that an op leaves unwritten: nan (the least integer), or zero.",
)
EMULATOR_CANN = Variable("VLLM_NPU_EMULATOR_CANN", "8.5.0", "Version that the emulated CANN reports.")
EMULATOR_LOG = Variable(
    "VLLM_NPU_EMULATOR_LOG", "", "Least level of the ACL log that is shown: 0 (all) to 3 (errors); empty: none."
)

# Of others, where more than one module needs the name.
PROMETHEUS_FOLDER = (
    "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's: where processes count, for vLLM's /metrics to add up
)
SOCKET_FOLDER = "VLLM_RPC_BASE_PATH"  # vLLM's: of its sockets, which it leaves there
CPU_OMP_THREADS_BIND = "VLLM_CPU_OMP_THREADS_BIND"  # vLLM's: the cores of each rank

VARIABLES = (
    MOE_COMM,
    CUDA_PLATFORM,
    COUNT_COLLECTIVES,
    METRICS,
    RECORD,
    TRANSPORT_TIMEOUT,
    COLLECTIVE_DEADLINE,
    SHARED_WINDOW,
    HCCL_OPS,
    HCCL_BUFFSIZE,
    EMULATOR,
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
