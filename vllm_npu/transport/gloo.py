"""Transport over gloo: any CPU."""

import datetime
from collections.abc import Sequence

import torch
import torch.distributed as dist

from vllm_npu.transport.torch_dist import TorchDistTransport
from vllm_npu.transport.watchdog import Watchdog

# gloo's own ring takes half of the host's time where a message is a vote and no more than four ranks pass it on: 76 for 121 us
# on 2 ranks, 124 for 269 on 4 (processor time of the calling thread, vllm_npu on 2 busy cores).
SHORT_BYTES, FEW_RANKS = 1024, 4


class GlooTransport(TorchDistTransport):
    """gloo gathers equal shapes only, and reduce-scatters by reducing everything everywhere: the exchanges used here in
    place of both need no padding, and half of the time of gloo's own reduce_scatter."""

    backend = "gloo"
    device_type = "cpu"
    _deadline: datetime.timedelta | None = None

    def watch(self, watchdog: Watchdog) -> None:
        """As above. All collectives of the group, others' too, fail past the deadline, or past the group's own time-out
        where that is shorter."""
        super().watch(watchdog)
        backend = self.process_group._get_backend(torch.device("cpu"))
        self._deadline = min(datetime.timedelta(seconds=watchdog.deadline), backend.options._timeout)
        backend._set_default_timeout(self._deadline)

    def _wait(self, work: dist.Work) -> None:
        """gloo's sends and receives wait for ever unless told how long, whatever the group's time-out is."""
        work.wait() if self._deadline is None else work.wait(self._deadline)

    def _all_gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        if len(set(sizes)) == 1 and 0 < x.nbytes <= SHORT_BYTES and self.size <= FEW_RANKS:
            return super()._all_gather(x, sizes)
        return self._all_gather_from_peers(x, sizes)

    def _reduce_scatter(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        return self._reduce_scatter_by_exchange(x, sizes)
