"""After a failed or late collective: finds the ranks that have ended, and the ranks that are late. Costs nothing before.

Every rank serves a mailbox, a store of torch.distributed. A rank whose collective fails leaves a report in the mailbox of
every other rank. A rank has ended if its mailbox cannot be reached. A rank is late if its mailbox can be reached, and it has
left no report. The end of one rank loses no report of another rank, since each rank serves its own mailbox.
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
from vllm_npu.transport.host import host_identity

LOOPBACK = "127.0.0.1"
KNOCK_SECONDS = 1.0  # for a mailbox to accept a connection
ANSWER_SECONDS = 2.0  # for a store to accept a report; a stopped process accepts connections and no report
GRACE_SECONDS = 5.0  # for living ranks to report; the wait stops when an ended rank is found
POLL_SECONDS = 0.1
REPORT_CHARACTERS = 300
SHOWN_REPORTS = 3
MOST_AT_ONCE = 32  # mailboxes, so that a dead host of 16 ranks does not cost 16 time-outs


@dataclass(frozen=True, slots=True)
class Mailbox:
    """Address at which a rank receives failure reports."""

    address: str  # for ranks on other hosts
    port: int
    host: str  # name, shown in messages; two hosts may have the same one
    host_identity: str  # decides whether a rank is on the same host
    process: int

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"

    def is_there(self) -> bool:
        """Whether the mailbox accepts a connection. False: its rank has ended, or the network between the ranks is cut."""
        try:
            socket.create_connection((self.reachable_address, self.port), KNOCK_SECONDS).close()
        except OSError:
            return False
        return True

    def take(self, sender: int, report: str) -> bool:
        """Leave a report of rank `sender`, and return whether the rank is there. A rank that accepts a connection and no
        report is there, too."""
        if not self.is_there():
            return False  # torch's store would retry until its time-out
        with suppress(RuntimeError, dist.DistStoreError):
            timeout = datetime.timedelta(seconds=ANSWER_SECONDS)
            dist.TCPStore(self.reachable_address, self.port, is_master=False, timeout=timeout).set(str(sender), report)
        return True

    @property
    def reachable_address(self) -> str:
        """Address at which this process reaches the mailbox: loopback if both are on one host."""
        return LOOPBACK if self.host_identity == host_identity() else self.address


class Watchdog:
    """One rank's mailbox, and the addresses of all mailboxes."""

    def __init__(self, rank: int, mailboxes: list[Mailbox], own: dist.Store, deadline: float) -> None:
        self.rank = rank
        self.deadline = deadline  # seconds that a collective may take
        self.last_begun: tuple[str, str] | None = None  # operation and group; a replayed graph begins none
        self._mailboxes = mailboxes
        self._own = own

    @classmethod
    def open(cls, rank: int, exchange: Callable[[str], list[str]], *, address: str, deadline: float) -> "Watchdog":
        """Open this rank's mailbox. COLLECTIVE: `exchange` returns every rank's text, in rank order.

        address: at which ranks of other hosts reach this one. deadline: seconds that a collective may take.
        """
        own = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
        mailbox = Mailbox(address, own.port, socket.gethostname(), host_identity(), os.getpid())
        mailboxes = [Mailbox(**json.loads(text)) for text in exchange(json.dumps(asdict(mailbox)))]
        return cls(rank, mailboxes, own, deadline)

    def begin(self, operation: str, group: str) -> None:
        """Note that a collective of this rank begins. LOCAL. Host sync: no."""
        self.last_begun = (operation, group)

    def ended(self) -> list[int]:
        """The ranks whose mailboxes cannot be reached. LOCAL. Takes KNOCK_SECONDS where a host does not answer."""
        others = [other for other in range(len(self._mailboxes)) if other != self.rank]
        with ThreadPoolExecutor(MOST_AT_ONCE) as pool:
            there = pool.map(lambda other: self._mailboxes[other].is_there(), others)
            return [other for other, is_there in zip(others, there, strict=True) if not is_there]

    def failure(self, operation: str, group: str, rank: int, detail: str) -> RankFailureError:
        """Tell all ranks that a collective failed, find the ranks that have ended or are late, and return the error that
        names them. LOCAL. Takes up to GRACE_SECONDS if no rank has ended."""
        report = f"{operation} on group '{group}': {detail}"[:REPORT_CHARACTERS]
        others = [other for other in range(len(self._mailboxes)) if other != self.rank]
        with ThreadPoolExecutor(MOST_AT_ONCE) as pool:
            taken = pool.map(lambda other: self._mailboxes[other].take(self.rank, report), others)
            # A report to a rank that is ending now may take long, so the grace period starts after this line.
            there = dict(zip(others, taken, strict=True))
            give_up = time.monotonic() + GRACE_SECONDS
            while True:
                silent = [other for other in others if not self._has_report_of(other)]
                ended = [other for other in silent if not there[other]]
                if ended or not silent or time.monotonic() > give_up:
                    break
                # A killed rank may lose its mailbox a moment after the connection that failed.
                time.sleep(POLL_SECONDS)
                there |= zip(silent, pool.map(lambda other: self._mailboxes[other].is_there(), silent), strict=True)
        late = [other for other in silent if other not in ended]
        return RankFailureError(operation, group, rank, self._text(detail, ended, late, others), tuple(ended or late))

    def _has_report_of(self, other: int) -> bool:
        return bool(self._own.check([str(other)]))

    def _report_of(self, other: int) -> str:
        """A rank's report on one line, cut, with printable characters only. Any process can write to a mailbox."""
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
