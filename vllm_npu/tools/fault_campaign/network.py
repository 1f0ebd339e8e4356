"""Groups and mailboxes between simulated ranks. The seed draws when each message arrives."""

import copy
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vllm_npu.core.handles import Pending
from vllm_npu.errors import TransportError
from vllm_npu.tools.fault_campaign.simulation import Simulation
from vllm_npu.transport.threaded import ThreadedTransport
from vllm_npu.trust.mailboxes import ANSWER_SECONDS, KNOCK_SECONDS, STILL_SECONDS, Answer
from vllm_npu.trust.watchdog import Watchdog

QUICK_SECONDS = 0.002  # mean time of most messages
SLOW_SHARE, SLOW_PART = 0.08, 0.15  # this share of the messages takes up to this part of the deadline
TWICE_SHARE = 0.1  # of the messages: they arrive again, up to LATE_DEADLINES later
LATE_DEADLINES = 4.0
LETTER_LOST_SHARE = 0.5  # of the letters to a rank that is stopped; it gets the others when it continues


@dataclass(frozen=True, slots=True)
class Cut:
    """No message passes between two ranks for a while. What they send meanwhile arrives afterwards."""

    ranks: frozenset[int]
    begin: float
    end: float


class Network:
    """What is on its way between the ranks, and what has arrived."""

    def __init__(self, simulation: Simulation, seed: int, deadline: float) -> None:
        self.simulation = simulation
        self.deadline = deadline
        self.cuts: list[Cut] = []
        self.epochs = [0] * simulation.num_ranks  # of each rank's present groups
        self.counts: Counter[str] = Counter()
        self.silent_hosts: set[int] = set()  # ranks whose end closes no connection: their host lost its power
        self.draw = random.Random(f"network {seed}")
        self.inbox: list[dict[tuple[str, int, int], Any]] = [{} for _ in self.epochs]  # by group, number and sender
        self.closed: list[set[tuple[str, int]]] = [set() for _ in self.epochs]  # group and peer
        self.letters: list[dict[tuple[int, str], str]] = [{} for _ in self.epochs]  # by sender and subject
        self.announced: list[Counter[int]] = [Counter() for _ in self.epochs]

    def send(self, sender: int, receiver: int, deliver: Callable[[], None]) -> None:
        """Let deliver() happen at the receiver after a drawn time, and sometimes once more."""
        self._deliver(sender, receiver, self._seconds(), deliver)
        if self.draw.random() < TWICE_SHARE:
            self.counts["messages that arrived twice"] += 1
            self._deliver(sender, receiver, self.draw.uniform(0, LATE_DEADLINES * self.deadline), deliver)

    def close(self, rank: int, group: str, peers: Sequence[int]) -> None:
        """Tell the peers that this rank has closed its connections of a group."""
        for peer in peers:
            self._deliver(rank, peer, self._seconds(), partial(self.closed[peer].add, (group, rank)))

    def is_cut(self, one: int, other: int) -> bool:
        """Whether no message passes between the two now."""
        now = self.simulation.now
        return any({one, other} == cut.ranks and cut.begin <= now < cut.end for cut in self.cuts)

    def _seconds(self) -> float:
        if self.draw.random() < SLOW_SHARE:
            return self.draw.uniform(0, SLOW_PART * self.deadline)
        return self.draw.expovariate(1 / QUICK_SECONDS)

    def _deliver(self, sender: int, receiver: int, seconds: float, deliver: Callable[[], None]) -> None:
        simulation = self.simulation
        arrives = simulation.now + seconds

        def action() -> None:
            if self.is_cut(sender, receiver):
                heals = max(cut.end for cut in self.cuts if {sender, receiver} == cut.ranks)
                simulation.at(heals + self._seconds(), action)
                return
            deliver()
            simulation.wake(receiver)

        simulation.at(arrives, action)


def group_name(name: str, members: Sequence[int], epoch: int) -> str:
    """The name under which messages of a group travel."""
    return f"{name}:{','.join(map(str, members))} in epoch {epoch}"


class SimulatedGroup:
    """One rank's end of a group. It has the methods of ThreadedGroup, so ThreadedTransport's collectives run over it."""

    def __init__(
        self,
        network: Network,
        name: str,
        members: tuple[int, ...],  # numbers in the whole run
        rank: int,  # this rank's number in the whole run
        watchdog: Watchdog,
        name_epoch: int,  # part of the name under which messages travel
    ) -> None:
        self.group = name
        self.size = len(members)
        self.worst_seconds = (
            0.0  # from the begin of a collective that failed to its error, without the rank's own stops
        )
        self._network = network
        self._members = members
        self._rank = rank
        self._watchdog = watchdog
        self.travels_as = group_name(name, members, name_epoch)
        self._number = 0

    def exchange(self, operation: str, rank: int, value: Any) -> list[Any]:
        """Return every rank's value, in rank order. Raises RankFailureError if one does not come within the deadline."""
        return self.collect(operation, self.post(operation, value), value)

    def wait(self, operation: str, rank: int) -> None:
        """Do nothing: each rank has its own copy of what the others sent."""

    def post(self, operation: str, value: Any) -> int:
        """Send `value` to all others, and return the number of this collective on the group."""
        number, self._number = self._number, self._number + 1
        message = operation, copy.deepcopy(value)
        network = self._network
        for receiver in self._others:
            key = self.travels_as, number, self._rank

            def deliver(receiver: int = receiver, key: tuple[str, int, int] = key) -> None:
                if self._watchdog.epoch < network.epochs[receiver]:
                    network.counts["messages of an old epoch that arrived in a new one"] += 1
                network.inbox[receiver][key] = message

            network.send(self._rank, receiver, deliver)
        return number

    def collect(self, operation: str, number: int, own: Any) -> list[Any]:
        """The values that the ranks sent for the collective of this number."""
        simulation, inbox = self._network.simulation, self._network.inbox[self._rank]
        closed = self._network.closed[self._rank]
        began, until = simulation.now, simulation.now + self._watchdog.deadline
        self._watchdog.begin(operation, self.group)
        values = []
        for source in self._members:
            if source == self._rank:
                values.append(own)
                continue
            key = self.travels_as, number, source

            def has_come(key: tuple[str, int, int] = key, source: int = source) -> bool:
                return key in inbox or (self.travels_as, source) in closed

            if not simulation.wait(self._rank, has_come, max(0.0, until - simulation.now)):
                raise self._failure(operation, began, f"timed out after {self._watchdog.deadline:g} s")
            if key not in inbox:
                raise self._failure(operation, began, "connection closed by peer")
            theirs, value = inbox.pop(key)
            if theirs != operation:
                raise TransportError(
                    operation, self.group, self._members.index(self._rank), f"rank {source} is in {theirs}"
                )
            values.append(value)
        self._watchdog.end()
        return values

    def close(self) -> None:
        """Close this rank's connections."""
        self._network.close(self._rank, self.travels_as, self._others)

    @property
    def _others(self) -> list[int]:
        return [member for member in self._members if member != self._rank]

    def _failure(self, operation: str, began: float, detail: str) -> TransportError:
        simulation = self._network.simulation
        error = self._watchdog.failure(operation, self.group, self._members.index(self._rank), detail)
        stopped = sum(
            max(0.0, min(end, simulation.now) - max(begin, began)) for begin, end in simulation.stops[self._rank]
        )
        self.worst_seconds = max(self.worst_seconds, simulation.now - began - stopped)
        return error


class SimulatedTransport(ThreadedTransport):
    """One rank of a SimulatedGroup. An all-to-all that was started travels while the rank goes on."""

    def __init__(self, shared: SimulatedGroup, rank: int) -> None:
        super().__init__(shared, rank)  # type: ignore[arg-type]
        self.ends = shared

    def _all_to_all_start(
        self, x: torch.Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]
    ) -> Pending[torch.Tensor]:
        own = x.clone(), list(send_sizes)
        number = self.ends.post("all_to_all", own)

        def complete() -> torch.Tensor:
            posted = self.ends.collect("all_to_all", number, own)
            self._check_received("all_to_all", [sizes[self.rank] for _, sizes in posted], recv_sizes)
            self._check_alike("all_to_all", [part for part, _ in posted])
            return torch.cat([part.split(list(sizes))[self.rank] for part, sizes in posted])

        return Pending(stage="all_to_all", complete=complete)

    def leave(self) -> None:
        """Close this rank's connections."""
        self.ends.close()


class SimulatedMailboxes:
    """The mailboxes of all ranks, as one rank sees them."""

    def __init__(self, network: Network, rank: int) -> None:
        self.rank = rank
        self.size = network.simulation.num_ranks
        self._network = network
        self._simulation = network.simulation
        self._sent = [0] * self.size  # by receiver, the number of this rank's last letter
        self._arrived = [0] * self.size  # by receiver, the newest one that it has

    def send(self, to: Sequence[int], subject: str, text: str) -> dict[int, Answer]:
        """Leave a letter. One to a stopped rank may be lost, or arrive when the rank continues."""

        def store(receiver: int) -> None:
            self._network.letters[receiver][self.rank, subject] = text

        return self._give(to, store)

    def announce(self, to: Sequence[int], epoch: int) -> dict[int, Answer]:
        """Leave a number."""

        def store(receiver: int) -> None:
            announced = self._network.announced[receiver]
            announced[self.rank] = max(announced[self.rank], epoch)

        return self._give(to, store)

    def has_taken(self, rank: int) -> bool:
        """Whether the last letter has arrived."""
        return self._arrived[rank] == self._sent[rank]

    def look(self, ranks: Sequence[int]) -> dict[int, bool]:
        """Whether each rank lives and can be reached."""
        self.sleep(QUICK_SECONDS)
        return {rank: not self._simulation.ended[rank] and not self._network.is_cut(self.rank, rank) for rank in ranks}

    def letter(self, sender: int, subject: str) -> str | None:
        """A letter that has arrived."""
        return self._network.letters[self.rank].get((sender, subject))

    def announced(self, sender: int) -> int:
        """The highest number that has arrived."""
        return self._network.announced[self.rank][sender]

    def owner(self, rank: int) -> str:
        """A name for messages."""
        return f"simulated process {rank}"

    def stood_still(self, seconds: float) -> float:
        """The longest stop of this rank that ended among the last `seconds`."""
        now = self._simulation.now
        stops = [end - begin for begin, end in self._simulation.stops[self.rank] if now - seconds <= end <= now]
        return max([0.0, *(length for length in stops if length >= STILL_SECONDS)])

    def now(self) -> float:
        """Simulated time."""
        return self._simulation.now

    def sleep(self, seconds: float) -> None:
        """Wait in simulated time."""
        self._simulation.sleep(self.rank, seconds)

    def _arrive(self, store: Callable[[int], None], rank: int, number: int) -> None:
        store(rank)
        self._arrived[rank] = max(self._arrived[rank], number)

    def _give(self, to: Sequence[int], store: Callable[[int], None]) -> dict[int, Answer]:
        network, simulation = self._network, self._simulation
        answers, longest = {}, 0.0
        for rank in to:
            self._sent[rank] += 1
            arrive = partial(self._arrive, store, rank, self._sent[rank])
            still_stopped = simulation.stopped_until[rank] - simulation.now
            seconds = network.draw.expovariate(1 / QUICK_SECONDS)
            answers[rank] = Answer.TOOK
            if simulation.ended[rank]:
                answers[rank], seconds = Answer.GONE, KNOCK_SECONDS if rank in network.silent_hosts else seconds
            elif network.is_cut(self.rank, rank):
                answers[rank], seconds = Answer.GONE, KNOCK_SECONDS
            elif still_stopped > ANSWER_SECONDS:
                answers[rank] = Answer.MUTE
                if network.draw.random() >= LETTER_LOST_SHARE:
                    simulation.at(simulation.now + still_stopped, arrive)
                seconds = ANSWER_SECONDS
            else:
                seconds += max(0.0, still_stopped)
                simulation.at(simulation.now + seconds, arrive)
            if network.draw.random() < TWICE_SHARE and answers[rank] is Answer.TOOK:
                late = network.draw.uniform(0, LATE_DEADLINES * network.deadline)
                simulation.at(simulation.now + late, arrive)
            longest = max(longest, seconds)
        self.sleep(longest + QUICK_SECONDS)
        return answers
