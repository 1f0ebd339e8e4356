"""Transport over gloo: any CPU."""

import datetime
import logging
import math
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from vllm_npu.core.token_layout import offsets
from vllm_npu.transport.base import RankWatch, gather_texts, sum_in_rank_order
from vllm_npu.transport.shared_window import CAPACITY, MAX_TEXT_BYTES, NoSharedWindowError, SharedWindow
from vllm_npu.transport.torch_dist import TorchDistTransport

logger = logging.getLogger("vllm.npu.transport.gloo")  # vLLM shows messages of loggers under "vllm"

WINDOW_MIN_BYTES = 256 << 10  # largest part that one rank gives another; sockets are as fast below (docs/benchmarks)


class GlooTransport(TorchDistTransport):
    """Gathers and reduce-scatters of any sizes, without padding.

    gloo's own all-gather takes equal shapes only, and its reduce-scatter reduces all rows on all ranks. The exchanges here
    take half of the time of gloo's reduce-scatter. Large messages of both go through shared memory if all ranks are on one
    host.
    """

    backend = "gloo"
    device_type = "cpu"

    def __init__(self, process_group: dist.ProcessGroup, group: str) -> None:
        super().__init__(process_group, group)
        self._deadline = self._backend.options._timeout

    @property
    def _backend(self) -> Any:
        return self.process_group._get_backend(torch.device("cpu"))

    def watch(self, watchdog: RankWatch) -> None:
        """Failures name ranks from now on. All collectives of the process group fail after the watchdog's deadline, or after
        the group's own time-out if that is shorter. LOCAL."""
        super().watch(watchdog)
        self._deadline = min(datetime.timedelta(seconds=watchdog.deadline), self._backend.options._timeout)
        self._backend._set_default_timeout(self._deadline)

    def _wait(self, work: dist.Work) -> None:
        """Wait with a time-out. Without one, gloo's sends and receives wait for ever."""
        work.wait(self._deadline)

    def leave(self) -> None:
        """Forget the process group and the shared memory. LOCAL. The mapped memory of a rank that comes late stays its own."""
        super().leave()
        self.close()

    def close(self) -> None:
        """Release the shared memory."""
        self.__dict__.pop("_window", None)

    def _all_gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        row_bytes = _row_bytes(x)
        window = self._window_for(max(sizes) * row_bytes, max(sizes) * row_bytes)
        if window is None:
            return self._all_gather_from_peers(x, sizes)
        with self._collective("all_gather"):
            parts = self._share(window, x, [(0, x.nbytes)] * self.size, [size * row_bytes for size in sizes])
        return torch.cat(parts).view(-1, *x.shape[1:])

    def _reduce_scatter(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        row_bytes = _row_bytes(x)
        window = self._window_for(max(sizes) * row_bytes, x.nbytes)
        if window is None:
            return self._reduce_scatter_by_exchange(x, sizes)
        spans = list(pairwise(start * row_bytes for start in offsets(sizes)))
        with self._collective("reduce_scatter"):
            parts = self._share(window, x, spans, [sizes[self.rank] * row_bytes] * self.size)
        return sum_in_rank_order(parts).view(-1, *x.shape[1:])

    def _window_for(self, most_for_a_rank: int, message_bytes: int) -> SharedWindow | None:
        """The shared memory, or None for messages that go through sockets. Both numbers, and so the result, are equal on all
        ranks."""
        return self._window if most_for_a_rank >= WINDOW_MIN_BYTES and message_bytes <= CAPACITY else None

    @cached_property
    def _window(self) -> SharedWindow | None:
        """The group's shared memory, or None if the ranks have none. COLLECTIVE at the first access.

        Raises UnsupportedConfigError on every rank if VLLM_NPU_SHARED_WINDOW of one rank is malformed.
        """
        try:
            return SharedWindow.open(self.rank, lambda text: gather_texts(self, text, MAX_TEXT_BYTES))
        except NoSharedWindowError as error:
            logger.info("Group '%s' exchanges tokens over gloo alone, without shared memory: %s", self.group, error)
            return None

    def _share(
        self, window: SharedWindow, x: torch.Tensor, spans: Sequence[tuple[int, int]], expected: Sequence[int]
    ) -> list[torch.Tensor]:
        """The elements that each rank has for this one, as one flat tensor for each rank."""
        one_each = [1] * self.size
        parts = window.share(x, spans, lambda rows: self._all_to_all(rows, one_each, one_each))
        for rank, (part, num_bytes) in enumerate(zip(parts, expected, strict=True)):
            if part.nbytes != num_bytes:
                raise RuntimeError(f"rank {rank} brings {part.nbytes} bytes, sizes say {num_bytes}")
        return [part.view(x.dtype) for part in parts]


def _row_bytes(x: torch.Tensor) -> int:
    return math.prod(x.shape[1:]) * x.element_size()
