"""Flags between GPUs: a program (thread block) tells other ranks that its writes are there, and waits for theirs.

A program signals before it waits, and waits for the programs of its own number, so every rank launches the same grid. The
hardware starts programs in the order of their numbers: the lowest unfinished number runs on every rank, and no grid is too
large to end.

A flag holds the epoch of the last exchange that its sender finished. Epochs live on the device and only grow, so a captured
graph can be replayed and nothing has to be reset.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

POLLS_BETWEEN_CLOCK_READS = tl.constexpr(256)  # a poll takes about 1 us


@triton.jit
def signal(flags, present, epoch):
    """Set flags on other ranks, after all that this program has written. flags: pointers to int32; present: which of them."""
    tl.debug_barrier()
    tl.atomic_xchg(flags, tl.zeros_like(present.to(tl.int32)) + epoch, mask=present, sem="release", scope="sys")


@triton.jit
def _late(flags, present, epoch):
    """Which flags have not reached `epoch` yet. What their senders wrote before is visible where they have.

    A sender that has given up on another rank may be epochs ahead; the difference is right when epochs wrap around. An atomic,
    since Triton hands its result from one thread to all: they decide alike.
    """
    return present & (tl.atomic_add(flags, 0, mask=present, sem="acquire", scope="sys") - epoch < 0)


@triton.jit
def wait(flags, present, sources, epoch, clock, failed, report, stage, timeout_ns):
    """Return once all flags have reached `epoch`, or have had timeout_ns for it.

    flags: pointers to int32 in this rank's memory. present: which of them. sources: rank that sets each. clock: one int64, the
    latest time read by any program. failed: one int32, set where any program has given up, so that the others do not wait in
    turn. report: address of [ep_size] int32 in host memory; the entries of missing ranks are set to `stage`.
    """
    missing = tl.max(_late(flags, present, epoch).to(tl.int32), 0)
    polls = 0
    deadline = timeout_ns.to(tl.int64)
    while missing > 0:
        late = _late(flags, present, epoch)
        missing = tl.max(late.to(tl.int32), 0)
        polls += 1
        if polls % POLLS_BETWEEN_CLOCK_READS == 0:
            # Through memory, so that all threads of the program read the same time.
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
