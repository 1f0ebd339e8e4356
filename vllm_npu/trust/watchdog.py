"""After a failed or late collective: finds the ranks that made it fail. Then all meet in a new epoch, or name who is missing.

A rank whose collective fails leaves a report in the mailbox of every other rank (mailboxes.py). From the answers and from the
others' reports it finds the culprits:

- A rank has ended if its mailbox cannot be reached.
- A rank is stopped if its mailbox accepts connections and takes no letter.
- A rank failed in its own step if it says so.
- A rank is late if it is there, and has left no report.
- A rank stood still if all have reported, and its report says that its process did not run for a while.
- A rank was left behind if all others are in a later epoch, and none of their reports has reached it. It names itself.
- A rank was away if all have reported, and it computed for much longer than others between two collectives.
- Otherwise the culprits are those that other ranks blame: two ranks that cannot reach each other are alive for a third one.

An epoch is the life of a set of groups. It ends with the first failed collective. A rank never enters an epoch twice. Reports
name their epoch, and the groups of an epoch are new, so nothing that was sent in an old epoch can be taken for new.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from vllm_npu.errors import RankFailureError
from vllm_npu.trust.mailboxes import ANSWER_SECONDS, KNOCK_SECONDS, Answer, Mailboxes, ServedMailboxes

GRACE_SECONDS = 5.0  # for living ranks to report; the wait stops when an ended rank is found
POLL_SECONDS = 0.1
REPORT_CHARACTERS = 300
SHOWN_REPORTS = 3
LETTER_SECONDS = KNOCK_SECONDS + ANSWER_SECONDS
FAILURE_SECONDS = 3 * LETTER_SECONDS + GRACE_SECONDS
"""The most that failure() takes, on a host with time for it. An error comes at most a deadline and this after its cause."""

AWAY_PART = 0.5  # of the deadline: a rank that is away for so much longer than another one is late
KEPT_TIMES = 8
FAILED, BLAMES = "failed", "blames"  # subjects of letters


class _Why(Enum):
    """How a culprit was found. In this order: the first kind that there is decides."""

    ENDED = "has ended, or cannot be reached"
    STOPPED = "is stopped: it accepts connections, and takes no letter"
    FAULT = "failed in its own step"
    LATE = "is late"
    STILL = "stood still"
    LEFT = "took no letter, and the others have gone on to a later epoch"
    AWAY = "was away"
    BLAMED = "is blamed by other ranks"


@dataclass(frozen=True, slots=True)
class _Report:
    """What a rank says of its failure. Any process can write to a mailbox, so a text that is no report counts as detail."""

    detail: str
    still: float = 0.0  # seconds for which the rank's process did not run
    away: float = 0.0  # the most seconds that the rank lately spent between two collectives
    fault: bool = False  # the rank failed in its own step, and not in a collective

    def to_text(self) -> str:
        return json.dumps([self.detail[:REPORT_CHARACTERS], round(self.still, 1), round(self.away, 1), self.fault])

    @classmethod
    def of_text(cls, text: str) -> "_Report":
        try:
            detail, still, away, fault = json.loads(text)
            return cls(_readable(str(detail)), float(still), float(away), bool(fault))
        except (ValueError, TypeError, RecursionError):
            return cls(_readable(text))


def _readable(text: str) -> str:
    """On one line, cut, with printable characters only."""
    return "".join(character if character.isprintable() else " " for character in text[:REPORT_CHARACTERS])


class Watchdog:
    """Looks for culprits in one epoch of this rank's groups."""

    def __init__(self, mailboxes: Mailboxes, deadline: float, epoch: int = 0) -> None:
        self.rank = mailboxes.rank
        self.deadline = deadline  # seconds that a collective may take
        self.epoch = epoch
        self.last_begun: tuple[str, str] | None = None  # operation and group; a replayed graph begins none
        self._mailboxes = mailboxes
        self._last_end = mailboxes.now()  # of a collective
        self._away: deque[tuple[float, float]] = deque(maxlen=KEPT_TIMES)  # end and length of times between collectives
        self._others = [other for other in range(mailboxes.size) if other != mailboxes.rank]

    @classmethod
    def open(cls, rank: int, exchange: Callable[[str], list[str]], *, address: str, deadline: float) -> "Watchdog":
        """Open this rank's mailbox. COLLECTIVE: `exchange` returns every rank's text, in rank order.

        address: at which ranks of other hosts reach this one. deadline: seconds that a collective may take.
        """
        return cls(ServedMailboxes.open(rank, exchange, address=address), deadline)

    def begin(self, operation: str, group: str) -> None:
        """Note that a collective of this rank begins. LOCAL. Host sync: no."""
        self.last_begun = (operation, group)
        now = self._mailboxes.now()
        if now - self._last_end > self.deadline * AWAY_PART:
            self._away.append((now, now - self._last_end))

    def end(self) -> None:
        """Note that a collective of this rank has ended. LOCAL. Host sync: no."""
        self._last_end = self._mailboxes.now()

    def _longest_away(self) -> float:
        """Among the times that ended since a rank may have begun to wait for this one."""
        since = self._mailboxes.now() - 2 * self.deadline - GRACE_SECONDS
        return max([0.0, *(length for end, length in tuple(self._away) if end >= since)])

    def ended(self) -> list[int]:
        """The ranks whose mailboxes cannot be reached. LOCAL. Takes KNOCK_SECONDS where a host does not answer."""
        return [other for other, there in self._mailboxes.look(self._others).items() if not there]

    def failure(self, operation: str, group: str, rank: int, detail: str) -> RankFailureError:
        """Tell all ranks that a collective failed, find the culprits, and return the error that names them. LOCAL.

        Takes up to FAILURE_SECONDS, and GRACE_SECONDS where a rank is late and none has ended.
        """
        post = self._mailboxes
        still = post.stood_still(self.deadline + GRACE_SECONDS)
        report = _Report(f"{operation} on group '{group}': {detail}", still, self._longest_away())
        answers = self._tell(report)
        silent = self._wait_for_reports(answers)
        reports = {other: theirs for other in self._others if (theirs := self._report_of(other)) is not None}
        everyone = reports | {self.rank: report}
        least_away = min(each.away for each in everyone.values())
        found = {
            _Why.ENDED: [other for other in silent if answers[other] is Answer.GONE],
            _Why.STOPPED: [other for other in silent if answers[other] is Answer.MUTE],
            _Why.FAULT: [other for other, each in reports.items() if each.fault],
            _Why.LATE: silent,
            _Why.STILL: sorted(other for other, each in everyone.items() if each.still > 0),
            # Letters are lost on their way to a stopped rank only.
            _Why.LEFT: [self.rank] if not reports and not silent and self._others else [],
            # After an idle time all ranks have been away, so only what exceeds the least counts.
            _Why.AWAY: sorted(
                other for other, each in everyone.items() if each.away > least_away + self.deadline * AWAY_PART
            ),
        }
        why = next((each for each, culprits in found.items() if culprits), _Why.BLAMED)
        culprits = found[why] if why in found else self._blamed()
        if culprits:
            answering = [other for other, answer in answers.items() if answer is Answer.TOOK]  # the others cost a wait
            post.send(answering, self._subject(BLAMES), json.dumps(culprits))
        text = self._text(detail, why, culprits, silent, everyone)
        return RankFailureError(operation, group, rank, text, tuple(culprits))

    def tell_fault(self, error: BaseException) -> None:
        """Tell all ranks that this rank failed in its own step, so that they name it when they miss it. LOCAL. Takes up to
        LETTER_SECONDS."""
        self._tell(_Report(f"{type(error).__name__}: {error}", fault=True))
        self._mailboxes.send(self._others, self._subject(BLAMES), json.dumps([self.rank]))

    def is_left(self) -> bool:
        """Whether another rank has left this epoch, so that its groups are of no use. LOCAL. Look where a step is planned."""
        return any(self._mailboxes.announced(other) > self.epoch for other in self._others)

    def next_epoch(self) -> "Watchdog":
        """Meet the other ranks in an epoch above this one, and return its watchdog. COLLECTIVE over all ranks.

        Call it after a failure, on every rank, before new groups are made. Name the new groups by the epoch: a rank that comes
        late may still send in the old ones. Returns once every rank has announced the same epoch, and every rank has this
        rank's announcement. The ranks announce the highest epoch that any of them has announced, so ranks that failed a
        different number of times meet too.

        Raises RankFailureError that names the ranks that did not come: at once for a rank that stays ended for GRACE_SECONDS,
        and otherwise after the deadline and FAILURE_SECONDS, since other ranks may only then have failed.
        """
        post = self._mailboxes
        wanted, waited_from = self.epoch + 1, post.now()
        taken: set[int] = set()  # the ranks that have this rank's announcement
        lost_from: dict[int, float] = {}
        while True:
            highest = max([wanted, *(post.announced(other) for other in self._others)])
            if highest > wanted:
                wanted = highest
                taken.clear()
            answers = post.announce([other for other in self._others if other not in taken], wanted)
            taken.update(other for other, answer in answers.items() if answer is Answer.TOOK)
            unheard = [other for other in self._others if post.announced(other) != wanted]
            missing = [other for other in self._others if other in unheard or other not in taken]
            if not missing:
                return Watchdog(post, self.deadline, wanted)
            there = post.look([other for other in unheard if other in taken])
            answers |= {other: Answer.TOOK if is_there else Answer.GONE for other, is_there in there.items()}
            gone = [other for other in missing if answers.get(other) is Answer.GONE]
            lost_from = {other: lost_from.get(other, post.now()) for other in gone}
            ended = [other for other, since in lost_from.items() if post.now() - since > GRACE_SECONDS]
            waited = post.now() - waited_from
            if ended or waited > self.deadline + FAILURE_SECONDS:
                mute = [other for other in missing if answers.get(other) is Answer.MUTE]
                raise self._nobody_came(f"waited {waited:.0f} s for epoch {wanted}", ended or gone, mute, missing)
            post.sleep(POLL_SECONDS)

    def _nobody_came(self, detail: str, gone: list[int], mute: list[int], missing: list[int]) -> RankFailureError:
        why = _Why.ENDED if gone else _Why.STOPPED if mute else _Why.LATE
        culprits = gone or mute or missing
        text = self._text(detail, why, culprits, missing, {})
        return RankFailureError("next_epoch", "all", self.rank, text, tuple(culprits))

    def _subject(self, kind: str) -> str:
        return f"{kind} in epoch {self.epoch}"

    def _tell(self, report: _Report) -> dict[int, Answer]:
        return self._mailboxes.send(self._others, self._subject(FAILED), report.to_text())

    def _report_of(self, other: int) -> _Report | None:
        text = self._mailboxes.letter(other, self._subject(FAILED))
        return None if text is None else _Report.of_text(text)

    def _has_failed(self, other: int) -> bool:
        """Whether a rank has reported, or has gone on to a later epoch: its report may have been lost while this rank stood."""
        return self._report_of(other) is not None or self._mailboxes.announced(other) > self.epoch

    def _wait_for_reports(self, answers: dict[int, Answer]) -> list[int]:
        """The ranks that have not reported when an ended rank is found, or when all others have, or after the grace period.
        Changes `answers` by what is seen meanwhile."""
        post = self._mailboxes
        give_up = post.now() + GRACE_SECONDS  # a letter to a rank that is ending may take long, so it starts here
        while True:
            silent = [other for other in self._others if not self._has_failed(other)]
            # A rank whose host had no time for it may take the letter now: it is not stopped.
            answers |= {
                other: Answer.TOOK for other in silent if answers[other] is Answer.MUTE and post.has_taken(other)
            }
            decided = all(answers[other] is Answer.MUTE for other in silent)
            if decided or any(answers[other] is Answer.GONE for other in silent) or post.now() > give_up:
                return silent
            # A killed rank may lose its mailbox a moment after the connection that failed.
            post.sleep(POLL_SECONDS)
            for other, there in post.look(silent).items():
                if not there:
                    answers[other] = Answer.GONE

    def _blamed(self) -> list[int]:
        """The ranks that other ranks blame. Waits for the first such letter, and LETTER_SECONDS at most."""
        post = self._mailboxes
        give_up = post.now() + LETTER_SECONDS
        while True:
            blamed = {rank for other in self._others for rank in self._blames_of(other)}
            if blamed or post.now() > give_up:
                return sorted(blamed)
            post.sleep(POLL_SECONDS)

    def _blames_of(self, other: int) -> Iterable[int]:
        text = self._mailboxes.letter(other, self._subject(BLAMES))
        try:
            blamed: Any = json.loads(text or "[]")
        except (ValueError, RecursionError):
            return []
        if not isinstance(blamed, list):
            return []
        return [rank for rank in blamed if type(rank) is int and rank in range(self._mailboxes.size)]

    def _text(self, detail: str, why: _Why, culprits: list[int], silent: list[int], reports: dict[int, _Report]) -> str:
        post = self._mailboxes
        says = {
            _Why.LATE: lambda rank: f"rank {rank} is late ({post.owner(rank)}): it is there, and did not come",
            _Why.FAULT: lambda rank: f"rank {rank} failed in its own step ({post.owner(rank)})",
            _Why.STILL: lambda rank: (
                f"rank {rank} stood still for {reports[rank].still:.0f} s ({post.owner(rank)}): it was stopped, or its host "
                "had no time for it"
            ),
            _Why.AWAY: lambda rank: (
                f"rank {rank} was away for {reports[rank].away:.0f} s ({post.owner(rank)}): it computed, and came late"
            ),
        }
        lines = [says.get(why, lambda rank: f"rank {rank} {why.value} ({post.owner(rank)})")(rank) for rank in culprits]
        waiting = [other for other in silent if other not in culprits]
        if waiting:
            lines.append(f"ranks {waiting} are there and have not noticed yet")
        if not lines:
            lines.append("no rank has ended, and all have failed")
        others = [other for other in reports if other != self.rank]
        lines += [f"rank {other} reports: {reports[other].detail}" for other in others[:SHOWN_REPORTS]]
        return "\n".join([f"{lines[0]} ({detail})", *(f"  {line}" for line in lines[1:])])
