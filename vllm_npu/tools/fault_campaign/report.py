"""The table of a campaign: a row for each kind of fault."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from vllm_npu.tools.fault_campaign.campaign import FaultKind, Outcome

COLUMNS = (
    "fault",
    "seeds",
    "errors",
    "that name only ranks hit",
    "that name nobody",
    "worst seconds to an error",
    "new epochs",
    "violations",
)
SEVERAL = "two faults"


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as Markdown: a row for each kind of fault, and one for all."""
    rows: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        rows[outcome.faults[0].kind.value if len(outcome.faults) == 1 else SEVERAL].append(outcome)
    order = [*(kind.value for kind in FaultKind), SEVERAL]
    lines = [_row(COLUMNS), _row(["---"] * len(COLUMNS))]
    lines += [_row(_cells(kind, rows[kind])) for kind in order if kind in rows]
    return "\n".join([*lines, _row(_cells("all", outcomes))])


def violations(outcomes: Sequence[Outcome]) -> list[str]:
    """What did not hold, with the seed and its faults."""
    return [
        f"seed {outcome.seed} ({'; '.join(map(str, outcome.faults))}): {violation}"
        for outcome in outcomes
        for violation in outcome.violations
    ]


def _cells(kind: str, outcomes: Sequence[Outcome]) -> list[str]:
    errors, worst = sum(each.errors for each in outcomes), max(each.worst_seconds for each in outcomes)
    return [
        kind,
        f"{len(outcomes):,}",
        f"{errors:,}",
        f"{sum(each.exact for each in outcomes):,}",
        f"{sum(each.unnamed for each in outcomes):,}",
        f"{worst:.1f}" if errors else "-",
        f"{sum(each.epochs for each in outcomes):,}",
        f"{sum(len(each.violations) for each in outcomes):,}",
    ]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
