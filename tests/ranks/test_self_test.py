"""The start-up self-test: silent on honest transports, and no lie of a collective passes it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch

from tests.time_limits import on_this_machine
from vllm_npu.core.token_layout import offsets
from vllm_npu.errors import LyingCollectiveError, UnsupportedConfigError
from vllm_npu.tools.launch import Rank
from vllm_npu.transport.base import SendRecv, Transport
from vllm_npu.trust.self_test import MODES, OFF, QUICK, run_self_test


@dataclass
class Call:
    """One honest call, as a lie sees it."""

    rank: int
    size: int
    x: torch.Tensor  # what this rank brought
    result: torch.Tensor
    blocks: list[int] | None  # rows of each rank in the result, where it has such
    sizes: list[int] | None  # rows of each rank that the call was told, where it is told any
    own: torch.Tensor  # of x, in the result's shape: this rank's part, or what comes closest
    of_last: torch.Tensor | None  # what the last rank adds to a sum
    previous: torch.Tensor | None  # the result of the last call of this shape
    number: int


def blocks_swapped(call: Call) -> torch.Tensor:
    if call.blocks is None:
        return call.result.flip(0)
    parts = list(call.result.split(call.blocks))
    return torch.cat(parts[1:] + parts[:1])


def stale(call: Call) -> torch.Tensor:
    return call.result if call.previous is None else call.previous


def with_row(call: Call, row: int, value: float) -> torch.Tensor:
    wrong = call.result.clone()
    wrong[row : (row + 1) or None] = value
    return wrong


def overwrite_input(call: Call) -> torch.Tensor:
    call.x.zero_()
    return call.result


LIES: dict[str, Callable[[Call], torch.Tensor]] = {
    "zeros": lambda call: torch.zeros_like(call.result),
    "never written": lambda call: torch.full_like(call.result, 77),
    "swapped ranks": blocks_swapped,
    "rows shifted by one": lambda call: call.result.roll(1, 0),
    "stale buffer": stale,
    "own rows in place of the others'": lambda call: call.own,
    "missing reduction": lambda call: call.result if call.of_last is None else call.own,
    "doubled reduction": lambda call: call.result if call.of_last is None else call.result * 2,
    "one rank left out of the sum": lambda call: call.result if call.of_last is None else call.result - call.of_last,
    "truncated tail": lambda call: with_row(call, -1, 0),
    "first row lost": lambda call: with_row(call, 0, 0),
    "last column lost": lambda call: torch.cat([call.result[:, :-1], torch.zeros_like(call.result[:, -1:])], 1),
    "low bits lost": lambda call: (call.result.double() / 4).round().mul(4).to(call.result.dtype),
    "another type": lambda call: call.result.double(),
    "a row too few": lambda call: call.result[:-1],
    "the caller's tensor overwritten": overwrite_input,
    "one rank alone gets zeros": lambda call: torch.zeros_like(call.result) if call.rank == 1 else call.result,
    "every second call": lambda call: torch.zeros_like(call.result) if call.number % 2 else call.result,
    "where a rank has no rows": lambda call: torch.zeros_like(call.result) if 0 in (call.sizes or ()) else call.result,
}
OPERATIONS = ("all_gather", "reduce_scatter", "all_to_all", "broadcast", "all_reduce", "send_recv")


class LyingTransport(Transport):
    """Lies in one operation, on all data with two columns or more: verdicts and exchanged sizes go through."""

    def __init__(self, inner: Transport, operation: str, lie: str) -> None:
        super().__init__(inner.group, inner.rank, inner.size)
        self._inner, self._operation, self._lie = inner, operation, LIES[lie]
        self._previous: dict[tuple[int, ...], torch.Tensor] = {}
        self._calls = 0
        self.told = False  # whether a lie differed from the truth

    def close(self) -> None:
        self._inner.close()

    def _tell(self, operation: str, x: torch.Tensor, result: torch.Tensor, **known) -> torch.Tensor:
        if operation != self._operation or x.ndim != 2 or x.shape[1] < 2 or x.shape[1] > 100:
            return result
        own = torch.zeros_like(result)
        own[: x.shape[0]] = x[: own.shape[0]]
        call = Call(self.rank, self.size, x, result, own=own, previous=self._previous.get(result.shape),
                    number=self._calls, **({"blocks": None, "sizes": None, "of_last": None} | known))  # fmt: skip
        brought = x.clone()
        wrong = self._lie(call)
        self._calls += 1
        self._previous[result.shape] = result.clone()
        self.told |= wrong.shape != result.shape or wrong.dtype != result.dtype or not torch.equal(wrong, result)
        self.told |= not torch.equal(brought, x)
        return wrong

    def _all_gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        return self._tell("all_gather", x, self._inner.all_gather(x, sizes), blocks=list(sizes), sizes=list(sizes))

    def _reduce_scatter(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        start = offsets(sizes)[self.rank]
        last = self._inner.broadcast(x, self.size - 1)[start : start + sizes[self.rank]]
        return self._tell("reduce_scatter", x, self._inner.reduce_scatter(x, sizes), of_last=last, sizes=list(sizes))

    def _all_to_all(self, x: torch.Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]) -> torch.Tensor:
        result = self._inner.all_to_all(x, send_sizes, recv_sizes)
        return self._tell("all_to_all", x, result, blocks=list(recv_sizes), sizes=list(recv_sizes))

    def _broadcast(self, x: torch.Tensor, source: int) -> torch.Tensor:
        return self._tell("broadcast", x, self._inner.broadcast(x, source))

    def _all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        last = self._inner.broadcast(x, self.size - 1)
        return self._tell("all_reduce", x, self._inner.all_reduce(x), of_last=last)

    def _send_recv(self, operations: Sequence[SendRecv]) -> None:
        self._inner.send_recv(operations)
        [sent], [received] = ([o.tensor for o in operations if o.is_send is is_send] for is_send in (True, False))
        wrong = self._tell("send_recv", sent, received.clone())
        if wrong.shape == received.shape:
            received.copy_(wrong)

    def _barrier(self) -> None:
        self._inner.barrier()


SUMS = ("reduce_scatter", "all_reduce")
# What cannot be: only sums are reduced, a receive keeps the caller's own tensor, and not all are told rows of each rank.
IMPOSSIBLE = {
    **{
        lie: set(OPERATIONS) - set(SUMS)
        for lie in ("missing reduction", "doubled reduction", "one rank left out of the sum")
    },
    "another type": {"send_recv"},
    "a row too few": {"send_recv"},
    "where a rank has no rows": {"broadcast", "all_reduce", "send_recv"},
}
GROUPS = ("tp", "dp", "ep", "vote")
MATRIX = [
    (GROUPS[number % len(GROUPS)], operation, lie)
    for number, (lie, operation) in enumerate(product(LIES, OPERATIONS))
    if operation not in IMPOSSIBLE.get(lie, ())
]


def refused(rank: Rank) -> list[tuple[tuple[str, str, str], bool, str]]:
    """For each lie: whether this rank's transport told one, and the self-test's error on this rank."""
    outcomes = []
    for group, operation, lie in MATRIX:
        groups, vote = rank.groups(tp_size=2, dp_size=2), rank.groups(tp_size=1, dp_size=4).ep
        liar = LyingTransport(vote if group == "vote" else getattr(groups, group), operation, lie)
        groups, vote = (groups, liar) if group == "vote" else (replace(groups, **{group: liar}), vote)
        text = ""
        try:
            run_self_test(groups, vote, rank.device)
        except LyingCollectiveError as error:
            text = str(error)
        outcomes.append(((group, operation, lie), liar.told, text))
    return outcomes


def test_every_lie_is_refused_by_name_on_every_rank(pools):
    assert len(LIES) >= 12
    for outcomes in zip(*pools("threaded", 4).run(refused), strict=True):
        (group, operation, lie), *_ = outcomes[0]
        assert any(told for _, told, _ in outcomes), f"{lie} of {operation} on {group} was never told"
        name = f"on group '{'ep' if group == 'vote' else group}' gives its rank"
        for *_, text in outcomes:
            assert name in text, (group, operation, lie, text)
            if operation not in ("all_gather", "all_to_all"):  # others are made of these two, and may be named first
                assert f": {operation} of " in text, (group, operation, lie, text)


class GathersZeros(LyingTransport):
    """Verdicts too do not come through."""

    def _tell(self, operation: str, x: torch.Tensor, result: torch.Tensor, **known) -> torch.Tensor:
        return torch.zeros_like(result) if operation == "all_gather" else result


def finds_out_alone(rank: Rank) -> list[str]:
    groups = rank.groups(tp_size=1, dp_size=2)
    with pytest.raises(LyingCollectiveError) as error:
        run_self_test(groups, GathersZeros(groups.ep, "all_gather", "zeros"), rank.device)
    return str(error.value).splitlines()[1:]


def test_a_rank_that_cannot_tell_the_others_refuses_by_itself(pools):
    for rank, faults in enumerate(pools("threaded", 2).run(finds_out_alone)):
        assert faults == [f"  rank {rank}: all_gather of int32 on group 'ep' gives its rank {rank} of 2 zeros"]


def honest(rank: Rank, mode: str) -> float:
    groups = rank.groups(tp_size=2, dp_size=2)
    seconds = run_self_test(groups, rank.groups(tp_size=1, dp_size=4).ep, rank.device, mode)
    return min(seconds, run_self_test(groups, rank.groups(tp_size=1, dp_size=4).ep, rank.device, mode))


@pytest.mark.parametrize("kind", ["threaded", "gloo"])
def test_honest_transports_pass_quickly(pools, kind):
    for mode in MODES:
        seconds = max(pools(kind, 4).run(honest, mode))
        print(f"self-test {mode} over {kind}, TP2xDP2: {seconds * 1e3:.0f} ms")
        assert seconds < on_this_machine({QUICK: 1, OFF: 0.01}.get(mode, 30))


def test_one_rank_and_an_unknown_mode(pools):
    def alone(rank: Rank) -> float:
        groups = rank.groups(tp_size=1, dp_size=1)
        with pytest.raises(UnsupportedConfigError, match="unknown self_test 'fast'; there are: quick, full, off"):
            run_self_test(groups, groups.ep, rank.device, "fast")
        return run_self_test(groups, groups.ep, rank.device)

    assert pools("threaded", 1).run(alone)[0] < 0.01
