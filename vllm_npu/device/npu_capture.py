"""A second stream in the capture of an ACL graph, with torch_npu's queue of operators (TASK_QUEUE_ENABLE=1 or 2)."""

from typing import Any

import torch


def join_capture(side: Any) -> None:
    """Let the stream `side` take part in the capture of the current stream, before anything is allocated on it. LOCAL.

    torch_npu puts a tensor into the graph's memory if its stream is captured at that moment. With the queue, the wait for
    an event that makes `side` a captured stream may run later: docs/ascend.md gives the figures. So this function makes
    `side` wait for the current stream, and empties the queue: the queue's thread hands its work to the device, and nobody
    waits for the device. Does nothing outside of a capture, and for a stream that takes part in it. The current stream has
    to wait for `side` before the capture ends, as always.
    """
    npu = torch.get_device_module("npu")
    capturing = npu.current_stream()
    if side == capturing or not npu.is_current_stream_capturing():
        return
    with npu.stream(side):
        if npu.is_current_stream_capturing():
            return
    side.wait_stream(capturing)
    _ = side.npu_stream  # torch_npu empties its queue before it gives the stream's handle
