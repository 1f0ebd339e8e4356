"""Errors of this package, one class for each situation. A message says what is wrong, where, and what to do."""


class VllmNpuError(Exception):
    """Base of every error that this package raises on purpose."""


class UnsupportedConfigError(VllmNpuError, ValueError):
    """A configuration that cannot work. It is found before any token moves. Change the configuration."""


class PluginConflictError(UnsupportedConfigError):
    """Two platform plugins claim this process. Set VLLM_PLUGINS to the value in the message."""


class UnsupportedDeviceError(UnsupportedConfigError):
    """This chip has no op for the strategy. Choose another strategy."""


class DeviceLimitError(UnsupportedConfigError):
    """The layer exceeds a limit of the chip's op. Choose another strategy, or other parallel sizes."""


class HcclBufferError(UnsupportedConfigError):
    """HCCL's buffer is too small for the engine's largest step. Set HCCL_BUFFSIZE."""


class UnknownGroupError(UnsupportedConfigError):
    """HCCL does not know the process group of a device op that communicates."""


class NativeBuildError(VllmNpuError, RuntimeError):
    """A C++ part cannot be built or loaded. Install what the message names, or read the log that it names."""


class EmulatorBuildError(NativeBuildError):
    """The emulated Ascend device cannot be built or loaded. Install what the message names, or read the log that it names."""


class InvalidInputError(VllmNpuError, ValueError):
    """An argument of a call breaks the contract of the called method. The call moved nothing, and the object stays usable."""


class HandleMismatchError(VllmNpuError, RuntimeError):
    """A handle was used twice, or passed to a stage that does not consume it. The calling code is wrong."""


class PlanDisagreementError(VllmNpuError, RuntimeError):
    """Ranks planned different steps. Every rank raises it before the step's first collective. It names the ranks and plans."""


class PreparationError(VllmNpuError, RuntimeError):
    """A rank lacks the memory, or another means, for a collective. No rank has moved anything. Free memory on that rank."""


class ExpertBalancerError(VllmNpuError, RuntimeError):
    """The process that decides where experts go has ended. The ranks would wait for its decision without end."""


class LyingCollectiveError(VllmNpuError, RuntimeError):
    """A collective returned wrong data in the start-up self-test. The message names call and group. Do not serve with it."""


class TransportError(VllmNpuError, RuntimeError):
    """A collective failed or did not end in time. Do not use the group again. Restart its ranks."""

    def __init__(self, operation: str, group: str, rank: int, detail: str) -> None:
        super().__init__(f"{operation} on group '{group}' failed on rank {rank}: {detail}")
        self.operation = operation
        self.group = group
        self.rank = rank
        self.detail = detail

    def with_detail(self, more: str) -> "TransportError":
        """The same error with `more` added to its message."""
        return type(self)(self.operation, self.group, self.rank, f"{self.detail}\n{more}")

    def __reduce__(self) -> tuple[type["TransportError"], tuple[str, str, int, str]]:
        return type(self), (self.operation, self.group, self.rank, self.detail)


class RankFailureError(TransportError):
    """A collective failed because of other ranks: ended, stopped, late. The message names them. Restart all, or meet anew."""

    def __init__(self, operation: str, group: str, rank: int, detail: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(operation, group, rank, detail)
        self.ranks = ranks  # the culprits, as trust/watchdog.py finds them; numbers in the whole grid

    def with_detail(self, more: str) -> "RankFailureError":
        """The same error with `more` added to its message."""
        return type(self)(self.operation, self.group, self.rank, f"{self.detail}\n{more}", self.ranks)

    def __reduce__(self) -> tuple[type["RankFailureError"], tuple[str, str, int, str, tuple[int, ...]]]:  # type: ignore[override]
        return type(self), (self.operation, self.group, self.rank, self.detail, self.ranks)
