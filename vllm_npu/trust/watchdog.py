"""When a collective fails or is too late: which ranks have ended, and which are late. Costs nothing until then.

Every rank has a mailbox, a store of torch.distributed that it serves itself. A rank whose collective fails leaves a report in
the mailboxes of the others: a mailbox that cannot be reached belongs to a rank that has ended, and who left no report is late.
No rank's end takes the reports of others with it.
"""

import datetime
import json
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass

import torch.distributed as dist

from vllm_npu.errors import RankFailureError

LOOPBACK = "127.0.0.1"
KNOCK_SECONDS = 1.0  # for a mailbox to take a connection
ANSWER_SECONDS = 2.0  # for a store to take a report; a stopped process takes connections and no report
GRACE_SECONDS = 5.0  # for ranks that are alive to report; not waited for where one has ended
POLL_SECONDS = 0.1
REPORT_CHARACTERS = 300
SHOWN_REPORTS = 3
MOST_AT_ONCE = 32  # mailboxes, so that a dead host of 16 ranks does not take 16 time-outs


@dataclass(frozen=True, slots=True)
class Mailbox:
    """Where a rank takes reports."""

    address: str
    port: int
    host: str
    process: int

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"

    def is_there(self) -> bool:
        """False where its rank has ended, or the way to it is cut."""
        try:
            socket.create_connection((self._address, self.port), KNOCK_SECONDS).close()
        except OSError:
            return False
        return True

    def take(self, sender: int, report: str) -> bool:
        """Leave a report, if the rank is there, and say so: True also where it does not answer."""
        if not self.is_there():
            return False  # torch's store would try again until its time-out
        with suppress(RuntimeError, dist.DistStoreError):
            timeout = datetime.timedelta(seconds=ANSWER_SECONDS)
            dist.TCPStore(self._address, self.port, is_master=False, timeout=timeout).set(str(sender), report)
        return True

    @property
    def _address(self) -> str:
        return LOOPBACK if self.host == socket.gethostname() else self.address


class Watchdog:
    """One rank's end: its mailbox, and the addresses of the others'."""

    def __init__(self, rank: int, mailboxes: list[Mailbox], own: dist.Store, deadline: float) -> None:
        self.rank = rank
        self.deadline = deadline  # seconds that a collective may take
        self._mailboxes = mailboxes
        self._own = own

    @classmethod
    def open(cls, rank: int, exchange: Callable[[str], list[str]], *, address: str, deadline: float) -> "Watchdog":
        """COLLECTIVE: `exchange` gives every rank's text, in rank order. `address`: for ranks of other hosts."""
        own = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
        mailbox = Mailbox(address, own.port, socket.gethostname(), os.getpid())
        mailboxes = [Mailbox(**json.loads(text)) for text in exchange(json.dumps(asdict(mailbox)))]
        return cls(rank, mailboxes, own, deadline)

    def failure(self, operation: str, group: str, rank: int, detail: str) -> RankFailureError:
        """The error for a failed collective: tell all ranks, and find out who has ended or is late. LOCAL; takes up to
        GRACE_SECONDS where nobody has ended."""
        report = f"{operation} on group '{group}': {detail}"[:REPORT_CHARACTERS]
        others = [other for other in range(len(self._mailboxes)) if other != self.rank]
        with ThreadPoolExecutor(MOST_AT_ONCE) as pool:
            taken = pool.map(lambda other: self._mailboxes[other].take(self.rank, report), others)
            # It may take long: to ranks that are ending right now.
            there = dict(zip(others, taken, strict=True))
            give_up = time.monotonic() + GRACE_SECONDS
            while True:
                silent = [other for other in others if not self._has_report_of(other)]
                ended = [other for other in silent if not there[other]]
                if ended or not silent or time.monotonic() > give_up:
                    break
                # A rank that is being killed may lose its mailbox a moment after the connection that failed.
                time.sleep(POLL_SECONDS)
                there |= zip(silent, pool.map(lambda other: self._mailboxes[other].is_there(), silent), strict=True)
        late = [other for other in silent if other not in ended]
        return RankFailureError(operation, group, rank, self._text(detail, ended, late, others), tuple(ended or late))

    def _has_report_of(self, other: int) -> bool:
        return bool(self._own.check([str(other)]))

    def _report_of(self, other: int) -> str:
        """Whatever lies in the mailbox, which takes anybody's: cut, on one line, and printable."""
        text = self._own.get(str(other)).decode(errors="replace")[:REPORT_CHARACTERS]
        return "".join(character if character.isprintable() else " " for character in text)

    def _text(self, detail: str, ended: list[int], late: list[int], others: list[int]) -> str:
        lines = [f"rank {other} has ended, or cannot be reached ({self._mailboxes[other]})" for other in ended]
        if ended and late:
            lines.append(f"ranks {late} are there and have not noticed yet")
        else:
            lines += [
                f"rank {other} is late ({self._mailboxes[other]}): it is there, and did not come" for other in late
            ]
        failed = [other for other in others if self._has_report_of(other)]
        if not lines:
            lines.append("no rank has ended, and all have failed")
        lines += [f"rank {other} reports: {self._report_of(other)}" for other in failed[:SHOWN_REPORTS]]
        return "\n".join([f"{'; '.join(lines[:1])} ({detail})", *(f"  {line}" for line in lines[1:])])
