"""Transport over gloo: any CPU."""

from collections.abc import Sequence

import torch

from vllm_npu.transport.torch_dist import TorchDistTransport


class GlooTransport(TorchDistTransport):
    """gloo gathers equal shapes only, and reduce-scatters by reducing everything everywhere: the exchanges used here in
    place of both need no padding, and half of the time of gloo's own reduce_scatter."""

    backend = "gloo"
    device_type = "cpu"

    def _all_gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        return self._all_gather_from_peers(x, sizes)

    def _reduce_scatter(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        return self._reduce_scatter_by_exchange(x, sizes)
