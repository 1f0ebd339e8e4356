"""A timeline of the ranks' traces, in the format that Perfetto and chrome://tracing open.

Pure functions. Standard library only, as trace.py.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from vllm_npu.trust.trace import PEER_TO_PEER, Call, RankTrace

STILL_RUNNING = "NOT ENDED"
RED = "terrible"  # a colour of chrome://tracing; Perfetto has one for each name


def timeline(traces: Sequence[RankTrace]) -> dict[str, Any]:
    """The calls of the ranks: a process for each rank, a thread for each of its groups, and arrows from the first call of a
    collective to the others. A call that has not ended lasts until the last time in the traces. LOCAL; pure.

    Times are those of each host's clock.
    """
    calls = [(trace, call) for trace in traces for call in trace.calls]
    end = max((max(call.began, call.ended) for _, call in calls), default=0)
    threads = {group: number for number, group in enumerate(sorted({str(call.group) for _, call in calls}))}
    return {"traceEvents": [*_names(traces, threads), *_calls(calls, threads, end), *_arrows(calls, threads)]}


def _names(traces: Sequence[RankTrace], threads: dict[str, int]) -> Iterator[dict[str, Any]]:
    for trace in traces:
        host = f" on {trace.host}" if trace.host else ""
        yield _event("M", trace.rank, 0, name="process_name", args={"name": f"rank {trace.rank}{host}"})
        yield _event("M", trace.rank, 0, name="process_sort_index", args={"sort_index": trace.rank})
        for group in sorted({str(call.group) for call in trace.calls}):
            yield _event("M", trace.rank, threads[group], name="thread_name", args={"name": group})


def _calls(calls: Sequence[tuple[RankTrace, Call]], threads: dict[str, int], end: int) -> Iterator[dict[str, Any]]:
    for trace, call in calls:
        running = {} if call.done else {"cname": RED}
        yield _event(
            "X",
            trace.rank,
            threads[str(call.group)],
            name=call.operation if call.done else f"{STILL_RUNNING} {call.operation}",
            cat=call.strategy or "-",
            ts=call.began,
            dur=max((call.ended if call.done else end) - call.began, 1),
            args={"call": str(call), "number on the group": call.number},
            **running,
        )


def _arrows(calls: Sequence[tuple[RankTrace, Call]], threads: dict[str, int]) -> Iterator[dict[str, Any]]:
    meetings: dict[Any, list[tuple[RankTrace, Call]]] = {}
    for trace, call in calls:
        if call.operation not in PEER_TO_PEER:
            meetings.setdefault(call.meeting, []).append((trace, call))
    for number, met in enumerate(meetings.values()):
        (first, call), *others = sorted(met, key=lambda each: (each[1].began, each[0].rank))
        for trace, other in others:
            shared = {"name": "collective", "cat": "collective", "id": f"{number}.{trace.rank}"}
            yield _event("s", first.rank, threads[str(call.group)], ts=call.began, **shared)
            yield _event("f", trace.rank, threads[str(other.group)], ts=other.began, bp="e", **shared)


def _event(phase: str, rank: int, thread: int, **values: Any) -> dict[str, Any]:
    return {"ph": phase, "pid": rank, "tid": thread, **values}
