"""transport/base.py's contract: values, fresh memory, untouched inputs, refusals, failures.

On threads and over gloo here; CONTRACT runs on NPU tensors in tests/emulated/test_hccl.py, on CUDA tensors in
tests/cuda/test_nccl.py.
"""

import importlib.util
import re
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.cases import same_bits, seeded
from vllm_npu.errors import InvalidInputError, TransportError, UnsupportedConfigError
from vllm_npu.tools.launch import ProcessRankPool, Rank, ThreadRankPool
from vllm_npu.transport.base import SendRecv, Transport
from vllm_npu.transport.symmetric_memory import SymmetricFacts, gather_facts
from vllm_npu.transport.table import TRANSPORTS, transport_class
from vllm_npu.trust.recording import CollectiveCounter

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64, torch.uint8)
GRIDS = [(2, 1), (1, 3), (2, 2)]  # (tp_size, dp_size): groups of 1, 2, 3 and 4 ranks

on_all_transports = pytest.mark.parametrize("kind", ["threaded", "gloo"])
on_all_grids = pytest.mark.parametrize("grid", GRIDS, ids=str)


def transports(rank: Rank, grid: tuple[int, int]) -> Iterator[Transport]:
    groups = rank.groups(tp_size=grid[0], dp_size=grid[1])
    yield from (groups.tp, groups.dp, groups.ep)


def with_tensors_on_its_device(rank: Rank, function: Callable[..., None], *arguments) -> None:
    with rank.device:
        function(rank, *arguments)


def run_on(pools, kind: str, grid: tuple[int, int], function: Callable[..., None], *arguments) -> None:
    """Run a function that asserts, on every rank; what it makes lies on the rank's device."""
    pools(kind, grid[0] * grid[1]).run(with_tensors_on_its_device, function, grid, *arguments)


def drawn(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """torch.randint by a generator of the CPU, on whatever device."""
    return torch.randint(low, high, shape, generator=generator, device="cpu").to(torch.get_default_device())


def normal(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """torch.randn by a generator of the CPU, on whatever device."""
    return torch.randn(shape, generator=seeded(seed), device="cpu").to(torch.get_default_device())


def size_patterns(num_ranks: int) -> list[list[int]]:
    patterns = [
        [0] * num_ranks,
        [1] * num_ranks,
        [4] * num_ranks,
        [rank + 1 for rank in range(num_ranks)],
        [5] + [0] * (num_ranks - 1),
        [0] * (num_ranks - 1) + [3],
        [(3 * rank + 2) % 4 for rank in range(num_ranks)],
    ]
    generator = seeded(num_ranks)
    return patterns + [drawn(0, 6, (num_ranks,), generator).tolist() for _ in range(3)]


def rows_of(rank: int, num_rows: int, dtype: torch.dtype, *, seed: int = 0) -> torch.Tensor:
    """[num_rows, 2, 3] integers of 0..15 that depend on the rank: sums over 4 ranks are exact in every dtype."""
    return drawn(0, 16, (num_rows, 2, 3), seeded(100 * seed + rank)).to(dtype)


def expect(result: torch.Tensor, expected: torch.Tensor, x: torch.Tensor, before: torch.Tensor, t: Transport) -> None:
    """The result is right, contiguous where that matters, in memory that no rank's input shares."""
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    if result.numel():
        assert result.untyped_storage().data_ptr() != x.untyped_storage().data_ptr(), "the result is the input's memory"
    t.barrier()
    result.fill_(99)  # would be seen by whoever shares it
    t.barrier()
    assert same_bits(x, before), "an input was written"


def gathers(rank: Rank, grid: tuple[int, int]) -> None:
    for t in transports(rank, grid):
        for dtype in DTYPES:
            for sizes in size_patterns(t.size):
                parts = [rows_of(r, n, dtype) for r, n in enumerate(sizes)]
                x = parts[t.rank].clone()
                expect(t.all_gather(x, sizes), torch.cat(parts), x, parts[t.rank], t)
            x = rows_of(t.rank, 3, dtype)
            parts = [rows_of(r, 3, dtype) for r in range(t.size)]
            expect(t.all_gather(x), torch.cat(parts), x, parts[t.rank], t)


def reduce_scatters(rank: Rank, grid: tuple[int, int]) -> None:
    dtypes = [dtype for dtype in DTYPES if (rank.device.type, dtype) != ("npu", torch.uint8)]  # torch_npu refuses it
    for t in transports(rank, grid):
        for dtype in dtypes:
            for sizes in [*size_patterns(t.size), None]:
                num_rows = 2 * t.size if sizes is None else sum(sizes)
                parts = [rows_of(r, num_rows, dtype) for r in range(t.size)]
                x = parts[t.rank].clone()
                whole = torch.stack(parts).to(torch.int64).sum(0).to(dtype)
                own = whole.split([2] * t.size if sizes is None else sizes)[t.rank]
                expect(t.reduce_scatter(x, sizes), own, x, parts[t.rank], t)


def exchanges(rank: Rank, grid: tuple[int, int]) -> None:
    for t in transports(rank, grid):
        generator = seeded(t.size)
        matrices = [drawn(0, 4, (t.size, t.size), generator) for _ in range(4)]  # [source, destination]
        matrices += [torch.zeros(t.size, t.size).long(), torch.eye(t.size).long(), torch.ones(t.size, t.size).long()]
        matrices += [torch.ones(t.size, t.size).long().tril(-1), matrices[0] * (torch.arange(t.size) == 0)]
        for dtype in DTYPES:
            for seed, matrix in enumerate(matrices):
                sent = [rows_of(r, int(matrix[r].sum()), dtype, seed=seed) for r in range(t.size)]
                expected = [sent[r].split(matrix[r].tolist())[t.rank] for r in range(t.size)]
                x = sent[t.rank].clone()
                result = t.all_to_all(x, matrix[t.rank].tolist(), matrix[:, t.rank].tolist())
                expect(result, torch.cat(expected), x, sent[t.rank], t)


def broadcasts(rank: Rank, grid: tuple[int, int]) -> None:
    for t in transports(rank, grid):
        for dtype in DTYPES:
            for source in range(t.size):
                for num_rows in (3, 0):
                    x = rows_of(t.rank, num_rows, dtype)
                    expect(t.broadcast(x, source), rows_of(source, num_rows, dtype), x, x.clone(), t)


def all_reduces(rank: Rank, grid: tuple[int, int]) -> None:
    for t in transports(rank, grid):
        for dtype in DTYPES:
            for num_rows in (3, 0):
                x = rows_of(t.rank, num_rows, dtype)
                parts = torch.stack([rows_of(r, num_rows, dtype) for r in range(t.size)])
                expect(t.all_reduce(x), parts.to(torch.int64).sum(0).to(dtype), x, x.clone(), t)


def strided_inputs(rank: Rank, grid: tuple[int, int]) -> None:
    for t in transports(rank, grid):
        for stride in ("columns", "transposed", "repeated"):
            parts = []
            for r in range(t.size):
                whole = normal((t.size, 2 * t.size), r)
                columns, transposed, repeated = whole[:, ::2], whole[:, : t.size].t(), whole[:1].expand(t.size, -1)
                parts.append({"columns": columns, "transposed": transposed, "repeated": repeated}[stride])
            x = parts[t.rank]
            before, ones = x.clone(), [1] * t.size
            total = parts[0].clone()
            for part in parts[1:]:
                total = total + part
            expect(t.all_gather(x), torch.cat(parts), x, before, t)
            expect(t.reduce_scatter(x), total[t.rank : t.rank + 1], x, before, t)
            expect(t.all_to_all(x, ones, ones), torch.stack([part[t.rank] for part in parts]), x, before, t)
            expect(t.broadcast(x, t.size - 1), parts[-1], x, before, t)
            # gloo adds in an order of its own: a rounding for each of the sums
            torch.testing.assert_close(t.all_reduce(x), total, rtol=0, atol=8 * 2**-24 * t.size)
            assert same_bits(x, before)


def overwrites_inputs(rank: Rank, grid: tuple[int, int]) -> None:
    *_, t = transports(rank, grid)
    ones = [1] * t.size
    for turn in range(20):
        for call in (
            t.all_gather,
            t.reduce_scatter,
            t.all_reduce,
            lambda x: t.broadcast(x, 0),
            lambda x: t.all_to_all(x, ones, ones),
        ):
            x = torch.full((t.size, 20_000), 1.0 + turn)
            result = call(x)
            x.fill_(-1)
            assert bool((result > 0).all()), "another rank's later write is in the result"


def ordered_sums(rank: Rank, grid: tuple[int, int]) -> None:
    for t in transports(rank, grid):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            sizes = [r + 1 for r in range(t.size)]
            parts = [normal((sum(sizes), 64), r).to(dtype) for r in range(t.size)]
            total = parts[0].float()
            for part in parts[1:]:
                total = total + part.float()
            own = total.to(dtype).split(sizes)[t.rank]
            for _ in range(2):
                assert same_bits(t.reduce_scatter(parts[t.rank], sizes), own)


def messages_of(rank: int) -> list[torch.Tensor]:
    """Three messages of different values; the first and the last are alike in shape and dtype."""
    return [rows_of(rank, 3, torch.float32), rows_of(rank, 1, torch.int64), rows_of(rank, 3, torch.float32) + 50]


def sends_in_a_ring(rank: Rank, grid: tuple[int, int]) -> None:
    for t in transports(rank, grid):
        if t.size == 1:
            t.send_recv([])
            continue
        following, preceding = (t.rank + 1) % t.size, (t.rank - 1) % t.size
        messages, expected = messages_of(t.rank), messages_of(preceding)
        received = [torch.full_like(each, 77) for each in expected]
        sends = [SendRecv(following, each, is_send=True) for each in messages]
        receives = [SendRecv(preceding, each, is_send=False) for each in received]
        t.send_recv([receives[0], *sends, *receives[1:]])
        assert [each.tolist() for each in received] == [each.tolist() for each in expected]
        assert [each.tolist() for each in messages] == [each.tolist() for each in messages_of(t.rank)]


def sends_between_two(rank: Rank, grid: tuple[int, int]) -> None:
    *_, t = transports(rank, grid)
    operations, received = [], torch.zeros(2, 3)
    sent = torch.arange(12.0).view(3, 4).t()[:2]  # not contiguous
    if t.rank == 0:
        operations = [SendRecv(t.size - 1, sent, is_send=True)]
    elif t.rank == t.size - 1:
        operations = [SendRecv(0, received, is_send=False)]
    t.send_recv(operations)
    assert torch.equal(received, sent if t.rank == t.size - 1 else torch.zeros(2, 3))
    t.barrier()


FIELDS = ((5, torch.bfloat16), (3, torch.float32), (1, torch.int8), (2, torch.int64))  # width, dtype


def fields_of(rank: int, num_rows: int) -> list[torch.Tensor]:
    """Tensors that travel together; the last row of the floating-point ones is NaN."""
    fields = [drawn(0, 99, (num_rows, width), seeded(rank)).to(dtype) for width, dtype in FIELDS]
    for field in fields[:2]:
        field[-1:] = float("nan")
    return fields


def messages_of_several(rank: Rank, grid: tuple[int, int]) -> None:
    for t in transports(rank, grid):
        patterns = size_patterns(t.size)
        for sizes in patterns:
            parts = [fields_of(r, n) for r, n in enumerate(sizes)]
            mine = [field.clone() for field in parts[t.rank]]
            for i, gathered in enumerate(t.gather_tokens(mine, sizes)):
                assert same_bits(gathered, torch.cat([part[i] for part in parts]))
                assert same_bits(mine[i], parts[t.rank][i])
        for shift in range(3):
            matrix = [
                patterns[(r + shift) % len(patterns)] for r in range(t.size)
            ]  # rows of each source, by destination
            parts = [fields_of(r, sum(row)) for r, row in enumerate(matrix)]
            mine = [field.clone() for field in parts[t.rank]]
            received, sent_rows, received_rows = t.exchange_tokens(mine, torch.tensor(matrix[t.rank]))
            assert (sent_rows, received_rows) == (matrix[t.rank], [row[t.rank] for row in matrix])
            for i, field in enumerate(received):
                expected = [part[i].split(row)[t.rank] for part, row in zip(parts, matrix, strict=True)]
                assert same_bits(field, torch.cat(expected))
                assert same_bits(mine[i], parts[t.rank][i])


# What each rank runs, by what it shows.
CONTRACT = {
    "all_gather brings all ranks' rows in rank order": gathers,
    "reduce_scatter gives each rank its rows of the sum": reduce_scatters,
    "all_to_all brings each rank the part meant for it": exchanges,
    "several tensors travel as one message": messages_of_several,
    "broadcast brings the source's rows to all": broadcasts,
    "all_reduce gives all ranks the sum": all_reduces,
    "inputs need not be contiguous": strided_inputs,
    "an input may be overwritten as soon as the call returns": overwrites_inputs,
    "reduce_scatter adds in rank order in float32, so the bits repeat": ordered_sums,
    "the nth message to a rank meets its nth receive": sends_in_a_ring,
    "ranks with nothing to send or receive are not waited for": sends_between_two,
}


@on_all_transports
@on_all_grids
@pytest.mark.parametrize("promise", CONTRACT)
def test_contract(pools, kind, grid, promise):
    run_on(pools, kind, grid, CONTRACT[promise])


def waits_for_the_last(rank: Rank, grid: tuple[int, int]) -> tuple[float, float]:
    """When this rank came to the barrier of all ranks, and when it left; the last rank comes late. A barrier of the first TP
    group before it is for that group alone."""
    tp, _, t = transports(rank, grid)
    if rank.rank < tp.size:
        tp.barrier()
    t.barrier()
    if t.rank == t.size - 1:
        time.sleep(0.2)
    came = time.monotonic()
    t.barrier()
    return came, time.monotonic()


@on_all_transports
@on_all_grids
def test_nobody_passes_a_barrier_before_all_have_come(pools, kind, grid):
    times = pools(kind, grid[0] * grid[1]).run(waits_for_the_last, grid)
    assert min(left for _, left in times) >= max(came for came, _ in times)


REFUSED = {
    "all_gather, rows": (
        lambda t: t.all_gather(torch.zeros(3), [3] * t.rank + [2] + [3] * (t.size - t.rank - 1)),
        r"all_gather on group '\w+': rank \d brings 3 rows, sizes \[[\d, ]+\] say 2",
    ),
    "all_gather, ranks": (lambda t: t.all_gather(torch.zeros(3), [3] * (t.size + 1)), r"must be \d counts >= 0"),
    "all_gather, negative": (
        lambda t: t.all_gather(torch.zeros(3), [-1 if r == (t.rank + 1) % t.size else 3 for r in range(t.size)]),
        r"must be \d counts >= 0",
    ),
    "reduce_scatter, sum": (
        lambda t: t.reduce_scatter(torch.zeros(3 * t.size + 1), [3] * t.size),
        r"reduce_scatter on group '\w+': sizes \[[\d, ]+\] add up to \d+, x has \d+ rows",
    ),
    "reduce_scatter, even": (
        lambda t: t.reduce_scatter(torch.zeros(t.size + 1)),
        r"reduce_scatter on group '\w+': \d rows do not divide over \d ranks; pass sizes",
    ),
    "reduce_scatter, ranks": (lambda t: t.reduce_scatter(torch.zeros(4), [4]), r"must be \d counts >= 0"),
    "all_to_all, sum": (
        lambda t: t.all_to_all(torch.zeros(t.size + 1), [1] * t.size, [1] * t.size),
        r"all_to_all on group '\w+': send sizes \[[\d, ]+\] add up to \d, x has \d rows",
    ),
    "all_to_all, self": (
        lambda t: t.all_to_all(torch.zeros(t.size), [1] * t.size, [2 if r == t.rank else 1 for r in range(t.size)]),
        r"all_to_all on group '\w+': rank \d sends itself 1 rows but expects 2",
    ),
    "all_to_all, send ranks": (
        lambda t: t.all_to_all(torch.zeros(1), [1], [1] * t.size),
        r"all_to_all \(send\) on group '\w+': sizes \[1\] must be \d counts >= 0",
    ),
    "all_to_all, receive ranks": (
        lambda t: t.all_to_all(torch.zeros(t.size), [1] * t.size, [-1] * t.size),
        r"all_to_all \(recv\) on group '\w+': sizes \[[-1, ]+\] must be \d counts >= 0",
    ),
    "gather_tokens, rows": (
        lambda t: t.gather_tokens([torch.zeros(2, 1), torch.zeros(3, 1)], [2] * t.size),
        r"gather_tokens on group '\w+': tensors of shapes .* cannot share a message",
    ),
    "exchange_tokens, sum": (
        lambda t: t.exchange_tokens([torch.zeros(t.size + 1, 2)], torch.ones(t.size, dtype=torch.int64)),
        r"exchange_tokens on group '\w+': rows_per_rank \[[\d, ]+\] add up to \d, but the tensors have \d rows",
    ),
    "exchange_tokens, type": (
        lambda t: t.exchange_tokens([torch.zeros(t.size, 2)], torch.ones(t.size, dtype=torch.int32)),
        r"exchange_tokens on group '\w+': rows_per_rank is torch.int32 \(\d,\); it must be int64 \[\d\]",
    ),
    "broadcast, source": (
        lambda t: t.broadcast(torch.zeros(1), t.size),
        r"broadcast on group '\w+': source \d is not in",
    ),
    "broadcast, negative": (lambda t: t.broadcast(torch.zeros(1), -1), r"source -1 is not in 0\.\.\d"),
    "send_recv, self": (
        lambda t: t.send_recv([SendRecv(t.rank, torch.zeros(1), is_send=True)]),
        r"send_recv on group '\w+': peer \d of rank \d is not another rank of 0\.\.\d",
    ),
    "send_recv, outside": (
        lambda t: t.send_recv([SendRecv(t.size, torch.zeros(1), is_send=False)]),
        r"send_recv on group '\w+': peer \d of rank \d is not another rank of 0\.\.\d",
    ),
    "send_recv, strided": (
        lambda t: t.send_recv([SendRecv((t.rank + 1) % t.size, torch.zeros(4, 2).t(), is_send=False)]),
        r"send_recv on group '\w+': a receive needs a contiguous tensor",
    ),
}


FIT_ONE_RANK = {"reduce_scatter, even", "reduce_scatter, ranks", "all_to_all, send ranks", "send_recv, strided"}
NOT_READ_FOR_ONE_RANK = {"exchange_tokens, sum"}  # on an accelerator, where it would be a host sync


def is_refused(rank: Rank, grid: tuple[int, int], name: str) -> None:
    call, message = REFUSED[name]
    fit_one_rank = FIT_ONE_RANK if rank.device.type == "cpu" else FIT_ONE_RANK | NOT_READ_FOR_ONE_RANK
    for t in transports(rank, grid):
        if t.size == 1 and name in fit_one_rank:
            continue
        with pytest.raises(InvalidInputError, match=message) as refused:
            call(t)
        assert f"group '{t.group}'" in str(refused.value)
        assert t.all_gather(torch.tensor([t.rank])).tolist() == list(range(t.size)), "the group is still in step"


@on_all_transports
@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_do_not_fit_are_refused_before_anything_moves(pools, kind, name):
    run_on(pools, kind, (2, 1), is_refused, name)
    if kind == "threaded":
        run_on(pools, kind, (1, 3), is_refused, name)


def reports_missing_grid(rank: Rank) -> str:
    try:
        rank.groups(tp_size=2, dp_size=3)
    except InvalidInputError as error:
        return str(error)
    return "no error"


@on_all_transports
def test_a_grid_that_does_not_hold_the_ranks_is_refused(pools, kind):
    assert pools(kind, 2).run(reports_missing_grid) == ["a TP2xDP3 grid needs 6 ranks, not 2"] * 2


# --- failures ---

OPERATIONS: dict[str, Callable[[Transport], object]] = {
    "all_gather": lambda t: t.all_gather(torch.ones(2)),
    "reduce_scatter": lambda t: t.reduce_scatter(torch.ones(t.size)),
    "all_to_all": lambda t: t.all_to_all(torch.ones(t.size), [1] * t.size, [1] * t.size),
    "broadcast": lambda t: t.broadcast(torch.ones(2), 0),
    "all_reduce": lambda t: t.all_reduce(torch.ones(2)),
    "send_recv": lambda t: t.send_recv(
        [SendRecv((t.rank + step) % t.size, torch.ones(1), is_send=step > 0) for step in (1, -1)]
    ),
    "barrier": lambda t: t.barrier(),
}


def one_rank_raises(rank: Rank, grid: tuple[int, int], group: str, operation: str) -> None:
    groups = rank.groups(tp_size=grid[0], dp_size=grid[1])
    groups.ep.barrier()
    if rank.rank == 0:
        raise ValueError("rank 0 has a fault of its own")
    OPERATIONS[operation](getattr(groups, group))


def all_is_well(rank: Rank, grid: tuple[int, int]) -> list[list[int]]:
    return [t.all_gather(torch.tensor([rank.rank])).tolist() for t in transports(rank, grid)]


def expect_failures(first: object, others: list[object], waits: dict[int, tuple[str, str]]) -> None:
    """Rank 0's own error, and on each other rank one that names the group and operation in which it waited."""
    assert isinstance(first, ValueError)
    for rank, error in enumerate(others, start=1):
        assert isinstance(error, TransportError), error
        assert (error.group, error.operation) == waits[rank]
        group, operation = waits[rank]
        assert str(error).startswith(f"{operation} on group '{group}' failed on rank {error.rank}: ")


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_threads_that_wait_for_a_failed_rank_fail_at_once_and_the_pool_works_again(pools, num_ranks, operation):
    pool = pools("threaded", num_ranks)
    for grid, group in (((num_ranks, 1), "tp"), ((1, num_ranks), "dp"), ((1, num_ranks), "ep")):
        started = time.monotonic()
        first, *others = pool.outcomes(one_rank_raises, grid, group, operation)
        assert time.monotonic() - started < 10
        expect_failures(first, others, dict.fromkeys(range(1, num_ranks), (group, operation)))
        assert [error.rank for error in others] == list(range(1, num_ranks))
        assert [gathered[-1] for gathered in pool.run(all_is_well, grid)] == [list(range(num_ranks))] * num_ranks


def fails_after_a_while(rank: Rank) -> None:
    if rank.rank == 0:
        raise ValueError("before the others have opened their groups")
    time.sleep(0.2)
    *_, t = transports(rank, (2, 1))
    t.barrier()


def test_threads_that_open_a_group_after_a_rank_has_failed_fail_at_once_too(pools):
    started = time.monotonic()
    first, second = pools("threaded", 2).outcomes(fails_after_a_while)
    assert time.monotonic() - started < 10
    assert isinstance(first, ValueError)
    assert isinstance(second, TransportError)


SHORT_TIMEOUT = 5.0  # seconds; ranks must also start within it of one another
WAITS = {1: ("tp", "all_gather"), 2: ("dp", "reduce_scatter"), 3: ("ep", "all_reduce")}  # each in a group with rank 0


def waits_for_rank_0(rank: Rank) -> None:
    groups = rank.groups(tp_size=2, dp_size=2)
    groups.ep.barrier()
    if rank.rank == 0:
        raise ValueError("rank 0 has a fault of its own")
    group, operation = WAITS[rank.rank]
    OPERATIONS[operation](getattr(groups, group))


@pytest.mark.timeout(120)  # not the ten minutes of the settings: a group that keeps waiting is what this looks for
def test_processes_that_wait_for_a_failed_rank_fail_in_time_and_the_pool_works_again():
    with ProcessRankPool(4, timeout=SHORT_TIMEOUT, start_method="forkserver") as pool:
        pool.run(all_is_well, (2, 2))  # started
        started = time.monotonic()
        first, *others = pool.outcomes(waits_for_rank_0)
        assert time.monotonic() - started < SHORT_TIMEOUT + 10
        expect_failures(first, others, WAITS)
        assert [gathered[-1] for gathered in pool.run(all_is_well, (2, 2))] == [[0, 1, 2, 3]] * 4


def one_process_ends(rank: Rank) -> None:
    *_, t = transports(rank, (2, 1))
    t.barrier()
    if rank.rank == 1:
        raise SystemExit(3)
    t.all_gather(torch.ones(2))


def test_a_rank_whose_process_ends_is_named_with_its_exit_code(pools):
    waiting, ended = pools("gloo", 2).outcomes(one_process_ends)
    assert isinstance(waiting, TransportError)
    assert (waiting.group, waiting.operation) == ("ep", "all_gather")
    assert isinstance(ended, TransportError)
    assert "rank 1: the rank's process ended with exit code 3" in str(ended)
    assert pools("gloo", 2).run(all_is_well, (2, 1)) == [[[0, 1], [0], [0, 1]], [[0, 1], [1], [0, 1]]]


class TwoPartError(Exception):
    """Pickles, but cannot be made again from its args."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} in {where}")


def raises_what_does_not_travel(rank: Rank) -> str:
    if rank.rank == 0:
        raise TwoPartError("a fault", "a rank")
    return "of the first run"


@on_all_transports
def test_an_error_of_any_kind_is_reported_and_the_next_run_gets_its_own_results(pools, kind):
    with pytest.raises(Exception, match="a fault in a rank"):
        pools(kind, 2).run(raises_what_does_not_travel)
    assert pools(kind, 2).run(echo) == [(0, 2), (1, 2)]


def all_but_the_last_meet(rank: Rank) -> None:
    *_, t = transports(rank, (3, 1))
    if t.rank < 2:
        t.all_reduce(torch.ones(1))


def test_threads_name_the_rank_that_never_came():
    with ThreadRankPool(3, timeout=0.3) as pool:
        *waiting, absent = pool.outcomes(all_but_the_last_meet)
    assert absent is None
    for rank, error in enumerate(waiting):
        assert str(error) == (
            f"all_reduce on group 'ep' failed on rank {rank}: ranks [2] failed, or did not come within 0.3 s"
        )


def ranks_differ(rank: Rank, own_operations: list[str]) -> None:
    *_, t = transports(rank, (len(own_operations), 1))
    t.barrier()
    OPERATIONS[own_operations[t.rank]](t)


@pytest.mark.parametrize(
    "operations",
    [["all_gather", "all_reduce"], ["all_gather", "all_gather", "barrier"], ["broadcast", "all_to_all", "barrier"]],
)
def test_threads_in_different_collectives_get_an_error_that_names_them(pools, operations):
    for rank, error in enumerate(pools("threaded", len(operations)).outcomes(ranks_differ, operations)):
        assert isinstance(error, TransportError)
        assert (error.operation, error.rank) == (operations[rank], rank)
        assert f"ranks are in different collectives: {operations}" in str(error)


def sizes_differ(rank: Rank, operation: str) -> None:
    *_, t = transports(rank, (2, 1))
    if operation == "all_gather":
        t.all_gather(torch.ones(1 + t.rank))  # each thinks that the other brings as many
    else:
        t.all_to_all(torch.ones(3), [1, 2], [1, 1] if t.rank == 0 else [1, 2])


@pytest.mark.parametrize("operation", ["all_gather", "all_to_all"])
def test_threads_that_bring_other_sizes_than_agreed_get_an_error_not_wrong_rows(pools, operation):
    outcomes = pools("threaded", 2).outcomes(sizes_differ, operation)
    assert all(isinstance(error, TransportError) for error in outcomes)
    assert any(re.search(r"ranks sent \[.*\] rows where \[.*\] were expected", str(error)) for error in outcomes)


def announces(rank: Rank, rows: int) -> None:
    """Rank 1 tells rank 0 a count that cannot be, past its own checks."""
    *_, t = transports(rank, (2, 1))
    exchange = t.exchange_tokens_start if t.rank == 0 else t._exchange_tokens
    exchange([torch.ones(1, 1)], torch.tensor([rows, 1] if t.rank == 1 else [0, 1]))


@pytest.mark.parametrize("rows", [-1, 2**31])
def test_counts_that_cannot_be_are_refused_before_anything_is_allocated(pools, rows):
    told, _ = pools("threaded", 2).outcomes(announces, rows)
    assert isinstance(told, TransportError)
    assert f"the ranks announce [0, {rows}] rows, which is impossible" in str(told)


def facts_of(rank: Rank) -> SymmetricFacts:
    return gather_facts(rank.groups(tp_size=1, dp_size=rank.num_ranks, counter=CollectiveCounter()).ep)


def test_ranks_learn_each_others_place_and_devices(pools):
    devices = torch.cuda.device_count()
    facts = pools("gloo", 2).run(facts_of)
    assert facts[0] == facts[1]
    assert (facts[0].num_ranks, facts[0].num_hosts, facts[0].cuda) == (2, 1, False), (
        "both are on the first device, or on none"
    )
    assert facts[0].triton == (importlib.util.find_spec("triton") is not None)
    assert facts[0].peer_access == (devices > 0)


def sends_something_else(rank: Rank, sent: list[torch.Tensor]) -> None:
    *_, t = transports(rank, (2, 1))
    sends = [SendRecv(1, x, is_send=True) for x in sent]
    t.send_recv(sends if t.rank == 0 else [SendRecv(0, torch.zeros(2), is_send=False)])


@pytest.mark.parametrize(
    ("sent", "what"),
    [
        ([], "nothing"),
        ([torch.zeros(2, dtype=torch.int32)], "torch.int32 (2,)"),
        ([torch.zeros(1, 2)], "torch.float32 (1, 2)"),
    ],
    ids=["nothing", "dtype", "shape"],
)
def test_threads_that_are_sent_something_else_say_what(pools, sent, what):
    _, error = pools("threaded", 2).outcomes(sends_something_else, sent)
    assert str(error) == f"send_recv on group 'ep' failed on rank 1: rank 0 sent {what}, not torch.float32 (2,)"


def brings_other_rows(rank: Rank, operation: str) -> None:
    *_, t = transports(rank, (2, 1))
    x = torch.zeros(2, 3, dtype=(torch.float32, torch.int32)[t.rank])
    t.all_gather(x) if operation == "all_gather" else t.all_to_all(x, [1, 1], [1, 1])


@pytest.mark.parametrize("operation", ["all_gather", "all_to_all"])
def test_threads_that_bring_rows_of_another_dtype_get_an_error(pools, operation):
    for error in pools("threaded", 2).outcomes(brings_other_rows, operation):
        assert isinstance(error, TransportError)
        assert "ranks brought rows of different dtype or shape: [" in str(error)


def fails_on(rank: Rank, failing: int) -> None:
    *_, t = transports(rank, (3, 1))
    if t.rank == failing:
        raise KeyError("its own fault")
    t.barrier()


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_run_raises_the_fault_itself_not_the_time_outs_that_it_caused(pools, failing):
    with pytest.raises(KeyError, match="its own fault"):
        pools("threaded", 3).run(fails_on, failing)


def echo(rank: Rank, *arguments) -> tuple:
    return rank.rank, rank.num_ranks, *arguments


@on_all_transports
def test_results_come_back_in_rank_order(pools, kind):
    assert pools(kind, 3).run(echo, "a", 1) == [(rank, 3, "a", 1) for rank in range(3)]


@pytest.mark.parametrize("name", sorted(TRANSPORTS.keys() - {"hccl"}))
def test_the_tables_rows_are_transports(name):
    assert issubclass(transport_class(name), Transport)


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="torch_npu is here: tests/emulated")
def test_hccl_without_torch_npu_says_what_it_needs():
    with pytest.raises(UnsupportedConfigError, match="NPU tensors need torch_npu, and importing it fails"):
        transport_class("hccl")
    with (
        ProcessRankPool(2, transport="hccl", start_method="forkserver") as pool,
        pytest.raises(UnsupportedConfigError, match="need torch_npu"),
    ):
        pool.run(echo)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_nccl_without_gpus_says_what_it_needs():
    with (
        ProcessRankPool(2, transport="nccl", start_method="forkserver") as pool,
        pytest.raises(UnsupportedConfigError, match="needs a cuda device for each rank, and torch sees 0"),
    ):
        pool.run(echo)


@pytest.mark.parametrize("name", ["threaded", "none such"])
def test_a_transport_that_is_not_between_processes_is_refused(name):
    with (
        ProcessRankPool(2, transport=name, start_method="forkserver") as pool,
        pytest.raises(UnsupportedConfigError, match=name),
    ):
        pool.run(echo)


def reaches_all_three(rank: Rank) -> list[str]:
    """The groups whose transports are told what Groups is told, on a grid where no two are alike."""
    groups = rank.groups(tp_size=2, dp_size=1)
    told: list[str] = []
    for t in (groups.tp, groups.dp, groups.ep):
        t.watch = lambda watchdog, name=t.group: told.append(f"watch {name} {watchdog}")
        t.close = lambda name=t.group: told.append(f"close {name}")
    groups.watch("it")
    groups.close()
    return told


def test_all_three_groups_are_watched_and_closed(pools):
    expected = ["watch tp it", "watch dp it", "watch ep it", "close tp", "close dp", "close ep"]
    assert pools("threaded", 2).run(reaches_all_three) == [expected] * 2
