"""vLLM's generic all2all managers: the ones it no longer ships, and what the libraries of the others need. No vLLM here.

MANAGERS names every way. Rows without a class are vLLM's own, chosen by `backend`; what is here for them is the check of
their library and the arithmetic of their buffers.
"""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from vllm_npu.all2all.base import All2AllManager, HandleCache, RowsOfRanks
from vllm_npu.errors import UnsupportedConfigError

GATHERING = "allgather_reducescatter"  # vLLM's backend whose experts take what dispatch() returns


@dataclass(frozen=True, slots=True)
class Library:
    """A Python module that a manager calls, and how to get it."""

    module: str
    install: str

    def require(self, what: str) -> None:
        """Raise UnsupportedConfigError, naming the package, unless the module can be imported."""
        if find_spec(self.module) is None:
            raise UnsupportedConfigError(
                f"{what} needs the Python module {self.module}, which is not installed; {self.install}, or choose another "
                f"all2all: {', '.join(name for name, row in MANAGERS.items() if row.library is None)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagerRow:
    """One manager. `manager` is "module:class" of ours, or None where vLLM builds its own for `backend`."""

    backend: str  # vLLM's name of what the experts' side has to be
    manager: str | None = None
    library: Library | None = None
    graphs: bool = True  # whether CUDA graphs can hold it


DEEP_EP = Library("deep_ep", "build DeepEP (github.com/deepseek-ai/DeepEP)")
PPLX = Library("pplx_kernels", "build pplx-kernels (github.com/perplexityai/pplx-kernels)")
FLASHINFER = Library("flashinfer", "pip install flashinfer-python")

MANAGERS = {
    "naive": ManagerRow(backend=GATHERING, manager="vllm_npu.all2all.naive:NaiveAll2AllManager"),
    "agrs": ManagerRow(backend=GATHERING, manager="vllm_npu.all2all.agrs:AgRsAll2AllManager"),
    "pplx": ManagerRow(backend=GATHERING, manager="vllm_npu.all2all.pplx:PPLXAll2AllManager", library=PPLX),
    "deepep_high_throughput": ManagerRow(backend="deepep_high_throughput", library=DEEP_EP, graphs=False),
    "deepep_low_latency": ManagerRow(backend="deepep_low_latency", library=DEEP_EP),
    "flashinfer_two_sided": ManagerRow(backend="flashinfer_nvlink_two_sided", library=FLASHINFER),
    "flashinfer_one_sided": ManagerRow(backend="flashinfer_nvlink_one_sided", library=FLASHINFER),
}


def manager_row(name: str) -> ManagerRow:
    """The row of `name`, its library found. Raises UnsupportedConfigError for an unknown name or an absent library."""
    if name not in MANAGERS:
        raise UnsupportedConfigError(f"unknown all2all {name!r}; there are: {', '.join(MANAGERS)}")
    row = MANAGERS[name]
    if row.library is not None:
        row.library.require(f"all2all {name!r}")
    return row


def manager_class(name: str) -> type[All2AllManager] | None:
    """The class behind `name`, or None where vLLM builds its own. Raises as manager_row does."""
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
