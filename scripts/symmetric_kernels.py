"""Times of the symmetric strategy's kernels on one GPU, without a link.

`python scripts/symmetric_kernels.py OUT.json [--parts sort,casts,...]`. Rank 0 of two runs alone. The window of rank 1 is
memory of the same GPU, and its flags are set, so no kernel waits: the times are what the multiprocessors and the memory need.
A link adds to them. Hidden size 7168, 256 experts, top-8, bfloat16, uniform routing. Each row is a CUDA graph of calls in a
row: median, p10 and p90 in us of a call. Rows of one run may be compared.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from exchange_on_gpus import cast_on_gpu

from vllm_npu.core.token_layout import RowFormat
from vllm_npu.strategies.dispatch import symmetric_launch
from vllm_npu.strategies.dispatch.symmetric_layout import FP8_GROUP, SlotLayout
from vllm_npu.tools.gpu_clock import graph_of, microseconds
from vllm_npu.transport.symmetric_memory import SymmetricWindows, WindowSize, align, first_epochs

HIDDEN, EXPERTS, TOP_K, RANKS = 7168, 256, 8, 2
OWN_EXPERTS = EXPERTS // RANKS
TOKENS = (1, 8, 32, 128, 512, 1024, 4096)
SMS = (8, 16, 24, 32, 48)
GEMM = 8192
PARTS = ("sort", "casts", "sms", "products", "pack")
REACHED = 1 << 29  # a flag that no epoch passes


class LoneWindows(SymmetricWindows):
    """One window of rank 0, and one of rank 1 on the same GPU."""

    def __init__(self, num_tokens: int) -> None:
        slots = RANKS * num_tokens
        size = WindowSize(
            received_bytes=SlotLayout(slots, 2 * HIDDEN, 0, TOP_K).num_bytes,
            returned_bytes=slots * 2 * HIDDEN,
            rank_flags=symmetric_launch.programs_for(max(num_tokens, 16), 2 * HIDDEN),
        )
        self.group, self.rank, self.num_ranks, self.size = "ep", 0, RANKS, size
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.timeout_ns = 20_000_000_000
        flag_bytes = align(4 * size.rank_flags * RANKS)
        self.returned_offset = align(size.received_bytes)
        self.dispatch_flags_offset = self.returned_offset + align(size.returned_bytes)
        self.combine_flags_offset = self.dispatch_flags_offset + flag_bytes
        self.memory = [
            torch.zeros(self.combine_flags_offset + flag_bytes, dtype=torch.uint8, device="cuda") for _ in range(2)
        ]
        self.memory[0][self.dispatch_flags_offset :].view(torch.int32).fill_(REACHED)
        self.missing = torch.zeros(1 + RANKS, dtype=torch.int32).pin_memory()
        self.report_address = self.missing.data_ptr()
        self.epochs, own = first_epochs(self.device)
        addresses = torch.tensor([each.data_ptr() for each in self.memory], device="cuda")
        clock, failed = (
            torch.zeros(1, dtype=torch.int64, device="cuda"),
            torch.zeros(1, dtype=torch.int32, device="cuda"),
        )
        self.kernel_tensors = [(addresses, own[0], self.epochs, clock, failed)]


class Exchange:
    """The launches of rank 0 for steps of num_tokens, after a dispatch of both ranks."""

    def __init__(self, num_tokens: int, *, max_sms: int | None = None, expert_major: bool = False) -> None:
        self.num_tokens, self.windows = num_tokens, LoneWindows(num_tokens)
        self.layout = SlotLayout(RANKS * num_tokens, 2 * HIDDEN, 0, TOP_K)
        self.x, self.weights, self.ids = tokens_of(0, num_tokens)
        arguments = (self.windows, self.layout, num_tokens, OWN_EXPERTS)
        self._dispatch = symmetric_launch.dispatch_launches(*arguments, has_mask=False, max_sms=max_sms)[0]
        self._combine = symmetric_launch.combine_launches(
            *arguments, width=HIDDEN, element_size=2, has_mask=False, max_sms=max_sms, expert_major=expert_major
        )[0]
        self.views = self.layout.views(self.windows.memory[0], torch.bfloat16)
        self.rows, _, self.slot_weights, self.slot_ids = self.views
        self.dispatch()
        x, weights, ids = tokens_of(1, num_tokens)
        self.rows[num_tokens:] = x
        self.slot_weights[num_tokens:] = torch.where(ids < OWN_EXPERTS, weights, 0.0)
        self.slot_ids[num_tokens:] = torch.where(ids < OWN_EXPERTS, ids, -1)
        self.windows.epochs.copy_(first_epochs(self.windows.device)[0])
        self._sort = symmetric_launch.sort_launches(self.layout, self.views, OWN_EXPERTS)

    def dispatch(self) -> None:
        self._dispatch((self.x, None, self.weights, self.ids, None), current_stream())

    def combine(self, rows: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        output = self.x.new_empty((self.num_tokens, HIDDEN))
        self._combine((output, rows, positions, self.ids, None), current_stream())
        return output

    def sort(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows sorted by expert, counts and positions: two kernels."""
        rows = self.rows.new_empty((self.slot_ids.numel(), HIDDEN))
        positions, counts = torch.empty_like(self.slot_ids), torch.empty(OWN_EXPERTS, dtype=torch.int64, device="cuda")
        self._sort(rows, None, positions, counts, current_stream())
        return rows, counts, positions

    def sort_by_torch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same by torch's operations."""
        pairs = torch.where(self.slot_ids < 0, OWN_EXPERTS, self.slot_ids).flatten()
        order = pairs.argsort(stable=True)
        positions = torch.empty_like(order)
        positions[order] = torch.arange(order.numel(), device="cuda")
        counts = torch.zeros(OWN_EXPERTS + 1, dtype=torch.int64, device="cuda")
        counts.scatter_add_(0, pairs.long(), torch.ones_like(order))
        return self.rows[order // TOP_K], counts[:OWN_EXPERTS], positions.view_as(self.slot_ids)

    def check(self) -> None:
        """Raise AssertionError if a kernel gave up."""
        torch.cuda.synchronize()
        assert not self.windows.missing.any(), self.windows.missing


def tokens_of(rank: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(rank)
    x = torch.randn(num_tokens, HIDDEN, device="cuda", generator=generator).bfloat16()
    logits = torch.randn(num_tokens, EXPERTS, device="cuda", generator=generator)
    weights, ids = torch.topk(logits.softmax(-1), TOP_K)
    return x, weights.contiguous(), ids.int().contiguous()


def current_stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def timed(run: Callable[[], object], calls: int = 10, samples: int = 20) -> list[float]:
    """[median, p10, p90] us of a call."""
    replay = graph_of(run, calls)
    us = [microseconds(replay, lambda: None, head_start=True) / calls for _ in range(3 + samples)][3:]
    found = torch.tensor(us, dtype=torch.float64)
    return [round(float(found.quantile(share)), 2) for share in (0.5, 0.1, 0.9)]


Add = Callable[[str, int, str, list[float]], None]
"""Takes a part, a number of tokens, what was measured, and the result of timed()."""


def sorting(add: Add, num_tokens: int) -> None:
    """From slots to expert-major rows and back."""
    exchange, slots = Exchange(num_tokens, expert_major=True), Exchange(num_tokens)
    rows, counts, positions = exchange.sort()
    expected, expected_counts, _ = exchange.sort_by_torch()
    real = int(counts.sum())
    assert torch.equal(counts, expected_counts)
    assert torch.equal(rows[:real], expected[:real])

    def summed() -> torch.Tensor:
        return symmetric_launch.weighted_sum(rows, positions, exchange.slot_ids, exchange.slot_weights)

    slot_output = summed()
    assert torch.equal(exchange.combine(rows, positions), slots.combine(slot_output))
    for what, run in (
        ("sort by torch", exchange.sort_by_torch),
        ("sort by two kernels", exchange.sort),
        ("weighted sum, then combine of slots", lambda: slots.combine(summed())),
        ("combine of sorted rows", lambda: exchange.combine(rows, positions)),
        ("combine of slots", lambda: slots.combine(slot_output)),
    ):
        add("sort", num_tokens, what, timed(run))
    exchange.check()


def few_sms(add: Add, num_tokens: int, max_sms: int | None) -> None:
    """dispatch and combine on some multiprocessors."""
    exchange = Exchange(num_tokens, max_sms=max_sms)
    slot_output = torch.randn(RANKS * num_tokens, HIDDEN, device="cuda").bfloat16()
    name = "all SMs" if max_sms is None else f"{max_sms} SMs"
    add("few SMs", num_tokens, f"dispatch, {name}", timed(exchange.dispatch, calls=4))
    add("few SMs", num_tokens, f"combine, {name}", timed(lambda: exchange.combine(slot_output), calls=4))
    exchange.check()


def casts(add: Add, num_tokens: int, max_sms: int | None) -> None:
    """Rows that travel as fp8 with a scale for each 128 columns: cast before, by a kernel, or by dispatch itself."""
    windows = LoneWindows(num_tokens)
    layout = SlotLayout(RANKS * num_tokens, HIDDEN, HIDDEN // FP8_GROUP, TOP_K)
    by_dispatch, as_given = (
        symmetric_launch.dispatch_launches(
            windows, layout, num_tokens, OWN_EXPERTS, has_mask=False, max_sms=max_sms, use_fp8=use_fp8
        )[0]
        for use_fp8 in (True, False)
    )
    x, weights, ids = tokens_of(0, num_tokens)
    given, given_scales = cast_on_gpu(x)
    rows, scales, *_ = layout.views(windows.memory[0], torch.float8_e4m3fn)

    def cast_before() -> None:
        cast, cast_scales = cast_on_gpu(x)
        as_given((cast, cast_scales, weights, ids, None), current_stream())

    name = "all SMs" if max_sms is None else f"{max_sms} SMs"
    own = (ids < OWN_EXPERTS).any(1)
    for what, run in (
        ("dispatch, rows given", lambda: as_given((given, given_scales, weights, ids, None), current_stream())),
        ("cast, then dispatch", cast_before),
        ("dispatch casts", lambda: by_dispatch((x, None, weights, ids, None), current_stream())),
    ):
        rows.view(torch.uint8).fill_(0xFF)
        run()
        assert torch.equal(rows[:num_tokens].view(torch.uint8)[own], given.view(torch.uint8)[own]), what
        assert torch.equal(scales[:num_tokens][own], given_scales[own]), what
        add("fp8", num_tokens, f"{what}, {name}", timed(run))
    torch.cuda.synchronize()
    assert not windows.missing.any(), windows.missing


def beside_products(add: Add, num_tokens: int, max_sms: int | None) -> None:
    """Exchanges on a stream of their own, of high priority, beside matrix products."""
    exchange = Exchange(num_tokens, max_sms=max_sms)
    slot_output = torch.randn(RANKS * num_tokens, HIDDEN, device="cuda").bfloat16()
    name = "all SMs" if max_sms is None else f"{max_sms} SMs"
    a, b = (torch.randn(GEMM, GEMM, device="cuda").bfloat16() for _ in range(2))
    product, other = torch.empty_like(a), torch.cuda.Stream(priority=-1)

    def exchanges() -> None:
        for _ in range(4):
            exchange.dispatch()
            exchange.combine(slot_output)

    def products() -> None:
        for _ in range(2):
            torch.mm(a, b, out=product)

    def both() -> None:
        main = torch.cuda.current_stream()
        other.wait_stream(main)
        with torch.cuda.stream(other):
            exchanges()
        products()
        main.wait_stream(other)

    for what, run in (("4 exchanges", exchanges), ("2 products", products), ("both", both)):
        add("beside products", num_tokens, f"{what}, {name}", timed(run, calls=2, samples=10))
    exchange.check()


def packing(add: Add, num_tokens: int) -> None:
    """A message of hidden states, weights and ids."""
    tensors = tokens_of(0, num_tokens)
    row_format = RowFormat.of(tensors)

    def copies() -> torch.Tensor:
        message = tensors[0].new_empty((num_tokens, row_format.row_bytes), dtype=torch.uint8)
        for field, tensor in zip(row_format.unpack(message), tensors, strict=True):
            field.copy_(tensor)
        return message

    def one_cat() -> torch.Tensor:
        return row_format.pack(tensors)

    assert torch.equal(one_cat(), copies())
    for what, run in (("one cat", one_cat), ("a copy for each tensor", copies)):
        add("pack", num_tokens, what, timed(run))
        add("pack, host", num_tokens, what, host_time(run))


def host_time(run: Callable[[], object], calls: int = 20, series: int = 20) -> list[float]:
    """[median, p10, p90] us of host time of an eager call."""
    us = []
    for _ in range(series):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        us.append((time.perf_counter() - start) * 1e6 / calls)
    torch.cuda.synchronize()
    found = torch.tensor(us, dtype=torch.float64)
    return [round(float(found.quantile(share)), 2) for share in (0.5, 0.1, 0.9)]


def main(path: str, parts: list[str]) -> None:
    rows: list[dict[str, object]] = []
    device = torch.cuda.get_device_name()

    def add(part: str, num_tokens: int, what: str, us: list[float]) -> None:
        times = dict(zip(("us_median", "us_p10", "us_p90"), us, strict=True))
        rows.append({"device": device, "part": part, "tokens": num_tokens, "what": what, **times})
        print(f"{part:16} {num_tokens:5} {what:40} {us[0]:9.2f} ({us[1]:.2f} to {us[2]:.2f})", flush=True)
        Path(path).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

    if "sort" in parts:
        for num_tokens in TOKENS:
            sorting(add, num_tokens)
    if "casts" in parts:
        for num_tokens in TOKENS:
            casts(add, num_tokens, None)
        for max_sms in SMS:
            casts(add, 4096, max_sms)
    if "sms" in parts:
        for num_tokens in (512, 4096):
            for max_sms in (None, *SMS):
                few_sms(add, num_tokens, max_sms)
    if "products" in parts:
        for max_sms in (None, *SMS):
            beside_products(add, 4096, max_sms)
    if "pack" in parts:
        for num_tokens in (8, 128, 4096):
            packing(add, num_tokens)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("--parts", default=",".join(PARTS))
    options = parser.parse_args()
    main(options.path, options.parts.split(","))
