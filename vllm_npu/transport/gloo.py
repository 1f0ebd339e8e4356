"""Transport over gloo: any CPU."""

from collections.abc import Sequence

import torch

from vllm_npu.token_layout import offsets
from vllm_npu.transport.base import SendRecv
from vllm_npu.transport.torch_dist import TorchDistTransport


class GlooTransport(TorchDistTransport):
    """Gathers and reduce-scatters without padding, and in about half of the time of gloo's own reduce_scatter.

    gloo gathers equal shapes only, and reduce-scatters by reducing everything everywhere. Here each rank sends its rows
    to each other rank once, and sums what it receives in float32, in rank order: the same bits in every run.
    """

    def _all_gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        gathered = x.new_empty((sum(sizes), *x.shape[1:]))
        starts = offsets(sizes)
        gathered[starts[self.rank] : starts[self.rank + 1]] = x
        exchange = []
        for step in range(1, self.size):
            destination = (self.rank + step) % self.size
            source = (self.rank - step) % self.size
            if sizes[self.rank]:
                exchange.append(SendRecv(destination, x, is_send=True))
            if sizes[source]:
                exchange.append(SendRecv(source, gathered[starts[source] : starts[source + 1]], is_send=False))
        if exchange:
            self._send_recv(exchange)
        return gathered

    def _reduce_scatter(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        own_rows = sizes[self.rank]
        parts = self._all_to_all(x, sizes, [own_rows] * self.size).view(self.size, own_rows, *x.shape[1:])
        if not x.is_floating_point():
            return parts.sum(0, dtype=x.dtype)
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part
        return total.to(x.dtype)
