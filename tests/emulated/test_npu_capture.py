"""Memory of a second stream in a capture, with torch_npu's queue of operators."""

import pytest
import torch

from vllm_npu.device.npu_capture import join_capture

pytestmark = pytest.mark.emulated

CAPTURES = 20
BEFORE = 300  # operators that wait in the queue when the second stream begins


def lies_in(pool: tuple[int, int], tensor: torch.Tensor) -> bool:
    """Whether the allocator of torch_npu gave the tensor's memory to the graph's pool."""
    [segment] = [
        each
        for each in torch.npu.memory_snapshot()
        if each["address"] <= tensor.data_ptr() < each["address"] + each["total_size"]
    ]
    return tuple(segment["segment_pool_id"]) == tuple(pool)


def second_stream(rank: int, num_ranks: int) -> list[bool]:
    """Whether the second stream's tensor lies in the graph's memory, of CAPTURES captures. The replays are right."""
    side, x = torch.npu.Stream(), torch.ones(64, device="npu")
    join_capture(side)  # outside of a capture: nothing
    inside = []
    for _ in range(CAPTURES):
        graph = torch.npu.NPUGraph()
        with torch.npu.graph(graph):
            capturing, counted = torch.npu.current_stream(), x
            for _ in range(BEFORE):
                counted = counted + 1
            ready = capturing.record_event()
            join_capture(capturing)
            join_capture(side)
            with torch.npu.stream(side):
                side.wait_event(ready)
                doubled = counted * 2
            join_capture(side)  # again: nothing
            capturing.wait_stream(side)
            total = doubled + 1
        inside.append(lies_in(graph.pool(), doubled))
        graph.replay()
        torch.npu.synchronize()
        assert total.tolist() == [2.0 * (1 + BEFORE) + 1] * 64
    return inside


@pytest.mark.parametrize("queue", ["0", "1"])
def test_a_second_streams_tensors_lie_in_the_graphs_memory(run_in_ranks, queue: str) -> None:
    outcome = run_in_ranks(second_stream, 1, env={"TASK_QUEUE_ENABLE": queue})
    assert outcome.returned == [[True] * CAPTURES]
