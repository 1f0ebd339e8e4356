"""Imports of installed modules, with steps of the emulator before and after the module's own code."""

import importlib.abc
import importlib.machinery
from collections.abc import Callable, Sequence
from types import ModuleType

Step = Callable[[ModuleType], None]


def do_nothing(_module: ModuleType) -> None:
    """A step that changes nothing."""


class AmendingLoader(importlib.abc.Loader):
    """Runs `before`, the module's own loader, and `after`."""

    def __init__(self, real_loader: importlib.abc.Loader, before: Step, after: Step) -> None:
        self._real_loader = real_loader
        self._before = before
        self._after = after

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._real_loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._before(module)
        self._real_loader.exec_module(module)
        self._after(module)


def find_amended(
    fullname: str, path: Sequence[str] | None, *, before: Step = do_nothing, after: Step = do_nothing
) -> importlib.machinery.ModuleSpec | None:
    """The installed module with these steps, for find_spec of a finder; None if it is not installed."""
    spec = importlib.machinery.PathFinder.find_spec(fullname, path)
    if spec is not None and spec.loader is not None:
        spec.loader = AmendingLoader(spec.loader, before, after)
    return spec
