"""The state of each rank at one look. Pure functions: the caller gives traces, or samples of /metrics, and the time."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vllm_npu.trust.trace import RankTrace
from vllm_npu.trust.trace_comparison import Kind, compare

LATE_SECONDS = 1.0  # a rank that others wait for is late from here on: a running engine has short waits all the time


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRow:
    """One rank. None: the source does not say."""

    rank: int
    strategy: str  # of the last step
    step: int | None  # number of the last step
    tokens: float | None  # a second, since the look before this one
    sent_bytes: float | None  # a second, since the look before this one
    call: str  # the collective that the rank is in, or was in last
    waiting_seconds: float | None  # how long the rank has been in that collective; None: it is in none, or unknown
    late_seconds: float | None  # how long others have been waiting for the rank; None: nobody does
    epoch: int | None  # failures that the ranks have survived


@dataclass(frozen=True, slots=True)
class Sample:
    """The series of this package at one look at /metrics, by rank and strategy."""

    seconds: float  # of a clock that only grows
    steps: Mapping[tuple[int, str], float]
    tokens: Mapping[tuple[int, str], float] = field(default_factory=dict)
    sent_bytes: Mapping[tuple[int, str], float] = field(default_factory=dict)


def rows_of_traces(traces: Sequence[RankTrace], now: float) -> list[RankRow]:
    """A row for each trace. `now`: seconds of the host's clock since 1970."""
    present = _of_the_present_epoch(traces)
    waits = {
        trace.rank: now - trace.calls[-1].began / 1e6 for trace in present if trace.calls and not trace.calls[-1].done
    }
    late = _late(present, waits)
    return [_row_of_trace(trace, waits.get(trace.rank), late.get(trace.rank)) for trace in present]


def _of_the_present_epoch(traces: Sequence[RankTrace]) -> list[RankTrace]:
    """Without the calls that a failure of an earlier epoch left open: nobody waits in them any more."""
    kept = []
    for trace in sorted(traces, key=lambda each: each.rank):
        epoch = max((call.group.epoch for call in trace.calls), default=0)
        calls = tuple(call for call in trace.calls if call.done or call.group.epoch == epoch)
        kept.append(
            RankTrace(rank=trace.rank, calls=calls, process=trace.process, host=trace.host, world_size=trace.world_size)
        )
    return kept


def _late(traces: Sequence[RankTrace], waits: Mapping[int, float]) -> dict[int, float]:
    """How long others have been waiting for each rank that they wait for."""
    late: dict[int, float] = {}
    for finding in compare(traces):
        if finding.kind is not Kind.WAITING:
            continue
        waiting = [
            waits[trace.rank]
            for trace in traces
            if trace.rank in waits and trace.calls[-1].group == finding.group and trace.rank not in finding.ranks
        ]
        seconds = max(waiting, default=0.0)
        for rank in finding.ranks if seconds > LATE_SECONDS else ():
            late[rank] = max(late.get(rank, 0.0), seconds)
    return late


def _row_of_trace(trace: RankTrace, waiting: float | None, late: float | None) -> RankRow:
    last = trace.calls[-1] if trace.calls else None
    return RankRow(
        rank=trace.rank,
        strategy="" if last is None else last.strategy,
        step=None if last is None else last.step,
        tokens=None,
        sent_bytes=None,
        call="" if last is None else f"{last.operation} on {last.group}",
        waiting_seconds=waiting,
        late_seconds=late,
        epoch=None if last is None else last.group.epoch,
    )


def rows_of_samples(samples: Sequence[Sample]) -> list[RankRow]:
    """A row for each rank of the last sample. The samples are those of all looks so far, the oldest first.

    All ranks step together, so a rank that has taken fewer steps than another is late, and the ranks with the most steps wait.
    """
    last = samples[-1]
    before = samples[-2] if len(samples) > 1 else None
    steps = _by_rank(last.steps)
    most = max(steps.values(), default=0.0)
    all_equal = min(steps.values(), default=0.0) == most
    rows = []
    for rank in sorted(steps):
        still_for = last.seconds - _since(samples, rank)
        is_behind = steps[rank] < most and still_for > LATE_SECONDS
        rows.append(
            RankRow(
                rank=rank,
                strategy=_last_strategy(samples, rank),
                step=round(steps[rank]),
                tokens=_rate(before, last, "tokens", rank),
                sent_bytes=_rate(before, last, "sent_bytes", rank),
                call="",
                waiting_seconds=still_for if not all_equal and not is_behind and still_for > LATE_SECONDS else None,
                late_seconds=still_for if is_behind else None,
                epoch=None,
            )
        )
    return rows


def _by_rank(series: Mapping[tuple[int, str], float]) -> Counter[int]:
    total: Counter[int] = Counter()
    for (rank, _), value in series.items():
        total[rank] += value  # type: ignore[assignment]
    return total


def _since(samples: Sequence[Sample], rank: int) -> float:
    """When the rank's present number of steps was first seen."""
    steps = _by_rank(samples[-1].steps)[rank]
    first = samples[-1].seconds
    for sample in reversed(samples):
        if _by_rank(sample.steps)[rank] != steps:
            break
        first = sample.seconds
    return first


def _last_strategy(samples: Sequence[Sample], rank: int) -> str:
    """The strategy whose steps grew last, or the one with the most steps if none grew."""
    last = {strategy: steps for (other, strategy), steps in samples[-1].steps.items() if other == rank}
    for older in reversed(samples[:-1]):
        grown = [strategy for strategy, steps in last.items() if steps > older.steps.get((rank, strategy), 0.0)]
        if grown:
            return max(grown, key=lambda strategy: last[strategy] - older.steps.get((rank, strategy), 0.0))
    return max(last, key=lambda strategy: last[strategy], default="")


def _rate(before: Sample | None, last: Sample, series: str, rank: int) -> float | None:
    """Growth a second between two samples. None: there is one sample only, or the rank does not count this."""
    now = _by_rank(getattr(last, series))
    if before is None or rank not in now or last.seconds <= before.seconds:
        return None
    return max(0.0, now[rank] - _by_rank(getattr(before, series))[rank]) / (last.seconds - before.seconds)
