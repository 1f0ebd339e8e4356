"""Runs the symmetric kernels on CPUs, in Triton's interpreter. A program: each rank is a forked process, and windows are shared
memory of the host. `python -m tests.ranks.interpreted_kernels RANKS` prints what each rank saw in each scenario, as JSON.

The kernels, their launches and the windows' bookkeeping are the package's own. This file gives what only a GPU has: memory that
all ranks write, a clock and a stream.
"""

import ctypes
import json
import mmap
import os
import sys
import time
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from tests.time_limits import PATIENCE_SECONDS
from vllm_npu.strategies.dispatch import symmetric_launch
from vllm_npu.strategies.dispatch.symmetric_layout import SlotLayout
from vllm_npu.transport.kernels import signals
from vllm_npu.transport.symmetric_memory import (
    NUM_WINDOWS,
    STAGES,
    TAKE_FLAGS,
    SymmetricWindows,
    WindowSize,
    align,
    first_epochs,
)

HIDDEN, TOP_K, EXPERTS_PER_RANK, TOKENS = 8, 2, 2, 3
TIMEOUT = 2.0  # seconds, of the exchanges that must fail
SIZE = WindowSize(received_bytes=1 << 16, returned_bytes=1 << 16, rank_flags=32)
ROW_BYTES = 4 * HIDDEN  # float32
GROUP = 4  # columns of a scale of fp8 rows


class HostWindows(SymmetricWindows):
    """The windows of one rank in host memory. take, give_back and abandon are those of SymmetricWindows."""

    def __init__(
        self, rank: int, memories: list[int], report: "ctypes.Array[ctypes.c_int32]", window_bytes: int
    ) -> None:
        self.group, self.rank, self.num_ranks, self.size = "ep", rank, len(memories), SIZE
        self.timeout_ns = 0  # an Exchanger sets it
        self.device = torch.device("cpu")
        self.returned_offset = align(SIZE.received_bytes)
        self.dispatch_flags_offset = self.returned_offset + align(SIZE.returned_bytes)
        self.combine_flags_offset = self.dispatch_flags_offset + align(4 * SIZE.rank_flags * self.num_ranks)
        self.take_flags_offset = self.combine_flags_offset + align(4 * SIZE.rank_flags * self.num_ranks)
        self.report_address = ctypes.addressof(report)
        self.words = report
        all_epochs, own_epochs = first_epochs(self.device)
        clock, failed = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
        self.kernel_tensors = [
            (
                torch.tensor([memory + window * window_bytes for memory in memories]),
                own_epochs[window],
                all_epochs,
                clock,
                failed,
            )
            for window in range(NUM_WINDOWS)
        ]
        self._free = deque(range(NUM_WINDOWS))
        own = (ctypes.c_uint8 * (NUM_WINDOWS * window_bytes)).from_address(memories[rank])
        self.memory = torch.frombuffer(own, dtype=torch.uint8).view(NUM_WINDOWS, window_bytes)

    def enter(self) -> int:
        return 0

    @property
    def missing(self) -> dict[int, str]:
        return {rank: STAGES[stage] for rank, stage in enumerate(self.words[1:]) if stage}


class Exchanger:
    """Dispatch and combine of one rank. Expert e multiplies a row by e + 1; all weights are 1."""

    def __init__(
        self, windows: HostWindows, timeout: float = PATIENCE_SECONDS, *, num_tokens: int = TOKENS, **options: object
    ) -> None:
        self.windows = windows
        windows.timeout_ns = int(timeout * 1e9)
        self.num_tokens = num_tokens
        self.expert_major, self.global_ids, self.in_window, self.use_fp8 = (
            bool(options.get(key)) for key in ("expert_major", "global_ids", "in_window", "use_fp8")
        )
        row_bytes, scale_width = (HIDDEN, HIDDEN // GROUP) if self.use_fp8 else (ROW_BYTES, 0)
        self.layout = SlotLayout(windows.num_ranks * num_tokens, row_bytes, scale_width, TOP_K)
        arguments = (windows, self.layout, num_tokens, EXPERTS_PER_RANK)
        sent = {key: value for key, value in options.items() if key not in ("expert_major", "in_window")}
        self.dispatches = symmetric_launch.dispatch_launches(*arguments, has_mask=False, **sent)
        returned = {"width": HIDDEN, "element_size": 4, "has_mask": False}
        if self.in_window:
            returned["max_sms"] = options.get("max_sms")
            self.combines = symmetric_launch.take_launches(*arguments, **returned)
        else:
            back = {key: value for key, value in options.items() if key != "use_fp8"}
            self.combines = symmetric_launch.combine_launches(*arguments, **returned, **back)

    def dispatch(self, seed: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(100 * seed + self.windows.rank)
        experts = EXPERTS_PER_RANK * self.windows.num_ranks
        ids = torch.rand(self.num_tokens, experts, generator=generator).argsort(1)[:, :TOP_K].int()
        x = torch.randint(-3, 4, (self.num_tokens, HIDDEN), generator=generator).float()
        window = self.windows.take()
        interpret(self.dispatches[window], (x, None, torch.ones(self.num_tokens, TOP_K), ids, None))
        return window, x, ids

    def combine(self, window: int, ids: torch.Tensor) -> torch.Tensor:
        output = torch.full((self.num_tokens, HIDDEN), float("nan"))
        if self.in_window:
            start, rows = self.windows.returned_offset, self.slot_output(window)
            self.windows.memory[window][start : start + rows.nbytes].copy_(rows.flatten().view(torch.uint8))
            interpret(self.combines[window], (output, ids, None))
        else:
            rows, positions = self.sorted(window) if self.expert_major else (self.slot_output(window), None)
            interpret(self.combines[window], (output, rows, positions, ids, None))
        self.windows.give_back(window)
        return output

    def slot_output(self, window: int) -> torch.Tensor:
        dtype = torch.float8_e4m3fn if self.use_fp8 else torch.float32
        rows, scales, _, ids = self.layout.views(self.windows.memory[window], dtype)
        if self.use_fp8:
            rows = rows.float() * scales.repeat_interleave(GROUP, 1)
        first = self.windows.rank * EXPERTS_PER_RANK
        if self.global_ids:
            ids = torch.where((ids >= first) & (ids < first + EXPERTS_PER_RANK), ids - first, -1)
        factors = torch.where(ids >= 0, ids + first + 1, 0).sum(1, keepdim=True)
        return torch.where(factors > 0, rows * factors, float("nan"))

    def sorted(self, window: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts' rows after a sort by expert, and their positions. Raises AssertionError for a wrong order."""
        views = self.layout.views(self.windows.memory[window], torch.float32)
        rows, _, _, ids = views
        launches = symmetric_launch.sort_launches(self.layout, views, EXPERTS_PER_RANK)
        expert_input = torch.full((ids.numel(), HIDDEN), float("nan"))
        positions, ranks = torch.full((2, *ids.shape), -7, dtype=torch.int32)
        counts = torch.full((EXPERTS_PER_RANK,), -7)
        interpret(launches.rank_pairs, (ranks, counts))
        interpret(launches.permute, (expert_input, None, positions, ranks, counts))
        order = torch.where(ids.flatten() < 0, EXPERTS_PER_RANK, ids.flatten()).argsort(stable=True)[
            : int(counts.sum())
        ]
        assert counts.tolist() == [int((ids == e).sum()) for e in range(EXPERTS_PER_RANK)]
        assert positions.flatten()[order].tolist() == list(range(len(order)))
        assert torch.equal(expert_input[: len(order)], rows[order // TOP_K])
        expert = torch.arange(EXPERTS_PER_RANK).repeat_interleave(counts)
        expert_input[: len(order)] *= (expert + self.windows.rank * EXPERTS_PER_RANK + 1)[:, None]
        return expert_input, positions

    def step(self, seed: int) -> bool:
        """One exchange. Returns whether its output is right."""
        window, x, ids = self.dispatch(seed)
        output, expected = self.combine(window, ids), x * (ids + 1).sum(1, keepdim=True)
        if (
            self.use_fp8
        ):  # a row loses up to half a step of 3 bits, and a magnitude that is not the group's largest is small
            return torch.allclose(output, expected, rtol=1 / 16, atol=0)
        return torch.equal(output, expected)


def interpret(launch: symmetric_launch.PreparedLaunch, tensors: tuple[torch.Tensor | None, ...]) -> None:
    launch._kernel[(launch._num_programs,)](*tensors, *launch._fixed, **launch._constants)


def clock() -> tl.tensor:
    """The clock of all ranks, in ns. A rank that looks at it waits, so others may have the core."""
    time.sleep(0.01)
    return tl.full((), time.monotonic_ns(), tl.int64)


def splat(self: object, block: tl.block_type, scalar: interpreter.TensorHandle) -> interpreter.TensorHandle:
    """Triton 3.9's own one makes integers of truth values, which its interpreter then refuses as a mask."""
    return interpreter.TensorHandle(np.full(block.shape, scalar.data.reshape(-1)[0]), scalar.dtype.scalar)


def recovers(windows: HostWindows) -> dict[str, object]:
    """All ranks abandon one dispatch, then two dispatches in flight, in an order of their own."""
    exchanger = Exchanger(windows)
    good = [exchanger.step(0)]
    windows.abandon(exchanger.dispatch(1)[0])
    good += [exchanger.step(2 + i) for i in range(3)]
    both = [exchanger.dispatch(10 + i)[0] for i in range(NUM_WINDOWS)]
    for window in both if windows.rank else reversed(both):
        windows.abandon(window)
    good += [exchanger.step(20 + i) for i in range(10)]
    return {"good": good, "missing": windows.missing}


def last_abandons_alone(windows: HostWindows) -> dict[str, object]:
    """The last rank abandons a dispatch that the others combine, and goes on to its next step."""
    good = [Exchanger(windows).step(0)]
    window, _, ids = Exchanger(windows).dispatch(1)
    exchanger = Exchanger(windows, TIMEOUT)
    if windows.rank == windows.num_ranks - 1:
        windows.abandon(window)
        exchanger.step(2)
    else:
        exchanger.combine(window, ids)
    return {"good": good, "missing": windows.missing}


VARIANTS = (
    {"global_ids": True},
    {"expert_major": True},
    {"max_sms": 1},
    {"max_sms": 2, "global_ids": True},
    {"max_sms": 2, "num_tokens": 11},
    {"max_sms": 64, "num_tokens": 7},
    {"in_window": True},
    {"in_window": True, "global_ids": True, "num_tokens": 11},
    {"in_window": True, "max_sms": 2, "num_tokens": 11},
    {"in_window": True, "max_sms": 1},
    {"use_fp8": True},
    {"use_fp8": True, "max_sms": 2, "num_tokens": 11},
)


def variants(windows: HostWindows) -> dict[str, object]:
    """Every way to exchange in turn on the same windows. Chunks hold halves of two rows, so that programs have several."""
    symmetric_launch.CHUNK_BYTES, symmetric_launch.WHOLE_BYTES = ROW_BYTES, ROW_BYTES // 2
    symmetric_launch.SPLIT_BYTES, symmetric_launch.FP8_GROUP = ROW_BYTES // 2, GROUP
    good = [Exchanger(windows, **options).step(seed) for seed in range(2) for options in VARIANTS]
    return {"good": good, "missing": windows.missing}


def last_is_late(windows: HostWindows) -> dict[str, object]:
    """The last rank comes to a dispatch after the others have given up, and runs a whole step then."""
    good = [Exchanger(windows).step(0)]
    exchanger = Exchanger(windows, TIMEOUT)
    if windows.rank == windows.num_ranks - 1:
        while not windows.missing:
            time.sleep(0.1)
    exchanger.step(1)
    exchanger.step(2)
    return {"good": good, "missing": windows.missing}


def main(num_ranks: int) -> None:
    torch.set_num_threads(1)
    signals.globaltimer = clock
    signals.POLLS_BETWEEN_CLOCK_READS = tl.constexpr(8)  # a poll takes about 0.2 ms here
    interpreter.InterpreterBuilder.create_splat = splat
    symmetric_launch._starts_early = lambda device: False
    symmetric_launch._shared_memory = lambda device: 1 << 17
    seen = {
        scenario.__name__: on_ranks(num_ranks, scenario)
        for scenario in (recovers, last_abandons_alone, last_is_late, variants)
    }
    sys.stdout.write(json.dumps(seen))


def on_ranks(num_ranks: int, scenario: Callable[[HostWindows], dict[str, object]]) -> list[object]:
    """What the scenario returns on each rank."""
    flags = 2 * align(4 * SIZE.rank_flags * num_ranks) + align(4 * TAKE_FLAGS * num_ranks)
    window_bytes = align(SIZE.received_bytes) + align(SIZE.returned_bytes) + flags
    shared = [mmap.mmap(-1, NUM_WINDOWS * window_bytes) for _ in range(num_ranks)]  # forked ranks map them, too
    memories = [ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in shared]
    report = (ctypes.c_int32 * (1 + num_ranks)).from_buffer(mmap.mmap(-1, mmap.PAGESIZE))
    readers = []
    for rank in range(num_ranks):
        reader, writer = os.pipe()
        if os.fork() == 0:
            found = scenario(HostWindows(rank, memories, report, window_bytes))
            os.write(writer, json.dumps(found).encode())
            os._exit(0)
        os.close(writer)
        readers.append(reader)
    seen = []
    for reader in readers:
        with os.fdopen(reader, "rb") as pipe:
            seen.append(json.loads(pipe.read()))
    return seen


if __name__ == "__main__":
    main(int(sys.argv[1]))
