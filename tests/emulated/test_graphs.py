"""Graphs on the emulated device: real torch.npu.NPUGraph, with the operators, streams, events and HCCL of the emulator."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch_npu

from tests.emulated.test_aten import CASES, DEVICE, Inputs, tensors_in
from vllm_npu.emulator import build

pytestmark = pytest.mark.emulated

RANKS_DIFFER = "the ranks made different calls"
FREED = "has been freed since the capture"

# Cases of test_aten that no graph can hold: sizes of results depend on values, or values are read or made on the host.
REFUSED_CASES = {
    *("bincount", "histc", "index on the CPU", "inverse", "mask", "nonzero", "repeat", "tensor", "unique", "zero size"),
}


def captured(function: Callable[[], Any], graph: Any = None, **options: Any) -> tuple[Any, Any]:
    """The graph of `function`, and what the function returned. The function does not run."""
    graph = graph or torch.npu.NPUGraph()
    with torch.npu.graph(graph, **options):
        returned = function()
    return graph, returned


def replayed(graph: Any) -> None:
    graph.replay()
    torch.npu.synchronize()


def x_of(*values: float) -> torch.Tensor:
    return torch.tensor(values, device=DEVICE)


def refused(text: str, function: Callable[[], Any]) -> None:
    """The capture fails with the text, and the device works after it."""
    pool = torch.npu.graph_pool_handle()
    with pytest.raises(RuntimeError) as caught:
        captured(function, pool=pool)
    torch.npu.set_stream(torch.npu.default_stream())  # torch_npu leaves the stream of a capture that failed
    texts = []
    error: BaseException | None = caught.value
    while error is not None:
        texts.append(str(error))
        error = error.__context__
    assert any(text in each for each in texts), texts
    # COMPAT(torch_npu < 2.13): where the end of a capture fails, its allocator goes on capturing and refuses the next capture.
    # CAN REMOVE when torch_npu >= 2.13 is required.
    if "joined" in text and torch_npu.__version__.startswith("2.10."):
        torch_npu._C._npu_endAllocateCurrentStreamToPool(torch.npu.current_device(), pool)
    assert (torch.ones(3, device=DEVICE) + 1).tolist() == [2, 2, 2]


# --- Operators ---


def case_differs(name: str) -> str | None:
    """Captures a case on other values than those of its replay. Returns the difference from the CPU, or None."""
    on_cpu, on_npu = Inputs.on(torch.device("cpu")), Inputs.on(DEVICE)
    values = {field: tensor.clone() for field, tensor in vars(on_npu).items()}
    for tensor in vars(on_npu).values():
        tensor.zero_()
    torch.npu.synchronize()
    expected = list(tensors_in(CASES[name](on_cpu)))
    try:
        graph, returned = captured(lambda: CASES[name](on_npu))
    except RuntimeError as error:
        cause = error.__context__ or error
        return f"refused: {str(cause)[:160]}"
    for field, tensor in vars(on_npu).items():
        tensor.copy_(values[field])
    for _ in range(2):
        replayed(graph)
        got = list(tensors_in(returned))
        if len(got) != len(expected):
            return f"{len(got)} results in place of {len(expected)}"
        for want, have in zip(expected, got, strict=True):
            if (have.dtype, have.shape, have.stride()) != (want.dtype, want.shape, want.stride()):
                return (
                    f"{have.dtype} {have.shape} {have.stride()} in place of {want.dtype} {want.shape} {want.stride()}"
                )
            if not torch.equal(have.cpu().nan_to_num(), want.nan_to_num()):
                return f"{have.cpu()} in place of {want}"
    return None


def all_cases(rank: int, num_ranks: int) -> dict[str, str]:
    found = {name: case_differs(name) for name in CASES}
    return {name: difference for name, difference in found.items() if difference is not None}


@pytest.mark.parametrize("env", [{}, {"VLLM_NPU_EMULATOR_ASYNC": "1"}], ids=["synchronous", "asynchronous"])
def test_replayed_operators_compute_as_on_the_cpu(run_in_ranks, env: dict[str, str]) -> None:
    [differ] = run_in_ranks(all_cases, 1, env=env).returned
    wrong = {name: text for name, text in differ.items() if not text.startswith("refused")}
    assert not wrong
    assert set(differ) == REFUSED_CASES, differ


def test_nothing_runs_during_the_capture() -> None:
    x, other = x_of(1, 2, 3), x_of(5, 5, 5)
    graph, y = captured(lambda: x.add_(1) + other)
    torch.npu.synchronize()
    assert x.tolist() == [1, 2, 3]
    replayed(graph)
    assert (x.tolist(), y.tolist()) == ([2, 3, 4], [7, 8, 9])


def test_numbers_of_the_host_are_frozen_at_the_capture() -> None:
    x, factor = x_of(1, 2), torch.tensor(3.0)
    graph, y = captured(lambda: x * factor)
    factor.fill_(100)
    replayed(graph)
    assert y.tolist() == [3, 6]


def test_an_output_that_is_resized_has_its_size_after_the_capture() -> None:
    x, out = x_of(3, 1, 2), torch.empty(0, device=DEVICE)
    graph, _ = captured(lambda: torch.mul(x, 2, out=out))
    assert out.shape == (3,)
    replayed(graph)
    assert out.tolist() == [6, 2, 4]


def test_random_numbers_differ_between_replays_and_repeat_with_the_seed() -> None:
    graph, x = captured(lambda: torch.rand(8, device=DEVICE))
    torch.npu.manual_seed(5)
    replayed(graph)
    first = x.tolist()
    replayed(graph)
    assert x.tolist() != first
    torch.npu.manual_seed(5)
    replayed(graph)
    assert x.tolist() == first


def test_copies_with_page_locked_memory_are_part_of_the_graph() -> None:
    source, target = torch.tensor([1.0, 2.0]).pin_memory(), torch.zeros(2).pin_memory()
    x = torch.zeros(2, device=DEVICE)

    def through_the_device() -> None:
        x.copy_(source, non_blocking=True)
        target.copy_(x + 1, non_blocking=True)

    graph, _ = captured(through_the_device)
    source.copy_(torch.tensor([7.0, 8.0]))
    replayed(graph)
    assert target.tolist() == [8, 9]


def test_graphs_that_share_a_pool() -> None:
    pool, x = torch.npu.graph_pool_handle(), x_of(1, 2)
    first, y = captured(lambda: x * 2, pool=pool)
    second, z = captured(lambda: y + 1, pool=pool)
    for value in (1.0, 5.0):
        x.fill_(value)
        first.replay()
        replayed(second)
        assert z.tolist() == [2 * value + 1] * 2


def test_a_graph_is_replayed_on_any_stream() -> None:
    x = x_of(1, 2)
    graph, y = captured(lambda: x + 1)
    stream = torch.npu.Stream()
    stream.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(stream):
        graph.replay()
    stream.synchronize()
    assert y.tolist() == [2, 3]


def test_a_graph_that_goes_before_its_replay_ends(run_in_ranks) -> None:
    run_in_ranks(destroyed_while_it_runs, 1, env={"VLLM_NPU_EMULATOR_ASYNC": "2"})


def destroyed_while_it_runs(rank: int, num_ranks: int) -> None:
    x = torch.zeros(4, device=DEVICE)

    def work() -> None:
        for _ in range(50):
            x.add_(1)

    graph, _ = captured(work)
    graph.replay()
    del graph
    torch.npu.synchronize()
    assert x.tolist() == [50] * 4


# --- Streams and events ---


def fork_and_join(rank: int, num_ranks: int) -> None:
    x, side = x_of(1, 1), torch.npu.Stream()

    def both() -> torch.Tensor:
        main = torch.npu.current_stream()
        a = x * 2
        side.wait_stream(main)
        with torch.npu.stream(side):
            b = a + 1
        c = a + 10
        main.wait_stream(side)
        return b * c

    graph, y = captured(both)
    for value in range(1, 20):
        x.fill_(value)
        replayed(graph)
        assert y.tolist() == [(2 * value + 1) * (2 * value + 10)] * 2


def missing_event(rank: int, num_ranks: int) -> int:
    """The number of replays in which a stream that does not wait sees an old value."""
    x, side = torch.zeros(1000, device=DEVICE), torch.npu.Stream()
    y = torch.zeros(1000, device=DEVICE)

    def race() -> None:
        main = torch.npu.current_stream()
        side.wait_stream(main)
        for _ in range(6):
            x.add_(1)
        with torch.npu.stream(side):
            y.copy_(x)
        main.wait_stream(side)

    graph, _ = captured(race)
    wrong = 0
    for _ in range(30):
        x.zero_()
        replayed(graph)
        wrong += y[0].item() != 6
    return wrong


@pytest.mark.parametrize("env", [{}, *({"VLLM_NPU_EMULATOR_ASYNC": str(seed)} for seed in range(1, 4))], ids=str)
def test_streams_join_a_capture_by_events(run_in_ranks, env: dict[str, str]) -> None:
    run_in_ranks(fork_and_join, 1, env=env)


def test_a_missing_event_inside_a_graph_shows(run_in_ranks) -> None:
    assert run_in_ranks(missing_event, 1, env={"VLLM_NPU_EMULATOR_ASYNC": "4"}).returned[0] > 0


def test_a_stream_that_is_not_joined_back_is_refused() -> None:
    x, side = x_of(1, 2), torch.npu.Stream()

    def forgets() -> None:
        side.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(side):
            x.add_(1)

    refused("joined the capture", forgets)
    replayed(captured(lambda: x.add_(1))[0])
    assert x.tolist() == [2, 3]


def event_from_outside(rank: int, num_ranks: int) -> None:
    event = torch.npu.Event()
    event.record()
    refused("was recorded outside of the capture", lambda: torch.npu.current_stream().wait_event(event))


def test_an_event_from_outside_is_refused(run_in_ranks) -> None:
    run_in_ranks(event_from_outside, 1, env={"TASK_QUEUE_ENABLE": "0"})  # the queue would drop all work after the error


def event_of_a_capture(rank: int, num_ranks: int) -> None:
    event, x = torch.npu.Event(), x_of(1, 2)

    def records() -> None:
        x.add_(1)
        event.record()

    captured(records)
    with pytest.raises(RuntimeError, match="only streams of this capture can wait for it"):
        event.synchronize()


def test_an_event_of_a_capture_is_of_no_use_outside(run_in_ranks) -> None:
    run_in_ranks(event_of_a_capture, 1, env={"TASK_QUEUE_ENABLE": "0"})


# --- What no graph can hold ---


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda x: x.sum().item(), "a wait for the stream: stream"),
        (lambda x: x.cpu(), "being captured into a graph"),
        (lambda x: x.tolist(), "being captured into a graph"),
        (lambda x: x.nonzero(), "aten::nonzero"),
        (lambda x: x[x > 1], "being captured into a graph"),
        (lambda x: x.masked_select(x > 1), "aten::masked_select"),
        (lambda x: x.unique(), "being captured into a graph"),
        (lambda x: x.copy_(torch.ones(3)), "being captured into a graph"),
        (lambda x: torch.npu.current_stream().synchronize(), "a wait for the stream"),
        (lambda x: torch.npu.synchronize(), "does not belong to a stream"),
    ],
    ids=["item", "cpu", "tolist", "nonzero", "mask", "masked_select", "unique", "pageable copy", "stream", "device"],
)
def test_what_waits_for_the_host_is_refused(function: Callable[[torch.Tensor], Any], text: str) -> None:
    x = x_of(1, 2, 3)
    refused(text, lambda: function(x))


def test_the_default_stream_is_refused() -> None:
    graph = torch.npu.NPUGraph()
    with pytest.raises(RuntimeError, match="non-default stream"):
        graph.capture_begin()


@pytest.mark.skipif(
    torch_npu.__version__.startswith("2.10."),
    reason="torch_npu 2.10 refuses the second graph itself, and ends the process that frees this graph",
)
def test_a_stream_is_captured_once() -> None:
    def twice() -> None:
        torch.npu.NPUGraph().capture_begin()

    refused("is being captured", twice)


def test_task_queue_2_is_refused() -> None:
    script = "from vllm_npu import emulator\nemulator.enable()\nimport torch, torch_npu\ng = torch.npu.NPUGraph()\n"
    script += "with torch.npu.graph(g): pass\n"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "TASK_QUEUE_ENABLE": "2"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode != 0
    assert "Do not support TASK_QUEUE_ENABLE = 2" in done.stderr


def test_a_replay_that_fails_names_the_task_and_the_graph() -> None:
    x, index = x_of(1, 2, 3), torch.tensor([0], device=DEVICE)
    graph, y = captured(lambda: torch.index_select(x, 0, index))
    replayed(graph)
    index.fill_(7)
    with pytest.raises(RuntimeError, match=r"index_select.*in a replay of graph"):
        replayed(graph)
    index.fill_(2)
    replayed(graph)
    assert y.tolist() == [3]


def graph_of_freed_memory() -> Any:
    x = torch.ones(1 << 22, device=DEVICE)
    return captured(lambda: x + 1)[0]


def test_memory_that_is_freed_after_the_capture_is_named() -> None:
    graph = graph_of_freed_memory()
    torch.npu.empty_cache()
    with pytest.raises(RuntimeError, match=FREED):
        replayed(graph)


@pytest.mark.skipif(
    not hasattr(torch.npu.NPUGraph, "get_currently_capturing_graph"),
    reason="needs torch_npu 2.13, which has such nodes",
)
def test_conditional_nodes_are_refused_by_name() -> None:
    condition, x = torch.tensor(True, device=DEVICE), x_of(1, 2)

    def conditional() -> None:
        torch.npu.NPUGraph.get_currently_capturing_graph().begin_capture_to_if_node(condition)
        x.add_(1)

    refused("aclmdlRICondHandleCreate", conditional)


def test_the_graph_is_written_as_json(tmp_path: Path) -> None:
    x = x_of(1, 2)
    graph, _ = captured(lambda: (x + 1).mul_(2))
    graph.debug_dump(str(tmp_path / "graph.json"))
    # torch_npu makes the others from the first: 2.13 one, 2.10 none.
    names = {"graph.json", *(path.name for path in tmp_path.iterdir())}
    assert names <= {"graph.json", "graph.aligned.json"}
    for name in names:
        events = json.loads((tmp_path / name).read_text())
        assert [event["name"] for event in events] == ["aten::add.Tensor", "aten::mul_.Tensor"]


# --- Groups of tasks ---


def graph_with_a_group(x: torch.Tensor) -> tuple[Any, torch.Tensor, Any, Any]:
    """A graph that adds 1, then waits for an external event and multiplies by 2 in a group of tasks."""
    event = torch.npu.ExternalEvent()
    out = torch.zeros(2, device=DEVICE)
    groups = []

    def work() -> None:
        stream = torch.npu.current_stream()
        y = x + 1
        event.wait(stream)
        event.reset(stream)
        torch.npu.graph_task_group_begin(stream)
        torch.mul(y, 2, out=out)
        groups.append((torch.npu.graph_task_group_end(stream), y))

    graph, _ = captured(work)
    return graph, out, event, groups[0]


def updated_groups(rank: int, num_ranks: int) -> None:
    x = x_of(1, 2)
    graph, out, event, (group, y) = graph_with_a_group(x)
    updates = torch.npu.Stream()
    for factor in (2, 3, 5):
        graph.replay()  # it waits for the event
        with torch.npu.stream(updates):
            torch.npu.graph_task_update_begin(updates, group)
            torch.mul(y, factor, out=out)
            updates.synchronize()  # as torch_npu does with ASCEND_LAUNCH_BLOCKING=1
            torch.npu.graph_task_update_end(updates)
            event.record(updates)
        torch.npu.synchronize()
        assert out.tolist() == [2 * factor, 3 * factor], factor


@pytest.mark.parametrize("env", [{}, {"VLLM_NPU_EMULATOR_ASYNC": "6"}, {"TASK_QUEUE_ENABLE": "0"}], ids=str)
def test_the_tasks_of_a_group_get_other_arguments(run_in_ranks, env: dict[str, str]) -> None:
    run_in_ranks(updated_groups, 1, env=env)


def busy_side_stream(rank: int, num_ranks: int) -> None:
    """The graph waits for an external event. Meanwhile its side stream waits for the end of the replay."""
    x, event, side = x_of(1, 2), torch.npu.ExternalEvent(), torch.npu.Stream()
    log = torch.zeros(2, device=DEVICE)

    def work() -> torch.Tensor:
        main = torch.npu.current_stream()
        event.wait(main)
        event.reset(main)
        side.wait_stream(main)
        with torch.npu.stream(side):
            y = x * 2
        main.wait_stream(side)
        return y

    graph, y = captured(work)
    for value in (2, 3, 5):
        x.fill_(value)
        graph.replay()
        side.wait_stream(torch.npu.current_stream())
        event.record(torch.npu.Stream())
        with torch.npu.stream(side):
            log.add_(y)
        torch.npu.synchronize()
        assert y.tolist() == [2 * value] * 2
    assert log.tolist() == [2 * (2 + 3 + 5)] * 2


@pytest.mark.parametrize("env", [{}, {"VLLM_NPU_EMULATOR_ASYNC": "6"}, {"TASK_QUEUE_ENABLE": "0"}], ids=str)
def test_a_replay_leaves_the_streams_free_that_recorded_it(run_in_ranks, env: dict[str, str]) -> None:
    run_in_ranks(busy_side_stream, 1, env=env)


def test_an_update_with_other_tasks_is_refused() -> None:
    graph, out, _, (group, y) = graph_with_a_group(x_of(1, 2))
    updates = torch.npu.Stream()
    with torch.npu.stream(updates):
        torch.npu.graph_task_update_begin(updates, group)
        torch.add(y, 2, out=out)
        with pytest.raises(RuntimeError, match=r"the tasks aten::mul\.out and the update has aten::add\.out"):
            torch.npu.graph_task_update_end(updates)
    del graph  # its groups lived until here


# --- Ranks ---


def collectives(rank: int, num_ranks: int) -> None:
    x = torch.zeros(4, device=DEVICE.type)
    gathered = torch.zeros(4 * num_ranks, device=DEVICE.type)
    exchanged = torch.zeros(num_ranks, device=DEVICE.type)
    own = torch.zeros(num_ranks, device=DEVICE.type)
    dist.all_reduce(torch.ones(1, device=DEVICE.type))  # opens the group

    def work() -> torch.Tensor:
        y = x + 1
        dist.all_reduce(y)
        dist.all_gather_into_tensor(gathered, y * (rank + 1))
        dist.all_to_all_single(exchanged, own)
        return y * 2

    graph, y = captured(work)
    for value in range(5):
        x.fill_(value * (rank + 1))
        own.copy_(torch.arange(num_ranks) + 10.0 * rank + value)
        replayed(graph)
        total = value * num_ranks * (num_ranks + 1) / 2 + num_ranks
        assert y.tolist() == [2 * total] * 4
        assert gathered.tolist() == [total * (each + 1) for each in range(num_ranks) for _ in range(4)]
        assert exchanged.tolist() == [10.0 * each + rank + value for each in range(num_ranks)]


def graphs_that_differ(rank: int, num_ranks: int) -> None:
    dist.all_reduce(torch.ones(1, device=DEVICE.type))
    x = torch.ones(4, device=DEVICE.type)
    small, _ = captured(lambda: dist.all_reduce(x[:2]))
    large, _ = captured(lambda: dist.all_reduce(x))
    with pytest.raises(RuntimeError) as caught:
        replayed(small if rank == 0 else large)
    assert RANKS_DIFFER in str(caught.value), str(caught.value)
    assert "count=2" in str(caught.value)
    assert "in a replay of graph" in str(caught.value)


@pytest.mark.parametrize(
    ("num_ranks", "env"),
    [(2, {}), (4, {}), (4, {"VLLM_NPU_EMULATOR_ASYNC": "8"}), (2, {"TASK_QUEUE_ENABLE": "0"})],
    ids=str,
)
def test_collectives_in_a_graph(num_ranks: int, env: dict[str, str], run_in_ranks) -> None:
    run_in_ranks(collectives, num_ranks, env=env)


def test_ranks_that_replay_different_graphs(run_in_ranks) -> None:
    run_in_ranks(graphs_that_differ, 2, env={"TASK_QUEUE_ENABLE": "0", "TORCH_HCCL_ASYNC_ERROR_HANDLING": "0"})


def test_the_library_has_what_torch_npu_looks_up() -> None:
    library = build.library_folder() / "libascendcl.so"
    names = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    assert torch_npu.__version__
    for name in ("CaptureBegin", "CaptureEnd", "CaptureGetInfo", "ExecuteAsync", "Destroy", "CaptureTaskGrpBegin"):
        assert f" aclmdlRI{name}\n" in names
