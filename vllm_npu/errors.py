"""Errors of this package: one class per situation. A message says what is wrong, where, and what to do."""


class VllmNpuError(Exception):
    """Base of every error that this package raises on purpose."""


class UnsupportedConfigError(VllmNpuError, ValueError):
    """A configuration that cannot work, found before any token moves. Change the configuration."""


class PluginConflictError(UnsupportedConfigError):
    """Two platform plugins want this process. Set VLLM_PLUGINS to what the message says."""


class UnsupportedDeviceError(UnsupportedConfigError):
    """This chip has no op for the strategy. Choose another strategy."""


class DeviceLimitError(UnsupportedConfigError):
    """The layer is past a limit of the chip's op. Choose another strategy, or other parallel sizes."""


class HcclBufferError(UnsupportedConfigError):
    """HCCL's buffer is too small for the steps that the engine is configured for. Set HCCL_BUFFSIZE."""


class UnknownGroupError(UnsupportedConfigError):
    """HCCL does not know a process group that a device op has to communicate over."""


class NativeBuildError(VllmNpuError, RuntimeError):
    """A C++ part cannot be built, or not be loaded. Install what the message names, or read its log."""


class EmulatorBuildError(NativeBuildError):
    """The emulated Ascend device cannot be built, or not be loaded. Install what the message names, or read its log."""


class InvalidInputError(VllmNpuError, ValueError):
    """An argument of one call breaks the callee's contract. The call moved nothing; the object stays usable."""


class HandleMismatchError(VllmNpuError, RuntimeError):
    """A handle was used twice, or given to a stage that did not make it. A fault of the calling code."""


class PlanDisagreementError(VllmNpuError, RuntimeError):
    """Ranks planned different steps. Raised on every rank, naming ranks and plans, before any collective of the step."""


class LyingCollectiveError(VllmNpuError, RuntimeError):
    """A collective returned wrong data in the start-up self-test. Do not serve with it; the message names call and group."""


class TransportError(VllmNpuError, RuntimeError):
    """A collective failed or did not end in time. The group must not be used again; restart its ranks."""

    def __init__(self, operation: str, group: str, rank: int, detail: str) -> None:
        super().__init__(f"{operation} on group '{group}' failed on rank {rank}: {detail}")
        self.operation = operation
        self.group = group
        self.rank = rank
        self.detail = detail

    def with_detail(self, more: str) -> "TransportError":
        """The same error, which says more."""
        return type(self)(self.operation, self.group, self.rank, f"{self.detail}\n{more}")

    def __reduce__(self) -> tuple[type["TransportError"], tuple[str, str, int, str]]:
        return type(self), (self.operation, self.group, self.rank, self.detail)


class RankFailureError(TransportError):
    """A collective failed or was too late because other ranks ended or did not come: the message names them. Restart all."""

    def __init__(self, operation: str, group: str, rank: int, detail: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(operation, group, rank, detail)
        self.ranks = ranks  # that ended, or, where none did, that are late; numbers in the whole grid

    def with_detail(self, more: str) -> "RankFailureError":
        """The same error, which says more."""
        return type(self)(self.operation, self.group, self.rank, f"{self.detail}\n{more}", self.ranks)

    def __reduce__(self) -> tuple[type["RankFailureError"], tuple[str, str, int, str, tuple[int, ...]]]:  # type: ignore[override]
        return type(self), (self.operation, self.group, self.rank, self.detail, self.ranks)
