"""vLLM's generic all2all managers. This folder imports no vLLM.

MANAGERS lists all of them. A row with a class is a manager of this folder. A row without a class is a manager of vLLM, which
vLLM builds for `backend`; this folder checks that its library is installed and computes the sizes of its buffers.
"""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from vllm_npu.all2all.base import All2AllManager, HandleCache, RowsOfRanks
from vllm_npu.errors import UnsupportedConfigError

GATHERING = "allgather_reducescatter"  # vLLM's backend with experts that take what dispatch() returns


@dataclass(frozen=True, slots=True)
class Library:
    """A Python module that a manager calls, and how to install it."""

    module: str
    install: str

    def require(self, what: str) -> None:
        """Raise UnsupportedConfigError unless the module can be imported. The message names the module and its installation."""
        if find_spec(self.module) is None:
            raise UnsupportedConfigError(
                f"{what} needs the Python module {self.module}, which is not installed; {self.install}, or choose another "
                f"all2all: {', '.join(name for name, row in MANAGERS.items() if row.library is None)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagerRow:
    """One manager."""

    backend: str  # vLLM's all2all_backend, which decides vLLM's experts
    manager: str | None = None  # "module:class"; None: vLLM builds its own manager for `backend`
    library: Library | None = None


DEEP_EP = Library("deep_ep", "build DeepEP (github.com/deepseek-ai/DeepEP)")
PPLX = Library("pplx_kernels", "build pplx-kernels (github.com/perplexityai/pplx-kernels)")
FLASHINFER = Library("flashinfer", "pip install flashinfer-python")

MANAGERS = {
    "naive": ManagerRow(backend=GATHERING, manager="vllm_npu.all2all.gathering:NaiveAll2AllManager"),
    "agrs": ManagerRow(backend=GATHERING, manager="vllm_npu.all2all.gathering:AgRsAll2AllManager"),
    "pplx": ManagerRow(backend=GATHERING, manager="vllm_npu.all2all.pplx:PPLXAll2AllManager", library=PPLX),
    "deepep_high_throughput": ManagerRow(backend="deepep_high_throughput", library=DEEP_EP),
    "deepep_low_latency": ManagerRow(backend="deepep_low_latency", library=DEEP_EP),
    "flashinfer_two_sided": ManagerRow(backend="flashinfer_nvlink_two_sided", library=FLASHINFER),
    "flashinfer_one_sided": ManagerRow(backend="flashinfer_nvlink_one_sided", library=FLASHINFER),
}


def manager_row(name: str) -> ManagerRow:
    """Return the row of `name`. Raises UnsupportedConfigError for an unknown name, and where its library is not installed."""
    if name not in MANAGERS:
        raise UnsupportedConfigError(f"unknown all2all {name!r}; there are: {', '.join(MANAGERS)}")
    row = MANAGERS[name]
    if row.library is not None:
        row.library.require(f"all2all {name!r}")
    return row


def manager_class(name: str) -> type[All2AllManager] | None:
    """Import and return the class of `name`, or None where vLLM builds its own manager. Raises as manager_row does."""
    path = manager_row(name).manager
    if path is None:
        return None
    module, _, attribute = path.partition(":")
    found: type[All2AllManager] = getattr(import_module(module), attribute)
    return found


__all__ = [
    "DEEP_EP",
    "FLASHINFER",
    "GATHERING",
    "MANAGERS",
    "PPLX",
    "All2AllManager",
    "HandleCache",
    "Library",
    "ManagerRow",
    "RowsOfRanks",
    "manager_class",
    "manager_row",
]
