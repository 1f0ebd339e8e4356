"""Times on a GPU: calls in a row, in a CUDA graph or without, which all ranks start at the same moment."""

from collections.abc import Callable

import torch

from vllm_npu.tools.graph_verification import captured

SPIN_CYCLES = 500_000
"""A GPU waits so long, 0.25 ms at 2 GHz, while the host queues a replay. Otherwise the host's time for it would be measured."""


def graph_of(run: Callable[[], object], calls: int) -> Callable[[], None]:
    """The replay of a CUDA graph of `calls` calls of `run` in a row.

    Two calls run before the capture, since kernels are compiled and windows opened in them. COLLECTIVE if `run` is. Host sync:
    yes.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()

    def in_a_row() -> torch.Tensor:
        for _ in range(calls):
            run()
        return torch.empty(0)  # the output of a call stays inside the graph

    replay, _ = captured(in_a_row, torch.device("cuda", torch.cuda.current_device()))
    torch.cuda.synchronize()
    return replay


def microseconds(run: Callable[[], object], meet: Callable[[], object], *, head_start: bool) -> float:
    """The GPU's time for what `run` queues on the current stream, in us. Host sync: yes.

    `meet` queues a wait of the GPU until all ranks are there; a barrier of the hosts would leave the ranks apart by as much as
    a small exchange takes. head_start: the GPU first waits for SPIN_CYCLES. Without it, the host's time counts where the GPU
    waits for the host, as it does in eager calls.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if head_start:
        torch.cuda._sleep(SPIN_CYCLES)
    meet()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3
