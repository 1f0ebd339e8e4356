"""Flags between GPUs: a program (thread block) tells other ranks that its writes are complete, and waits for their writes.

Each program first signals, and then waits for the programs of its own number on other ranks, so every rank launches the same
grid. The hardware starts programs in the order of their numbers. The lowest unfinished number therefore runs on every rank,
and a grid of any size ends.

A flag holds the epoch of the last exchange that its sender finished. Epochs are device memory and only grow, so nothing is
reset before a captured graph is replayed.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

POLLS_BETWEEN_CLOCK_READS = tl.constexpr(256)  # a poll takes about 1 us


@triton.jit
def signal(flags, present, epoch):
    """Set flags on other ranks to `epoch`, after all writes of this program. flags: pointers to int32. present: mask of the
    flags to set."""
    tl.debug_barrier()
    tl.atomic_xchg(flags, tl.zeros_like(present.to(tl.int32)) + epoch, mask=present, sem="release", scope="sys")


@triton.jit
def _late(flags, present, epoch):
    """Mask of the flags that have not reached `epoch`. The writes of the senders of all other flags are visible.

    A sender that has given up on another rank may be some epochs ahead. The sign of the difference stays right when epochs
    wrap around. The read is atomic because Triton then gives one thread's result to all threads, so that they decide alike.
    """
    return present & (tl.atomic_add(flags, 0, mask=present, sem="acquire", scope="sys") - epoch < 0)


@triton.jit
def wait(flags, present, sources, epoch, clock, failed, report, stage, timeout_ns):
    """Return when all flags have reached `epoch`, or after timeout_ns.

    flags: pointers to int32 in this rank's memory. present: mask of the flags to wait for. sources: the rank that sets each
    flag. clock: one int64, the latest time that any program has read. failed: one int32, set when any program gives up; the
    other programs then give up at once. report: address of [ep_size] int32 in host memory; the entries of missing ranks are
    set to `stage`.
    """
    missing = tl.max(_late(flags, present, epoch).to(tl.int32), 0)
    polls = 0
    deadline = timeout_ns.to(tl.int64)
    while missing > 0:
        late = _late(flags, present, epoch)
        missing = tl.max(late.to(tl.int32), 0)
        polls += 1
        if polls % POLLS_BETWEEN_CLOCK_READS == 0:
            # The time goes through memory, so that all threads of the program read the same one.
            tl.atomic_max(clock, globaltimer().to(tl.int64))
            now = tl.atomic_max(clock, 0)
            deadline = tl.where(polls == POLLS_BETWEEN_CLOCK_READS, now + deadline, deadline)
            given_up = tl.atomic_add(failed, 0) != 0
            if (missing > 0) & ((now > deadline) | given_up):
                if not given_up:
                    tl.store(report.to(tl.pointer_type(tl.int32)) + sources, tl.zeros_like(sources) + stage, mask=late)
                    tl.atomic_xchg(failed, 1)
                missing = 0
    tl.debug_barrier()
