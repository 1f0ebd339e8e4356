"""Flags between GPUs: a program (thread block) tells other ranks that its writes are complete, and waits for their writes.

Each program first signals, and then waits for the programs of its own number on other ranks, so every rank launches the same
grid. The hardware starts programs in the order of their numbers. The lowest unfinished number therefore runs on every rank,
and a grid of any size ends.

A flag holds the epoch of the last exchange that its sender finished. Epochs are device memory and only grow, so nothing is
reset before a captured graph is replayed.

A program that waits too long gives up. Two words then say so: `failed` on this GPU, and the first word of the report in host
memory of all ranks. The programs of all GPUs then give up. They also set all epochs of this GPU back by LATE_FOR_EVER, so the
flags that its next kernels set look late on all ranks. So no rank takes rows that were computed from undefined rows, and an
exchange that succeeds reads no word more for it.

Host memory is read by one program of a GPU in about a millisecond. Thousands of waiting programs that each read it would slow
down both GPUs: 10 to 20 ms for an exchange were measured on two H200.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

POLLS_BETWEEN_CLOCK_READS = tl.constexpr(256)  # a poll takes about 1 us
TOLD = tl.constexpr(1)  # values of `failed`: another GPU has given up
REPORTED = tl.constexpr(2)  # this GPU has given up, and has written what it misses
LATE_FOR_EVER = tl.constexpr(1 << 30)  # epochs
NUM_EPOCHS = tl.constexpr(8)  # words of symmetric_memory.first_epochs
LOOK_BITS = tl.constexpr(20)  # the report is read once in 2 ** 20 ns


@triton.jit
def signal(flags, present, epoch):
    """Set flags on other ranks to `epoch`, after all writes of this program. flags: pointers to int32. present: mask of the
    flags to set."""
    tl.debug_barrier()
    tl.atomic_xchg(flags, tl.zeros_like(present.to(tl.int32)) + epoch, mask=present, sem="release", scope="sys")


@triton.jit
def _late(flags, present, epoch):
    """Mask of the flags that have not reached `epoch`. The writes of the senders of all other flags are visible.

    The sign of the difference stays right when epochs wrap around. The read is atomic because Triton then gives one thread's
    result to all threads, so that they decide alike.
    """
    return present & (tl.atomic_add(flags, 0, mask=present, sem="acquire", scope="sys") - epoch < 0)


@triton.jit
def wait(flags, present, sources, epoch, all_epochs, clock, failed, report, stage, timeout_ns):
    """Return when all flags have reached `epoch`, or after timeout_ns.

    flags: pointers to int32 in this rank's memory. present: mask of the flags to wait for. sources: the rank that sets each
    flag. all_epochs: [NUM_EPOCHS] int32, the epochs of all windows. clock: one int64, the latest time that any program has
    read. failed: one int32, not 0 once any program of any GPU has given up; the other programs then give up too. report:
    address of [1 + ep_size] int32 in host memory that all GPUs write. The entries of missing ranks are set to `stage`, and
    then the first word to TOLD.

    Only a program whose own time is over accuses ranks. Ranks that another program misses may only have given up themselves.
    """
    reports = report.to(tl.pointer_type(tl.int32))
    missing = tl.max(_late(flags, present, epoch).to(tl.int32), 0)
    polls = 0
    deadline = timeout_ns.to(tl.int64)
    while missing > 0:
        late = _late(flags, present, epoch)
        missing = tl.max(late.to(tl.int32), 0)
        polls += 1
        if polls % POLLS_BETWEEN_CLOCK_READS == 0:
            # Time and report go through memory, so that all threads of the program read the same.
            before = tl.atomic_max(clock, globaltimer().to(tl.int64))
            now = tl.atomic_max(clock, 0)
            deadline = tl.where(polls == POLLS_BETWEEN_CLOCK_READS, now + deadline, deadline)
            if (before >> LOOK_BITS) != (now >> LOOK_BITS):
                tl.atomic_max(failed, tl.load(reports, volatile=True))
            given_up = tl.atomic_add(failed, 0)
            if (missing > 0) & ((now > deadline) | (given_up > 0)):
                each = tl.arange(0, NUM_EPOCHS)
                tl.store(all_epochs + each, tl.zeros_like(each) + epoch - LATE_FOR_EVER)
                if (now > deadline) & (given_up < REPORTED):
                    tl.store(reports + 1 + sources, tl.zeros_like(sources) + stage, mask=late)
                    tl.debug_barrier()
                    tl.store(reports, TOLD)
                    tl.atomic_max(failed, REPORTED, sem="acq_rel", scope="sys")
                missing = 0
    tl.debug_barrier()
