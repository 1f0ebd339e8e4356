"""The C++ operators on HCCL, beside what must arrive and beside the same transport through torch.distributed: same bits, same
counts, on real ranks."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.cases import distinct_ids, same_bits, seeded
from tests.ranks.test_exceptions import good_steps_after_exceptions
from tests.ranks.test_split_phase import IN_FLIGHT, start_does_not_wait
from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.core.token_layout import RowFormat
from vllm_npu.emulator import launcher, soc
from vllm_npu.emulator.fork_server import ForkContext
from vllm_npu.errors import TransportError, UnsupportedConfigError
from vllm_npu.strategies.select import build
from vllm_npu.strategies.table import STRATEGIES
from vllm_npu.tools.launch import ProcessRankPool, Rank
from vllm_npu.transport import host
from vllm_npu.transport.base import Groups, Transport
from vllm_npu.transport.hccl import HcclTransport
from vllm_npu.transport.hccl_direct import token_ops
from vllm_npu.transport.hccl_direct.communicator import PyHcclTransport
from vllm_npu.trust.recording import CollectiveCounter, record

pytestmark = pytest.mark.emulated

UNEVEN = {"HcclAllGatherV", "HcclReduceScatterV"}
# chip's family, ranks, environment
WAYS = {
    "V collectives": ("A3", 4, {"VLLM_NPU_EMULATOR_ASYNC": "7"}),
    "exchanges": ("A2", 4, {"VLLM_NPU_EMULATOR_ASYNC": "8"}),
    "task queue": ("A3", 2, {"TASK_QUEUE_ENABLE": "1"}),
}


class ThroughTorchDistributed(HcclTransport):
    """The transport of a group without the operators."""

    def _has_ops(self) -> bool:
        return False


@contextmanager
def ranks_on(
    warm: ForkContext, monkeypatch, family: str, num_ranks: int, env: dict[str, str]
) -> Iterator[ProcessRankPool]:
    for name, value in {"VLLM_NPU_EMULATOR_SOC": family, "VLLM_NPU_EMULATOR_TRACE": "1", **env}.items():
        monkeypatch.setenv(name, value)
    with (
        launcher.emulated_devices(num_ranks),
        ProcessRankPool(num_ranks, transport="hccl", start_method=warm) as pool,
    ):
        yield pool


def pair(t: HcclTransport) -> tuple[HcclTransport, HcclTransport]:
    return t, ThroughTorchDistributed(t.process_group, t.group)


def any_rows(rank: int, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows whose last one, if there is one, is NaN, or the least integer."""
    rows = torch.randint(-9, 9, (num_rows, width), generator=seeded(rank * 100 + width), device="cpu").to(dtype)
    rows[-1:] = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
    return rows.to(torch.get_default_device())


def sizes_of(t: Transport) -> Iterator[list[int]]:
    yield from ([3] * t.size, [0] * t.size, [7] + [0] * (t.size - 1), [(2 * r + 1) % 4 for r in range(t.size)])
    yield from ([r * 5 for r in range(t.size)], [0] * (t.size - 1) + [1])


def gathers(t: HcclTransport) -> None:
    layouts = ((5, torch.float16), (3, torch.float32), (1, torch.int8), (3, torch.int32), (2, torch.int64))
    for sizes in sizes_of(t):
        of_ranks = [[any_rows(rank, size, *layout) for layout in layouts] for rank, size in enumerate(sizes)]
        fields = of_ranks[t.rank]
        before = [field.clone() for field in fields]
        first, second = (each.gather_tokens(fields, sizes) for each in pair(t))
        wanted = [torch.cat(parts) for parts in zip(*of_ranks, strict=True)]
        assert all(same_bits(a, b) for a, b in zip(first, wanted, strict=True))
        assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
        for field, as_it_was in zip(fields, before, strict=True):
            assert same_bits(field, as_it_was)
            assert same_bits(*(each.all_gather(field.t().contiguous().t(), sizes) for each in pair(t)))


def scatters(t: HcclTransport) -> None:
    for sizes in sizes_of(t):
        for dtype in (torch.float16, torch.float32, torch.int16, torch.int32, torch.int64):
            rows = any_rows(t.rank, sum(sizes), 6, dtype)
            first, second = (each.reduce_scatter(rows, sizes) for each in pair(t))
            wanted = sum(any_rows(rank, sum(sizes), 6, dtype) for rank in range(t.size))
            torch.testing.assert_close(first, wanted.split(sizes)[t.rank], rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
            finite = rows[:, :3].nan_to_num(0) + 0.1 if dtype.is_floating_point else rows
            assert same_bits(*(each.reduce_scatter(finite, sizes) for each in pair(t)))


def exchanges(t: HcclTransport) -> None:
    for seed in range(4):
        matrix = torch.randint(0, 4, (t.size, t.size), generator=seeded(seed), device="cpu")
        matrix *= torch.tensor([seed > 0, seed != 1, True, True], device="cpu")[: t.size]  # nobody sends to some ranks
        sent, received = matrix[t.rank], matrix[:, t.rank].tolist()
        of_ranks = [
            [any_rows(rank, int(row.sum()), *field) for field in ((9, torch.float16), (2, torch.int32))]
            for rank, row in enumerate(matrix)
        ]
        fields = of_ranks[t.rank]
        wanted = [
            torch.cat([part.split(row.tolist())[t.rank] for part, row in zip(parts, matrix, strict=True)])
            for parts in zip(*of_ranks, strict=True)
        ]
        results = [each.exchange_tokens(fields, sent.to(fields[0].device)) for each in pair(t)]
        for rows, sent_rows, received_rows in results:
            assert (sent_rows, received_rows) == (sent.tolist(), received)
            assert [tuple(each.shape) for each in rows] == [(sum(received), 9), (sum(received), 2)]
        assert all(same_bits(a, b) for a, b in zip(results[0][0], wanted, strict=True))
        assert all(same_bits(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
        assert same_bits(*(each.all_to_all(fields[0], sent.tolist(), received) for each in pair(t)))


def same_as_torch_distributed(rank: Rank, grid: tuple[int, int]) -> None:
    groups = rank.groups(tp_size=grid[0], dp_size=grid[1])
    with rank.device:
        for t in (groups.tp, groups.dp, groups.ep):
            if t.size > 1:
                assert t._has_ops()
                gathers(t)
                scatters(t)
                exchanges(t)


def outputs_and_counts(rank: Rank, grid: tuple[int, int], strategies: list[str]) -> None:
    """Every strategy on uneven counts: the same output and the same counts of collectives and bytes both ways."""
    groups = rank.groups(tp_size=grid[0], dp_size=grid[1])
    transports = (groups.tp, groups.dp, groups.ep)
    step = StepPlan(num_tokens_across_dp=tuple(range(1, grid[1] + 1)), sharding=TokenSharding.REPLICATED)
    tokens, generator = step.num_tokens_across_dp[groups.topology.dp_rank], seeded(groups.topology.dp_rank)
    ids = distinct_ids(tokens, 2, 8, generator).to(rank.device)
    weights = torch.rand(tokens, 2, generator=generator).to(rank.device)
    hidden_states = torch.randn(tokens, 32, generator=generator).half().to(rank.device)
    for strategy in strategies:
        results = []
        for each in zip(*map(pair, transports), strict=True):
            counter = CollectiveCounter()
            counted = Groups(groups.topology, *(record(t, counter) for t in each))
            output = build(strategy, counted, num_experts=8).run(
                hidden_states, weights, ids, lambda rows, *_: rows * 2, step
            )
            results.append((output.hidden_states, counter.calls, counter.bytes_sent))
        x, sums = hidden_states.cpu().double(), weights.cpu().double().sum(1, keepdim=True)
        torch.testing.assert_close(results[0][0].cpu().double(), 2 * sums * x, rtol=4 * 2**-11, atol=1e-6)
        assert same_bits(results[0][0], results[1][0]), strategy
        assert results[0][1:] == results[1][1:], strategy


@pytest.mark.parametrize("way", WAYS)
def test_same_bits_and_counts_as_through_torch_distributed(warm, monkeypatch, capfd, way):
    family, num_ranks, env = WAYS[way]
    grid = (num_ranks // 2, 2)
    with ranks_on(warm, monkeypatch, family, num_ranks, env) as pool:
        pool.run(same_as_torch_distributed, grid)
        called = {word for word in capfd.readouterr().err.split() if word.startswith("Hccl")}
        assert called & UNEVEN == (set() if family == "A2" else UNEVEN)
        pool.run(outputs_and_counts, grid, ["all2all", "allgather", "naive"])
        for shows in IN_FLIGHT.values():
            pool.run(shows, "all2all")
        if "VLLM_NPU_EMULATOR_ASYNC" in env:
            pool.run(start_does_not_wait)


def test_good_steps_after_exceptions_between_dispatch_and_combine(warm, monkeypatch):
    with ranks_on(warm, monkeypatch, "A3", 2, {"VLLM_NPU_EMULATOR_LIMITS": "none"}) as pool:
        for strategy in STRATEGIES:
            pool.run(good_steps_after_exceptions, strategy)


def between_two_hosts(rank: Rank, folder: str) -> bool:
    """Rank 1 is in another network namespace; the hosts' names are equal. Whether PyHCCL has the V collectives then."""
    with pytest.MonkeyPatch.context() as patched, rank.device:
        if rank.rank == 1:
            elsewhere = Path(folder, "net")
            elsewhere.symlink_to("net:[1]")
            patched.setattr(host, "NETWORK_NAMESPACE", elsewhere)
        ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
        assert ep._has_ops()
        gathers(ep)
        scatters(ep)
        return PyHcclTransport(ep.process_group)._has_v


def test_only_ranks_of_one_host_are_one_server(warm, monkeypatch, capfd, tmp_path):
    with ranks_on(warm, monkeypatch, "A3", 2, {}) as pool:
        assert pool.run(between_two_hosts, str(tmp_path)) == [False, False]
    called = {word for word in capfd.readouterr().err.split() if word.startswith("Hccl")}
    assert "HcclAlltoAllV" in called
    assert called & UNEVEN == set()


# --- messages, traces ---


def packs_as(rank: Rank) -> list[bool]:
    """Whether a message of one rank is RowFormat's, field by field."""
    t = rank.groups(tp_size=1, dp_size=2).dp
    equal = []
    for widths in ((5, 3, 2), (8, 4, 4), (1, 1, 1), (4, 1, 1)):
        fields = [any_rows(t.rank, 3, *field).to(rank.device) for field in
                  zip(widths, (torch.int8, torch.float32, torch.int64), strict=True)]  # fmt: skip
        if widths[1] == 1:  # a single column may have any stride
            fields[1] = fields[1].as_strided(fields[1].shape, (1, 0))
        assert t._has_ops()
        message = token_ops.ops().gather_message(fields, [3, 3], t._name)
        row_format = RowFormat.of(fields)
        own = row_format.unpack(message[3 * t.rank : 3 * t.rank + 3])
        equal.append(message.shape[1] == row_format.row_bytes)
        equal += [same_bits(a, b) for a, b in zip(own, fields, strict=True)]
    return equal


def compiled(rank: Rank) -> None:
    """fullgraph, then again with other sizes."""
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    ops, t = token_ops.ops(), rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    assert t._has_ops()

    def there_and_back(x: torch.Tensor, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        rows, all_ids = ops.gather_tokens([x * 2, ids], sizes, t._name)
        return ops.scatter_reduce_tokens(rows + all_ids[:, :1], sizes, t.rank, t._name) - 1

    def exchanged(x: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> list[torch.Tensor]:
        (received, received_ids), _ = ops.exchange_tokens([x, ids], rows, t._name)
        return [received * 2, received_ids]

    def returned(x: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        return ops.exchange_rows(x + 1, send, receive, t._name) * 2

    with rank.device:
        for function in (there_and_back, exchanged, returned):
            whole_graph = torch.compile(function, backend="aot_eager", fullgraph=True)
            for sizes in ([2, 3], [4, 1]):
                own = sizes[t.rank]
                x, ids = any_rows(t.rank, own, 4, torch.float16), any_rows(t.rank, own, 2, torch.int32)
                arguments = {
                    there_and_back: (x, ids, sizes),
                    exchanged: (x, ids, torch.tensor([own - 1, 1])),
                    returned: (x, [own - 1, 1], [sizes[0] - 1, sizes[1] - 1] if t.rank == 0 else [1, 1]),
                }[function]
                wanted = function(*arguments)
                found = whole_graph(*arguments)
                for a, b in zip(*([each] if isinstance(each, torch.Tensor) else each for each in (wanted, found)),
                                strict=True):  # fmt: skip
                    assert same_bits(a, b)


def wrong_counts(rank: Rank) -> list[str]:
    """Rank 1 says that it sends so many rows to the ranks; nothing is allocated or read by such counts, here or there."""
    t, said = rank.groups(tp_size=1, dp_size=2).dp, []
    assert t._has_ops()
    rows = torch.ones(3, 2).to(rank.device)
    for counts in ([-1, 4], [2**62, 3 - 2**62], [2**31, 0]):
        each = torch.tensor(counts if rank.rank == 1 else [1, 2]).to(rank.device)
        with pytest.raises((ValueError, RuntimeError)) as error:
            token_ops.ops().exchange_tokens.default([rows], each, t._name)
        said.append(str(error.value))
    return said


def gathers_while_rows_travel(rank: Rank) -> None:
    """A start goes on on a stream of ProcessGroupHCCL's. What the operators do next over the group comes after it."""
    t = rank.groups(tp_size=1, dp_size=2).dp
    own = torch.tensor([[0.0], [1.0]]) + 10 * t.rank
    for turn in range(30):
        x = own.to(rank.device) + turn
        pending = t.all_to_all_start(x, [1, 1], [1, 1])
        gathered = t.all_gather(x)
        assert pending.finish().flatten().tolist() == [turn + t.rank, turn + 10 + t.rank]
        assert gathered.flatten().tolist() == [turn, turn + 1, turn + 10, turn + 11]


def test_a_call_does_not_overtake_what_is_in_flight(warm, monkeypatch):
    with ranks_on(warm, monkeypatch, "A3", 2, {"VLLM_NPU_EMULATOR_ASYNC": "11"}) as pool:
        pool.run(gathers_while_rows_travel)


def a_rank_differs(rank: Rank) -> None:
    rank.groups(tp_size=1, dp_size=2).dp.all_gather(torch.ones(rank.rank + 1, 3).to(rank.device))


def test_messages_whole_graphs_and_what_a_failing_call_says(warm, monkeypatch):
    with ranks_on(warm, monkeypatch, "A3", 2, {}) as pool:
        assert all(map(all, pool.run(packs_as)))
        pool.run(compiled)
        told, wrong = pool.run(wrong_counts)
        assert all("exchange_tokens: the ranks announce [1, " in said for said in told)
        assert all("exchange_tokens (sent): sizes [" in said for said in wrong)
        for error in pool.outcomes(a_rank_differs):
            assert isinstance(error, TransportError)
            assert str(error).startswith(
                f"all_gather on group 'dp' failed on rank {error.rank}: no rank has ended, and all have failed "
                "(HcclAllGather returned 1"
            )
            assert "(parameter error); compare what each rank passed" in str(error)
            assert "rank 1: HcclAllGather count=24 dtype=int8" in str(error), "HCCL's own text"


@pytest.mark.parametrize("device", ["meta", "npu"])
def test_shapes_without_running_anything(device):
    assert token_ops.why_not() is None
    ops = token_ops.ops()
    fake = torch._subclasses.fake_tensor.FakeTensorMode(
        shape_env=torch.fx.experimental.symbolic_shapes.ShapeEnv(allow_dynamic_output_shape_ops=True)
    )
    with fake:
        x = torch.empty(3, 5, dtype=torch.bfloat16, device=device)
        scales, ids = torch.empty(3, 1, device=device), torch.empty(3, 2, dtype=torch.int32, device=device)
        rows, all_scales, all_ids = ops.gather_tokens([x, scales, ids], [3, 0, 4], "no group yet")
        assert [tuple(each.shape) for each in (rows, all_scales, all_ids)] == [(7, 5), (7, 1), (7, 2)]
        assert [each.dtype for each in (rows, all_scales, all_ids)] == [torch.bfloat16, torch.float32, torch.int32]
        assert tuple(ops.gather_tokens([x], [3, 0, 4], "g")[0].shape) == (7, 5)
        assert tuple(ops.scatter_reduce_tokens(x, [1, 0, 2], 2, "g").shape) == (2, 5)
        assert tuple(ops.exchange_rows(x, [1, 1, 1], [0, 4, 1], "g").shape) == (5, 5)
        received, sizes = ops.exchange_tokens([x, ids], torch.empty(3, dtype=torch.int64, device=device), "g")
        assert (tuple(sizes.shape), sizes.device.type) == ((2, 3), "cpu")
        assert [each.shape[1] for each in received] == [5, 2]
        assert received[0].device.type == device


# --- ranks that lack them ---


def lacks_them(rank: Rank, reasons: list[dict[str, str]]) -> tuple[bool, list[int], str]:
    os.environ.update(reasons[rank.rank])
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("vllm.npu.hccl").addHandler(handler)
    t = rank.groups(tp_size=1, dp_size=3).dp
    gathered = t.all_gather(torch.arange(t.rank, device=rank.device), [0, 1, 2])
    return t._has_ops(), gathered.tolist(), " ".join(messages)


def test_all_ranks_go_through_torch_distributed_where_some_lack_the_operators(warm, monkeypatch, tmp_path):
    not_built = {"VLLM_NPU_ENV_HOME": str(tmp_path)}
    with ranks_on(warm, monkeypatch, "A3", 3, {}) as pool:
        outcomes = pool.run(lacks_them, [{}, {"VLLM_NPU_HCCL_OPS": "0"}, not_built])
    for (has_ops, gathered, logged), reason in zip(
        outcomes,
        [
            "see their logs",
            "here: VLLM_NPU_HCCL_OPS=0",
            "are not built; run python -m vllm_npu.transport.hccl_direct.build",
        ],
        strict=True,
    ):
        assert (has_ops, gathered) == (False, [0, 0, 1])
        assert "group 'dp' goes through torch.distributed: ranks [1, 2] cannot use the C++ operators" in logged
        assert reason in logged
    assert not list(tmp_path.iterdir()), "a rank has begun to build"


def malformed_on_one_rank(rank: Rank) -> tuple[str, list[int]]:
    t = rank.groups(tp_size=1, dp_size=2).dp
    x = torch.arange(t.rank + 1, device=rank.device)
    with pytest.MonkeyPatch.context() as patched:
        if rank.rank == 1:
            patched.setenv("VLLM_NPU_HCCL_OPS", "yes")
        with pytest.raises(UnsupportedConfigError) as error:
            t.all_gather(x, [1, 2])
    return str(error.value), t.all_gather(x, [1, 2]).tolist()


def test_a_malformed_switch_on_one_rank_is_an_error_on_all(warm, monkeypatch):
    with ranks_on(warm, monkeypatch, "A3", 2, {}) as pool:
        for message, gathered in pool.run(malformed_on_one_rank):
            assert message == "rank 1: VLLM_NPU_HCCL_OPS='yes': not a switch; set it to 0 or 1"
            assert gathered == [0, 0, 1]


def test_limits_name_the_chips_with_uneven_collectives():
    from vllm_npu.core.limits import DEVICES

    having = {family.name for family in soc.FAMILIES if DEVICES[family.name].uneven_collectives}
    assert having == {"A3", "310P"}
