"""Threads of which one runs at a time, in simulated time: the same seed gives the same run on every machine.

A thread that waits hands over to the thread whose event is the next one. Computing takes no simulated time. A simulated minute
takes as long as the host computes.
"""

import heapq
import os
import threading
from collections.abc import Callable
from typing import Any

from vllm_npu.tools.launch import one_core

Action = Callable[[], "int | None"]  # the rank that it wakes, or None; it must not wait

LIMIT_SECONDS = 900.0  # of simulated time: a run that takes longer hangs


class RankEndedError(BaseException):
    """Ends the thread of a rank: its process was killed. No handler of Exception may catch it."""


class Simulation:
    """The clock, the events, and the threads of the ranks."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.now = 0.0
        self.hung = False  # whether ranks waited without end, or for longer than LIMIT_SECONDS
        self.stopped_until = [0.0] * num_ranks
        self.stops: list[list[tuple[float, float]]] = [[] for _ in range(num_ranks)]  # of each rank: from, until
        self.ended = [False] * num_ranks
        self._events: list[tuple[float, int, Action]] = []
        self._number = 0  # of events; orders those of one time
        self._turns = [threading.Semaphore(0) for _ in range(num_ranks)]
        self._waits = [0] * num_ranks  # number of each rank's waits; a wake-up is for one of them
        self._running = set(range(num_ranks))
        self._over = threading.Event()

    def at(self, when: float, action: Action) -> None:
        """Call `action` at a time. LOCAL."""
        self._number += 1
        heapq.heappush(self._events, (max(when, self.now), self._number, action))

    def run(self, main: Callable[[int], Any]) -> list[Any]:
        """Call main(rank) on a thread for each rank, and return its results or exceptions. Ranks that ended have None."""
        outcomes: list[Any] = [None] * self.num_ranks
        core = one_core()

        def thread(rank: int) -> None:
            if core is not None:
                os.sched_setaffinity(0, {core})  # this thread only: Python's lock then stays on one core
            self._turns[rank].acquire()
            try:
                self._check_alive(rank)
                outcomes[rank] = main(rank)
            except RankEndedError:
                pass
            except Exception as error:  # noqa: BLE001 - the caller gets it
                outcomes[rank] = error
            self._running.discard(rank)
            self._advance(None)

        threads = [threading.Thread(target=thread, args=(rank,), daemon=True) for rank in range(self.num_ranks)]
        for rank, each in enumerate(threads):
            each.start()
            self.at(0.0, self._waking(rank))
        self.at(LIMIT_SECONDS, self._hang)
        self._advance(None)
        self._over.wait()
        for each in threads:
            each.join()
        return outcomes

    def wait(self, rank: int, ready: Callable[[], bool], seconds: float) -> bool:
        """Wait until ready(), which must look at this rank's state only. Returns False after `seconds`."""
        until = self.now + seconds
        while not ready():
            if self.now >= until:
                return False
            self.at(until, self._waking(rank))
            self._advance(rank)
        return True

    def sleep(self, rank: int, seconds: float) -> None:
        """Wait, whatever is delivered meanwhile."""
        self.wait(rank, lambda: False, seconds)

    def wake(self, rank: int) -> None:
        """Let a rank look again whether it is ready."""
        self.at(self.now, self._waking(rank))

    def stop(self, rank: int, seconds: float) -> None:
        """Stop a rank now, as SIGSTOP does, and continue it later."""
        until = self.now + seconds
        self.stops[rank].append((self.now, until))
        self.stopped_until[rank] = max(self.stopped_until[rank], until)

    def end(self, rank: int) -> int | None:
        """End a rank now, as SIGKILL does. Returns the rank, whose thread must run to end."""
        self.ended[rank] = True
        return rank if rank in self._running else None

    def is_stopped(self, rank: int) -> bool:
        """Whether the rank is stopped at this time."""
        return self.now < self.stopped_until[rank]

    def _hang(self) -> None:
        self.hung = True

    def _waking(self, rank: int) -> Action:
        """A wake-up of the rank's present wait."""
        wait = self._waits[rank]

        def action() -> int | None:
            if rank not in self._running or wait != self._waits[rank]:
                return None
            if self.is_stopped(rank) and not self.ended[rank]:
                self.at(self.stopped_until[rank], action)
                return None
            return rank

        return action

    def _advance(self, own: int | None) -> None:
        """Run events until one wakes a rank, and hand over to it. Returns when `own` is woken."""
        woken = self._next_woken()
        if woken is None:
            self._over.set()
            return
        if woken != own:
            self._turns[woken].release()
            if own is None:
                return
            self._turns[own].acquire()
        assert own is not None
        self._waits[own] += 1
        self._check_alive(own)

    def _next_woken(self) -> int | None:
        while self._running:
            if not self._events:
                self.hung = True
            if self.hung:  # end all threads, one after another
                return min(self._running)
            self.now, _, action = heapq.heappop(self._events)
            woken = action()
            if woken is not None:
                return woken
        return None

    def _check_alive(self, rank: int) -> None:
        if self.ended[rank] or self.hung:
            raise RankEndedError
