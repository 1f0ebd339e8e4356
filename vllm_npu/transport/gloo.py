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

from vllm_npu import envs
from vllm_npu.core.token_layout import offsets
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.transport.base import RankWatch, gather_texts, sum_in_rank_order
from vllm_npu.transport.shared_window import CAPACITY, MAX_TEXT_BYTES, SharedWindow
from vllm_npu.transport.torch_dist import TorchDistTransport

logger = logging.getLogger("vllm.npu.transport.gloo")  # under "vllm": the names whose messages vLLM shows

WINDOW_MIN_BYTES = 256 << 10  # that the fullest rank gives another one; below, sockets are as fast (docs/benchmarks)


class GlooTransport(TorchDistTransport):
    """gloo gathers equal shapes only, and reduce-scatters by reducing everything everywhere: the exchanges used here in
    place of both need no padding, and half of the time of gloo's own reduce_scatter. Where all ranks are on one host, large
    messages of both go through shared memory."""

    backend = "gloo"
    device_type = "cpu"

    def __init__(self, process_group: dist.ProcessGroup, group: str) -> None:
        super().__init__(process_group, group)
        self._deadline = self._backend.options._timeout

    @property
    def _backend(self) -> Any:
        return self.process_group._get_backend(torch.device("cpu"))

    def watch(self, watchdog: RankWatch) -> None:
        """As above. All collectives of the group, others' too, fail past the deadline, or past the group's own time-out
        where that is shorter."""
        super().watch(watchdog)
        self._deadline = min(datetime.timedelta(seconds=watchdog.deadline), self._backend.options._timeout)
        self._backend._set_default_timeout(self._deadline)

    def _wait(self, work: dist.Work) -> None:
        """gloo's sends and receives wait for ever unless told how long."""
        work.wait(self._deadline)

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
        """The shared memory, where messages of this many bytes go through it. The same on all ranks, as both numbers are."""
        return self._window if most_for_a_rank >= WINDOW_MIN_BYTES and message_bytes <= CAPACITY else None

    @cached_property
    def _window(self) -> SharedWindow | None:
        """COLLECTIVE at the first access."""
        try:
            return SharedWindow.open(
                self.rank,
                lambda text: gather_texts(self, text, MAX_TEXT_BYTES),
                wanted=envs.SHARED_WINDOW.read_flag(),
            )
        except UnsupportedConfigError as error:
            logger.info("Group '%s' exchanges tokens over gloo alone, without shared memory: %s", self.group, error)
            return None

    def _share(
        self, window: SharedWindow, x: torch.Tensor, spans: Sequence[tuple[int, int]], expected: Sequence[int]
    ) -> list[torch.Tensor]:
        """Of each rank, the elements that it has for this one, flat."""
        one_each = [1] * self.size
        parts = window.share(x, spans, lambda rows: self._all_to_all(rows, one_each, one_each))
        for rank, (part, num_bytes) in enumerate(zip(parts, expected, strict=True)):
            if part.nbytes != num_bytes:
                raise RuntimeError(f"rank {rank} brings {part.nbytes} bytes, sizes say {num_bytes}")
        return [part.view(x.dtype) for part in parts]


def _row_bytes(x: torch.Tensor) -> int:
    return math.prod(x.shape[1:]) * x.element_size()
