"""Letters between ranks beside their groups: how a failed rank reaches the others when no collective works.

Every rank serves a mailbox: a thread that takes letters, one line of JSON for each connection, and answers each with one byte.
The end of one rank loses no letter of another rank, since each rank serves its own mailbox. Letters name the epoch of the
groups that they are about (watchdog.py).

A mailbox asks no name server. torch's TCPStore does, on both sides of each connection, to have names for its log lines (seen
with torch 2.13; formatSockAddr in torch/csrc/distributed/c10d/socket.cpp). While the name server is slow, such a store takes no
letter. The thread needs Python's global lock, which torch releases in its operators and waits.
"""

import json
import os
import socket
import socketserver
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from enum import Enum
from queue import SimpleQueue
from typing import Protocol

from vllm_npu.transport.host import host_identity

LOOPBACK = "127.0.0.1"
KNOCK_SECONDS = 1.0  # for a mailbox to accept a connection
ANSWER_SECONDS = 2.0  # for a mailbox to take a letter; a stopped process accepts connections and takes no letter
MOST_AT_ONCE = 32  # mailboxes, so that a dead host of 16 ranks does not cost 16 time-outs
PULSE_SECONDS = 0.5  # between two beats of a rank's pulse
STILL_SECONDS = 2.0  # a gap between beats from which a process counts as having stood still
KEPT_GAPS = 8
LARGEST_LETTER = 65536  # bytes
QUEUE = 1024  # connections that the host accepts for a mailbox before the mailbox does
TAKEN = b"+"
EPOCH = "epoch"  # the subject of announcements


class Answer(Enum):
    """What became of a letter."""

    TOOK = "took it"
    MUTE = "accepts connections, and takes no letter: the process is stopped, or its host has no time for it"
    GONE = "has ended, or cannot be reached"


class Mailboxes(Protocol):
    """The mailboxes of all ranks, as one rank sees them. ServedMailboxes implements it, and the fault campaign simulates it."""

    rank: int
    size: int

    def send(self, to: Sequence[int], subject: str, text: str) -> dict[int, Answer]:
        """Leave a letter for each of these ranks. A later letter of the same subject replaces it. LOCAL."""
        ...

    def announce(self, to: Sequence[int], epoch: int) -> dict[int, Answer]:
        """Leave the number of an epoch. The receiver keeps the highest one, in whatever order they arrive. LOCAL."""
        ...

    def has_taken(self, rank: int) -> bool:
        """Whether the mailbox of `rank` has taken this rank's last letter, at once or after send() returned MUTE. LOCAL."""
        ...

    def look(self, ranks: Sequence[int]) -> dict[int, bool]:
        """Whether the mailbox of each rank accepts a connection. LOCAL."""
        ...

    def letter(self, sender: int, subject: str) -> str | None:
        """The letter of `sender` in this rank's own mailbox. LOCAL."""
        ...

    def announced(self, sender: int) -> int:
        """The highest epoch that `sender` announced to this rank; 0: none. LOCAL."""
        ...

    def owner(self, rank: int) -> str:
        """Process and host of a rank, for messages. LOCAL."""
        ...

    def stood_still(self, seconds: float) -> float:
        """The longest time, among the last `seconds`, in which this process did not run. LOCAL."""
        ...

    def now(self) -> float:
        """Seconds of a clock that only grows. LOCAL."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait. LOCAL."""
        ...


@dataclass(frozen=True, slots=True)
class Mailbox:
    """Address at which a rank receives letters."""

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

    def give(self, letter: bytes) -> Answer:
        """Deliver a letter, and return what became of that. Waits without end for a process that is stopped."""
        try:
            connection = socket.create_connection((self.reachable_address, self.port), KNOCK_SECONDS)
        except OSError:
            return Answer.GONE
        try:
            with connection:
                connection.settimeout(None)
                connection.sendall(letter)
                return Answer.TOOK if connection.recv(len(TAKEN)) == TAKEN else Answer.MUTE
        except OSError:  # the process has ended meanwhile
            return Answer.GONE

    @property
    def reachable_address(self) -> str:
        """Address at which this process reaches the mailbox: loopback if both are on one host."""
        return LOOPBACK if self.host_identity == host_identity() else self.address


class _OwnMailbox(socketserver.ThreadingTCPServer):
    """Takes letters in threads of its own, so that a sender that is stopped amid its letter keeps no other one waiting."""

    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    daemon_threads = True
    request_queue_size = QUEUE

    def __init__(self) -> None:
        super().__init__(("", 0), _TakeLetter)
        self.letters: dict[tuple[int, str], str] = {}  # by sender and subject
        self.epochs: dict[int, int] = {}  # by sender, the highest one
        self._raising = threading.Lock()
        threading.Thread(target=self.serve_forever, name="vllm_npu_mailbox", daemon=True).start()

    def server_bind(self) -> None:
        """Listen for IPv4 and IPv6, where the host has both."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def handle_error(self, request: object, client_address: object) -> None:
        """A connection that is no letter, or that broke, changes nothing."""

    def take(self, sender: int, subject: str, text: str | int) -> None:
        if subject != EPOCH:
            self.letters[sender, subject] = str(text)
            return
        with self._raising:
            self.epochs[sender] = max(self.epochs.get(sender, 0), int(text))

    def close(self) -> None:
        """Take no more letters."""
        self.shutdown()
        self.server_close()


class _TakeLetter(socketserver.StreamRequestHandler):
    server: _OwnMailbox

    def handle(self) -> None:
        line = self.rfile.readline(LARGEST_LETTER)
        if line.endswith(b"\n"):  # otherwise somebody only looked whether this mailbox is there
            sender, subject, text = json.loads(line.decode(errors="replace"))
            self.server.take(sender, subject, text)
            self.wfile.write(TAKEN)


class ServedMailboxes:
    """One rank's own mailbox, and the addresses of all mailboxes."""

    def __init__(self, rank: int, mailboxes: list[Mailbox], own: _OwnMailbox) -> None:
        self.rank = rank
        self.size = len(mailboxes)
        self._mailboxes = mailboxes
        self._own = own
        self._couriers = {other: _Courier(mailbox) for other, mailbox in enumerate(mailboxes) if other != rank}
        self._last_letters: dict[int, _Letter] = {}
        self._pulse = _Pulse()
        weakref.finalize(self, own.close).atexit = False

    @classmethod
    def open(cls, rank: int, exchange: Callable[[str], list[str]], *, address: str) -> "ServedMailboxes":
        """Open this rank's mailbox. COLLECTIVE: `exchange` returns every rank's text, in rank order.

        address: at which ranks of other hosts reach this one.
        """
        own = _OwnMailbox()
        mailbox = Mailbox(address, own.server_address[1], socket.gethostname(), host_identity(), os.getpid())
        return cls(rank, [Mailbox(**json.loads(text)) for text in exchange(json.dumps(asdict(mailbox)))], own)

    def send(self, to: Sequence[int], subject: str, text: str) -> dict[int, Answer]:
        """Leave a letter in the mailboxes of these ranks. Takes up to KNOCK_SECONDS + ANSWER_SECONDS."""
        return self._give(to, subject, text)

    def announce(self, to: Sequence[int], epoch: int) -> dict[int, Answer]:
        """Raise this rank's number in the mailboxes of these ranks. Takes as long as send()."""
        return self._give(to, EPOCH, epoch)

    def has_taken(self, rank: int) -> bool:
        """Whether the mailbox has taken the last letter."""
        return self._last_letters[rank].answer is Answer.TOOK

    def look(self, ranks: Sequence[int]) -> dict[int, bool]:
        """Whether each mailbox accepts a connection. Takes KNOCK_SECONDS where a host does not answer."""
        with ThreadPoolExecutor(MOST_AT_ONCE) as pool:
            return dict(zip(ranks, pool.map(lambda rank: self._mailboxes[rank].is_there(), ranks), strict=True))

    def letter(self, sender: int, subject: str) -> str | None:
        """A letter in this rank's mailbox. Any process can write to it."""
        return self._own.letters.get((sender, subject))

    def announced(self, sender: int) -> int:
        """The number in this rank's mailbox."""
        return self._own.epochs.get(sender, 0)

    def owner(self, rank: int) -> str:
        """Process and host of a rank."""
        return str(self._mailboxes[rank])

    def stood_still(self, seconds: float) -> float:
        """The longest gap between two beats of this process's pulse, from STILL_SECONDS on."""
        return self._pulse.longest_gap(seconds)

    def now(self) -> float:
        """The host's monotonic clock."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)

    def _give(self, to: Sequence[int], subject: str, text: str | int) -> dict[int, Answer]:
        give_up = time.monotonic() + KNOCK_SECONDS + ANSWER_SECONDS
        line = json.dumps([self.rank, subject, text]).encode() + b"\n"
        letters = {rank: self._couriers[rank].take(line) for rank in to}
        self._last_letters |= letters
        return {rank: letter.answer_until(give_up) for rank, letter in letters.items()}


class _Letter:
    """What a courier has to deliver."""

    def __init__(self, line: bytes) -> None:
        self.line = line
        self.answer = Answer.MUTE
        self.delivered = threading.Event()

    def answer_until(self, give_up: float) -> Answer:
        """The answer, or MUTE if there is none at this time. The letter then arrives when the receiver continues."""
        self.delivered.wait(max(0.0, give_up - time.monotonic()))
        return self.answer


class _Courier:
    """A thread that delivers the letters for one mailbox in turn. It starts with the first letter."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._letters: SimpleQueue[_Letter] = SimpleQueue()
        self._start = threading.Lock()
        self._thread: threading.Thread | None = None

    def take(self, line: bytes) -> _Letter:
        letter = _Letter(line)
        self._letters.put(letter)
        with self._start:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="vllm_npu_courier", daemon=True)
                self._thread.start()
        return letter

    def _run(self) -> None:
        while True:
            letter = self._letters.get()
            letter.answer = self._mailbox.give(letter.line)
            letter.delivered.set()


class _Pulse:
    """A thread that beats, and so sees that its process did not run for a while. It costs two short wake-ups a second."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._gaps: deque[tuple[float, float]] = deque(maxlen=KEPT_GAPS)  # end and length of each
        threading.Thread(target=self._run, name="vllm_npu_pulse", daemon=True).start()

    def longest_gap(self, seconds: float) -> float:
        now = time.monotonic()
        gaps = [length for end, length in tuple(self._gaps) if now - end <= seconds]
        present = now - self._last  # the thread may not have run since the process goes on
        return max([*gaps, present if present >= STILL_SECONDS else 0.0])

    def _run(self) -> None:
        while True:
            time.sleep(PULSE_SECONDS)
            now = time.monotonic()
            if now - self._last >= STILL_SECONDS:
                self._gaps.append((now, now - self._last))
            self._last = now
