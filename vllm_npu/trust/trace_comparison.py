"""Comparison of the traces of ranks: the first different call, groups used in different orders, and missing ranks.

Pure functions. Standard library only, as trace.py.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

from vllm_npu.errors import InvalidInputError
from vllm_npu.trust.trace import PEER_TO_PEER, Call, Group, RankTrace


class Kind(Enum):
    """Kind of a finding of compare()."""

    DIFFERENCE = "different calls"
    ORDER = "different order of groups"
    WAITING = "ranks that did not come"


@dataclass(frozen=True, slots=True)
class TraceDifference:
    """One fault between the traces of ranks."""

    kind: Kind
    ranks: tuple[int, ...]  # DIFFERENCE, ORDER: ranks involved; WAITING: ranks that did not come
    text: str
    group: Group


def compare(traces: Sequence[RankTrace]) -> list[TraceDifference]:
    """Find what is wrong between these ranks. LOCAL; pure. Traces of ranks may be missing, and traces may begin late.

    Order of the findings: the first different call of each group, the earliest first; groups used in different orders; ranks
    that other ranks wait for. Raises InvalidInputError for two traces of one rank.
    """
    by_rank = {trace.rank: trace for trace in traces}
    if len(by_rank) < len(traces):
        raise InvalidInputError(
            f"several traces of one rank: {sorted(trace.rank for trace in traces)}; give one for each rank"
        )
    return [*_differences(by_rank), *_orders(by_rank), *_waits(by_rank)]


def _compared(trace: RankTrace) -> list[Call]:
    return [call for call in trace.calls if call.operation not in PEER_TO_PEER]


def _meetings(traces: Mapping[int, RankTrace]) -> dict[tuple[Group, int], dict[int, Call]]:
    """The calls of each collective, by rank."""
    meetings: dict[tuple[Group, int], dict[int, Call]] = defaultdict(dict)
    for rank, trace in sorted(traces.items()):
        for call in _compared(trace):
            meetings[call.meeting][rank] = call
    return meetings


def _differences(traces: Mapping[int, RankTrace]) -> list[TraceDifference]:
    """The first different call of each group, the earliest first."""
    first: dict[Group, tuple[tuple[int, ...], TraceDifference]] = {}
    for (group, number), calls in _meetings(traces).items():
        when = (number, min(call.index for call in calls.values()))
        if group in first and first[group][0] <= when:
            continue
        text = _difference(group, calls)
        if text is not None:
            head = f"call {number} on group {group}: {text}"
            first[group] = when, TraceDifference(Kind.DIFFERENCE, tuple(sorted(calls)), head, group)
    return [finding for _, finding in sorted(first.values(), key=lambda found: found[0][1])]


def _difference(group: Group, calls: Mapping[int, Call]) -> str | None:
    alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for rank, call in calls.items():
        alike[call.must_be_equal].append(rank)
    if len(alike) > 1:
        lines = [f"ranks {ranks}: {calls[ranks[0]]}" for ranks in alike.values()]
        return "\n  ".join(["ranks make different calls", *lines])
    for sender, sent in calls.items():
        for receiver, received in calls.items():
            if not sent.sent or not received.received or sent.sent[0] < 0 or received.received[0] < 0:
                continue
            rows = sent.sent[group.members.index(receiver)]
            expected = received.received[group.members.index(sender)]
            if rows != expected:
                return (
                    f"rank {sender} sends {rows} rows to rank {receiver}, which expects {expected}"
                    f"\n  rank {sender}: {sent}\n  rank {receiver}: {received}"
                )
    return None


def _orders(traces: Mapping[int, RankTrace]) -> list[TraceDifference]:
    """Find a cycle: rank a makes call x before call y, rank b makes y before z, and so on, and some rank makes the last call
    before x. If calls wait for earlier calls, as calls on one stream do, none of these ranks can continue."""
    after: dict[tuple[Group, int], dict[tuple[Group, int], int]] = defaultdict(dict)
    when: dict[tuple[Group, int], int] = {}
    for rank, trace in sorted(traces.items()):
        calls = _compared(trace)
        for call in calls:
            when[call.meeting] = min(when.get(call.meeting, call.index), call.index)
        for one, following in pairwise(calls):
            after[one.meeting].setdefault(following.meeting, rank)
    for group, number, _, late in _unmet(traces):
        for rank in late:
            last = traces[rank].calls[-1:]
            if last and not last[0].done and last[0].operation not in PEER_TO_PEER:
                # The rank is inside its last call, and makes the call of `number` later.
                when.setdefault((group, number), last[0].index)
                after[last[0].meeting].setdefault((group, number), rank)
    on_cycles = _without_ends(after)
    for start in sorted(on_cycles, key=lambda meeting: (when[meeting], str(meeting[0]))):
        cycle = _shortest_cycle(start, after, on_cycles)
        if cycle:
            return [_order_difference(cycle, after, traces)]
    return []


def _without_ends(after: Mapping[tuple[Group, int], Mapping[tuple[Group, int], int]]) -> set[tuple[Group, int]]:
    """The meetings that are on cycles or between two cycles: all others are removed, first those before all cycles, then
    those after all cycles."""
    left = set(after) | {following for each in after.values() for following in each}
    edges = [(one, following) for one, each in after.items() for following in each]
    for from_, to in ((0, 1), (1, 0)):
        incoming = Counter(edge[to] for edge in edges if edge[0] in left and edge[1] in left)
        outgoing: dict[tuple[Group, int], list[tuple[Group, int]]] = defaultdict(list)
        for edge in edges:
            if edge[0] in left and edge[1] in left:
                outgoing[edge[from_]].append(edge[to])
        free = deque(meeting for meeting in left if not incoming[meeting])
        while free:
            meeting = free.popleft()
            left.discard(meeting)
            for following in outgoing[meeting]:
                incoming[following] -= 1
                if not incoming[following]:
                    free.append(following)
    return left


def _shortest_cycle(
    start: tuple[Group, int],
    after: Mapping[tuple[Group, int], Mapping[tuple[Group, int], int]],
    among: set[tuple[Group, int]],
) -> list[tuple[Group, int]]:
    came_from: dict[tuple[Group, int], tuple[Group, int]] = {}
    queue = deque([start])
    while queue:
        meeting = queue.popleft()
        for following in after.get(meeting, {}):
            if following == start:
                path = [meeting]
                while path[-1] != start:
                    path.append(came_from[path[-1]])
                return path[::-1]
            if following in among and following not in came_from:
                came_from[following] = meeting
                queue.append(following)
    return []


def _order_difference(
    cycle: list[tuple[Group, int]],
    after: Mapping[tuple[Group, int], Mapping[tuple[Group, int], int]],
    traces: Mapping[int, RankTrace],
) -> TraceDifference:
    lines, ranks = [], []
    for one, following in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
        rank = after[one][following]
        calls = {call.meeting: call for call in traces[rank].calls}
        ranks.append(rank)
        then = f"then call {following[1]} on {following[0]} ({calls.get(following, 'to which it has not come')})"
        lines.append(f"rank {rank}: call {one[1]} on {one[0]} ({calls[one]}), {then}")
    names = " and ".join(sorted({str(group) for group, _ in cycle}))
    head = f"ranks use groups {names} in different orders, and wait for each other"
    return TraceDifference(Kind.ORDER, tuple(sorted(set(ranks))), "\n  ".join([head, *lines]), cycle[0][0])


def _unmet(traces: Mapping[int, RankTrace]) -> Iterator[tuple[Group, int, list[int], list[int]]]:
    """For each unfinished collective: its group, its number, the ranks inside it, and the ranks with a trace that have not
    come to it."""
    for (group, number), calls in _meetings(traces).items():
        waiting = [rank for rank, call in calls.items() if not call.done]
        if waiting:
            yield group, number, waiting, [rank for rank in group.members if rank in traces and rank not in calls]


def _waits(traces: Mapping[int, RankTrace]) -> list[TraceDifference]:
    findings = []
    for group, number, waiting, late in _unmet(traces):
        unknown = [rank for rank in group.members if rank not in traces]
        if not late and not unknown:
            continue
        call = next(call for call in traces[waiting[0]].calls if call.meeting == (group, number))
        lines = [f"ranks {waiting} are in call {number} on group {group}: {call}"]
        for rank in late:
            last = traces[rank].calls[-1:]
            lines.append(f"rank {rank} did not come; its last call: {f'{last[0].group} {last[0]}' if last else 'none'}")
        lines += [f"ranks {unknown}: no trace of them here"] if unknown else []
        findings.append(TraceDifference(Kind.WAITING, tuple(late + unknown), "\n  ".join(lines), group))
    return findings


def report(traces: Sequence[RankTrace]) -> str:
    """The findings of compare() as text."""
    if not traces:
        return "no traces"
    findings = compare(traces)
    lines = [f"{finding.kind.value}: {finding.text}" for finding in findings]
    calls = sum(len(trace.calls) for trace in traces)
    missing = sorted(set(range(max(trace.world_size for trace in traces))) - {trace.rank for trace in traces})
    ranks = f"ranks {sorted(trace.rank for trace in traces)}" + (f" (no trace of {missing})" if missing else "")
    return "\n".join([*lines, f"{calls} calls of {ranks}: {len(findings)} findings"])
