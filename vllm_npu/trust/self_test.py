"""Start-up self-test: every collective of every group, on data whose result each rank knows. An error names wrong results."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from vllm_npu.errors import LyingCollectiveError, UnsupportedConfigError
from vllm_npu.transport.base import Groups, SendRecv, Transport, gather_texts

QUICK, FULL, OFF = "quick", "full", "off"
MODES = (QUICK, FULL, OFF)

WIDTH = 3  # columns
MOVED_DTYPES = {QUICK: (torch.int32,), FULL: (torch.int32, torch.bfloat16, torch.float32, torch.int64, torch.uint8)}
SUMMED_DTYPES = {
    QUICK: (torch.bfloat16, torch.float32),
    FULL: (torch.bfloat16, torch.float16, torch.float32, torch.int32),
}
# Factors of the row counts, one for each round: 1, and 1000 for messages that a transport sends in pieces. Each factor has two
# rounds with different data, so that a result that is left over in a buffer is found.
SCALES = {QUICK: (1, 1), FULL: (1, 1, 1000, 1000)}
LARGEST_EXACT_SUM = 256  # bfloat16 holds integers up to it exactly
VERDICT_BYTES = 512


@dataclass(frozen=True, slots=True)
class _Round:
    """Data of one round on one group. Values differ by rank, row, column and round."""

    transport: Transport
    device: torch.device
    number: int
    scale: int

    @property
    def size(self) -> int:
        return self.transport.size

    @property
    def rank(self) -> int:
        return self.transport.rank

    def uneven(self) -> list[int]:
        """Row counts of the ranks: odd numbers, and 0 for one rank."""
        rows = [(2 * ((rank + self.number) % 3) + 1) * self.scale for rank in range(self.size)]
        rows[self.number % self.size] = 0
        return rows

    def even(self) -> list[int]:
        """Equal row counts of the ranks."""
        return [5 * self.scale] * self.size

    def moved(self, rank: int, rows: int, dtype: torch.dtype, salt: int = 0) -> torch.Tensor:
        """Rows [rows, WIDTH] that `rank` sends, on the CPU. Values are never 0, and exact in every dtype."""
        cell = torch.arange(rows * WIDTH).view(rows, WIDTH) * 3
        return ((cell + 31 * rank + 101 * self.number + 57 * salt) % 251 + 1).to(dtype)

    def summed(self, rank: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
        """Small integers [rows, WIDTH] of `rank`. Their sum over up to LARGEST_EXACT_SUM ranks is exact in every dtype."""
        most = max(1, min(60, LARGEST_EXACT_SUM // self.size))
        cell = torch.arange(rows * WIDTH).view(rows, WIDTH)
        return ((cell + 7 * rank + 5 * self.number) % most + 1).to(dtype)

    def sum(self, rows: int, dtype: torch.dtype) -> torch.Tensor:
        """The sum of summed() over the ranks."""
        return torch.stack([self.summed(rank, rows, dtype).double() for rank in range(self.size)]).sum(0).to(dtype)

    def gathered(self, sizes: Sequence[int], dtype: torch.dtype, salt: int = 0) -> torch.Tensor:
        """The rows of all ranks, in rank order."""
        return torch.cat([self.moved(rank, rows, dtype, salt) for rank, rows in enumerate(sizes)])

    def matrix(self) -> list[list[int]]:
        """Row counts [sender][receiver] of an all-to-all: 0 to 3, and one rank that sends nothing."""
        rows = [
            [(sender + 2 * to + self.number) % 4 * self.scale for to in range(self.size)] for sender in range(self.size)
        ]
        rows[self.number % self.size] = [0] * self.size
        return rows

    def outgoing(self, sender: int, dtype: torch.dtype, salt: int = 0) -> torch.Tensor:
        """Rows that `sender` sends to all ranks, in rank order."""
        parts = [
            self.moved(sender * self.size + to, rows, dtype, salt) for to, rows in enumerate(self.matrix()[sender])
        ]
        return torch.cat(parts)

    def incoming(self, dtype: torch.dtype, salt: int = 0) -> torch.Tensor:
        """Rows that this rank receives from all ranks, in rank order."""
        column = [row[self.rank] for row in self.matrix()]
        parts = [self.moved(sender * self.size + self.rank, rows, dtype, salt) for sender, rows in enumerate(column)]
        return torch.cat(parts)


@dataclass(frozen=True, slots=True)
class _Answer:
    """Tensors that one call returned, each with its expected value."""

    operation: str
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]


def _gathering(round_: _Round, dtype: torch.dtype) -> Iterator[_Answer]:
    t, rank, on = round_.transport, round_.rank, round_.device
    for sizes in (round_.even(), round_.uneven()):
        x = round_.moved(rank, sizes[rank], dtype).to(on)
        yield _Answer("all_gather", [(t.all_gather(x, sizes), round_.gathered(sizes, dtype)), _kept(round_, x, dtype)])
    sizes = round_.uneven()
    dtypes = dtype, torch.float32
    tensors = [round_.moved(rank, sizes[rank], each, salt).to(on) for salt, each in enumerate(dtypes)]
    expected = [round_.gathered(sizes, each, salt) for salt, each in enumerate(dtypes)]
    yield _Answer("gather_tokens", list(zip(t.gather_tokens(tensors, sizes), expected, strict=True)))
    for source in {0, round_.number % round_.size, round_.size - 1}:
        x = round_.moved(rank, 7, dtype, source).to(on)
        result = t.broadcast(x, source)
        yield _Answer(
            "broadcast", [(result, round_.moved(source, 7, dtype, source)), (x, round_.moved(rank, 7, dtype, source))]
        )


def _exchanging(round_: _Round, dtype: torch.dtype) -> Iterator[_Answer]:
    t, rank, on = round_.transport, round_.rank, round_.device
    dtypes = dtype, torch.float32
    matrix = round_.matrix()
    send, receive = matrix[rank], [row[rank] for row in matrix]
    unchanged = [round_.outgoing(rank, dtype, salt) for salt in (0, 1)]
    x, started = (each.to(on, copy=True) for each in unchanged)
    yield _Answer("all_to_all", [(t.all_to_all(x, send, receive), round_.incoming(dtype)), (x, unchanged[0])])
    pending = t.all_to_all_start(started, send, receive)
    yield _Answer("all_to_all_start", [(pending.finish(), round_.incoming(dtype, 1)), (started, unchanged[1])])
    tensors = [round_.outgoing(rank, each, salt).to(on) for salt, each in enumerate(dtypes)]
    received, sent_rows, received_rows = t.exchange_tokens(tensors, torch.tensor(send, device=on))
    expected = [round_.incoming(each, salt) for salt, each in enumerate(dtypes)]
    rows = torch.tensor([sent_rows, received_rows]), torch.tensor([send, receive])
    yield _Answer("exchange_tokens", [rows, *zip(received, expected, strict=True)])
    after, before = (rank + 1) % round_.size, (rank - 1) % round_.size
    received_row = torch.zeros(7, WIDTH, dtype=dtype, device=on)
    x = round_.moved(rank, 7, dtype).to(on)
    t.send_recv([SendRecv(after, x, is_send=True), SendRecv(before, received_row, is_send=False)])
    yield _Answer("send_recv", [(received_row, round_.moved(before, 7, dtype)), _kept(round_, x, dtype)])


def _kept(round_: _Round, x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A caller's tensor after a call, and its value before the call. The call must not write it."""
    return x, round_.moved(round_.rank, x.shape[0], dtype)


def _summing(round_: _Round, dtype: torch.dtype) -> Iterator[_Answer]:
    t, rank, on = round_.transport, round_.rank, round_.device
    rows = 7 * round_.scale
    x = round_.summed(rank, rows, dtype).to(on)
    yield _Answer("all_reduce", [(t.all_reduce(x), round_.sum(rows, dtype)), (x, round_.summed(rank, rows, dtype))])
    for sizes in (round_.even(), round_.uneven()):
        rows, start = sum(sizes), sum(sizes[:rank])
        x = round_.summed(rank, rows, dtype).to(on)
        own = round_.sum(rows, dtype)[start : start + sizes[rank]]
        yield _Answer("reduce_scatter", [(t.reduce_scatter(x, sizes), own), (x, round_.summed(rank, rows, dtype))])


def _fault(transport: Transport, answer: _Answer, dtype: torch.dtype) -> str | None:
    for got, expected in answer.pairs:
        what = _what_is_wrong(got.cpu(), expected)
        if what is not None:
            return (
                f"{answer.operation} of {str(dtype).removeprefix('torch.')} on group '{transport.group}' gives its rank "
                f"{transport.rank} of {transport.size} {what}"
            )
    return None


def _what_is_wrong(got: torch.Tensor, expected: torch.Tensor) -> str | None:
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return f"{got.dtype} {list(got.shape)} for {expected.dtype} {list(expected.shape)}"
    if torch.equal(got, expected):
        return None
    if not bool(got.count_nonzero()):
        return "zeros"
    row, column = (got != expected).nonzero()[0].tolist()
    return f"{got[row, column].item():g} for {expected[row, column].item():g} in row {row} of {expected.shape[0]}"


def faults_of(transport: Transport, device: torch.device, mode: str, exchanges: bool = True) -> list[str]:
    """Test one group, and return the faults that this rank finds. COLLECTIVE over the group. Host sync: yes. Graph capture:
    no."""
    faults = []
    kinds: tuple[tuple[Callable[[_Round, torch.dtype], Iterator[_Answer]], tuple[torch.dtype, ...]], ...] = (
        (_gathering, MOVED_DTYPES[mode]),
        (_exchanging, MOVED_DTYPES[mode] if exchanges else ()),
        (_summing, SUMMED_DTYPES[mode]),
    )
    for number, scale in enumerate(SCALES[mode]):
        for answers, dtypes in kinds:
            for dtype in dtypes:
                for answer in answers(_Round(transport, device, number, scale), dtype):
                    fault = _fault(transport, answer, dtype)
                    faults += [fault] if fault else []
    transport.barrier()
    return faults


def run_self_test(
    groups: Groups, vote: Transport, device: torch.device, mode: str = QUICK, exchanges: bool = True
) -> float:
    """Test all groups, and return the time in seconds.

    COLLECTIVE over each group and the whole grid. `vote`: a CPU group over the grid. It is tested first, and then ranks
    exchange their faults over it. `exchanges`: whether the device has all-to-alls and sends to single ranks. Host sync: yes.
    Graph capture: no. Raises LyingCollectiveError on every rank if any rank got wrong data. If `vote` itself is wrong, at
    least the rank with the wrong data raises. Raises UnsupportedConfigError for an unknown mode.
    """
    if mode not in MODES:
        raise UnsupportedConfigError(f"unknown self_test {mode!r}; there are: {', '.join(MODES)}")
    started = time.perf_counter()
    if mode != OFF and vote.size > 1:
        found = faults_of(vote, torch.device("cpu"), mode)
        for transport in (groups.tp, groups.dp, groups.ep):
            found += faults_of(transport, device, mode, exchanges) if transport.size > 1 else []
        verdicts = {
            rank: text for rank, text in enumerate(gather_texts(vote, "".join(found[:1]), VERDICT_BYTES)) if text
        }
        verdicts |= {vote.rank: found[0]} if found else {}
        if verdicts:
            raise LyingCollectiveError(_refusal(verdicts))
    return time.perf_counter() - started


def _refusal(faults: dict[int, str]) -> str:
    lines = [f"  rank {rank}: {fault}" for rank, fault in faults.items()]
    return "\n".join(
        [
            "a collective gives wrong data in the start-up self-test; do not serve with it: look for another version of the "
            "communication library or driver, or choose a strategy that does not call it and set self_test to off:",
            *lines,
        ]
    )
