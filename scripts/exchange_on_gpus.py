"""Times of dispatch and combine between GPUs of one host, beside the libraries that a user would take in their place.

`python scripts/exchange_on_gpus.py OUT.json [--ranks 2] [--parts link,bfloat16,...] [--tokens 1,8,...]`. Hidden size 7168, 256
experts, top-8, uniform routing, the same tokens in each part. The experts of the check multiply by a factor of their own, and
the result is compared with the float32 sum before anything is timed.

parts:  link        what a GPU pushes into and pulls out of another GPU's memory
        bfloat16    symmetric, AgRs
        fp8         symmetric: rows given as fp8 with scales, rows that a kernel before the dispatch casts, and rows that
                    the dispatch itself casts
        sorted      symmetric, rows sorted by expert
        sms         symmetric on some multiprocessors
        products    four exchanges on a stream of their own beside two matrix products
        eager       no graph: symmetric and all2all as vLLM's manager, AgRs
        flashinfer  FlashInfer's one-sided exchange, where the module flashinfer.moe_ep is installed
        deep_ep     DeepEP's low-latency kernels, where deep_ep is installed

A time is that of a call in a CUDA graph of calls in a row, in us, of the slowest rank: median, p10 and p90. dispatch and
combine by themselves are events around each, on a stream that is kept full.
"""

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.strategies.dispatch.base import RoutedTokens
from vllm_npu.strategies.pipeline import MoEPipeline
from vllm_npu.strategies.select import build
from vllm_npu.tools.gpu_clock import SPIN_CYCLES, graph_of, microseconds
from vllm_npu.tools.launch import ProcessRankPool, Rank
from vllm_npu.tools.peers import open_flashinfer
from vllm_npu.transport.symmetric_memory import open_push

HIDDEN, EXPERTS, TOP_K = 7168, 256, 8
GROUP = 128  # columns of a scale
TOKENS = (1, 8, 32, 128, 512, 1024, 2048, 4096)
SORTED_TOKENS = (1, 8, 32, 128, 512, 1024, 4096)
SMS = (None, 8, 16, 24, 48)
EAGER_TOKENS = (8, 128, 512, 4096)
GEMM = 8192
CALLS, SAMPLES = 10, 30
BOUND = {torch.bfloat16: 0.012, torch.float8_e4m3fn: 0.06}  # largest relative error of a row

Row = dict[str, Any]
State = Any


@dataclass(frozen=True, slots=True)
class Exchange:
    """dispatch() -> state, experts(state) -> rows, combine(state, rows) -> [num_tokens, HIDDEN]."""

    name: str
    dispatch: Callable[[], State]
    experts: Callable[[State], torch.Tensor]
    combine: Callable[[State, torch.Tensor], torch.Tensor]
    sent_as: torch.dtype = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of one rank."""

    x: torch.Tensor  # [num_tokens, HIDDEN] bfloat16
    weights: torch.Tensor  # [num_tokens, TOP_K] float32
    ids: torch.Tensor  # [num_tokens, TOP_K] int32

    @classmethod
    def of(cls, rank: int, num_tokens: int) -> "Batch":
        generator = torch.Generator("cuda").manual_seed(100_000 * rank + num_tokens)
        x = torch.randn(num_tokens, HIDDEN, device="cuda", generator=generator).bfloat16()
        logits = torch.randn(num_tokens, EXPERTS, device="cuda", generator=generator)
        weights, ids = torch.topk(logits.softmax(-1), TOP_K)
        return cls(x, (weights / weights.sum(-1, keepdim=True)).contiguous(), ids.int())

    def error(self, output: torch.Tensor) -> float:
        """The largest relative error of a row of `output`; nan where something is not finite."""
        expected = self.x.float() * (self.weights * factor(self.ids)).sum(-1, keepdim=True)
        return float(((output.float() - expected).norm(dim=1) / expected.norm(dim=1)).max())


def factor(expert: torch.Tensor) -> torch.Tensor:
    """What an expert multiplies by."""
    return 0.5 + (expert % 7).float() * 0.25


def of_own_experts(rank: Rank, local_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[rows, 1]: the sum over a row's local experts of weight * factor. local_ids: -1 where there is none."""
    own = local_ids >= 0
    first = rank.rank * (EXPERTS // rank.num_ranks)
    return torch.where(own, weights * factor(local_ids.clamp(min=0) + first), 0.0).sum(-1, keepdim=True)


def local(rank: Rank, ids: torch.Tensor) -> torch.Tensor:
    per_rank = EXPERTS // rank.num_ranks
    found = ids - rank.rank * per_rank
    return torch.where((found >= 0) & (found < per_rank), found, -1)


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp8 rows, and a float32 scale for each GROUP columns."""
    groups = x.float().view(x.shape[0], -1, GROUP)
    scales = groups.abs().amax(-1).clamp(min=1e-4) / 448.0
    return (groups / scales[..., None]).to(torch.float8_e4m3fn).view(x.shape), scales.contiguous()


def widened(rows: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    if scales is None:
        return rows.float()
    return (rows.float().view(rows.shape[0], -1, GROUP) * scales[..., None]).view(rows.shape)


@triton.jit
def cast_kernel(
    rows, scales, x, num_groups, GROUP: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """What `quantised` does, in one kernel. GROUPS: of a program."""
    groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    real = groups < num_groups
    at = groups[:, None].to(tl.int64) * GROUP + tl.arange(0, GROUP)[None, :]
    values = tl.load(x + at, mask=real[:, None], other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(values), 1), 1e-10)
    tl.store(scales + groups, largest * (1.0 / 448.0), mask=real)
    cast = (values * tl.div_rn(448.0, largest)[:, None]).to(tl.float8e4nv)
    tl.store(rows + at, cast, mask=real[:, None])


def cast_on_gpu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, num_groups = torch.empty_like(x, dtype=torch.float8_e4m3fn), x.numel() // GROUP
    scales = torch.empty(x.shape[0], x.shape[1] // GROUP, device="cuda")
    cast_kernel[(triton.cdiv(num_groups, 16),)](rows, scales, x, num_groups, GROUP=GROUP, GROUPS=16)
    return rows, scales


class Bench:
    """Checks and times exchanges on one rank."""

    def __init__(self, rank: Rank) -> None:
        self.rank, self.rows = rank, list[Row]()
        self._one = torch.zeros(1, device="cuda")

    def meet(self) -> None:
        """On the GPU: no rank goes on before all are here."""
        dist.all_reduce(self._one)

    def add(self, what: str, tokens: int, metric: str, us: list[float], **more: Any) -> None:
        """us: the samples of this rank."""
        own = torch.tensor(us, device="cuda", dtype=torch.float64)
        every = [torch.empty_like(own) for _ in range(self.rank.num_ranks)]
        dist.all_gather(every, own)
        slowest = torch.stack(every).amax(0)
        p10, p50, p90 = (round(float(slowest.quantile(share)), 2) for share in (0.1, 0.5, 0.9))
        row = {"what": what, "tokens": tokens, "metric": metric, "us_median": p50, "us_p10": p10, "us_p90": p90, **more}
        self.rows.append(row)
        if self.rank.rank == 0:
            print(f"{what:44} {tokens:5} {metric:10} {p50:9.2f} ({p10:.2f} to {p90:.2f})", flush=True)

    def in_graph(self, run: Callable[[], object], calls: int = CALLS, samples: int = SAMPLES) -> list[float]:
        replay = graph_of(run, calls)
        return [microseconds(replay, self.meet, head_start=True) / calls for _ in range(3 + samples)][3:]

    def apart(self, exchange: Exchange, rows: torch.Tensor, samples: int = SAMPLES) -> tuple[list[float], list[float]]:
        """dispatch and combine by events."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in range(3 + samples)]
        for i, (start, between, end) in enumerate(events):
            torch.cuda._sleep(3 * SPIN_CYCLES)
            self.meet()
            start.record()
            state = exchange.dispatch()
            between.record()
            exchange.combine(state, rows)
            end.record()
            if i % 8 == 7:
                torch.cuda.synchronize()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) * 1e3 for a, b, _ in events[3:]], [b.elapsed_time(c) * 1e3 for _, b, c in events[3:]]

    def check(self, exchange: Exchange, batch: Batch) -> torch.Tensor:
        """Raise AssertionError unless two exchanges give the sum. Returns rows of the experts."""
        rows = torch.empty(0)
        for _ in range(2):
            state = exchange.dispatch()
            rows = exchange.experts(state)
            error = batch.error(exchange.combine(state, rows))
            assert error < BOUND[exchange.sent_as], f"{exchange.name}: relative error of a row {error}"
        return rows

    def measure(self, exchange: Exchange, batch: Batch, calls: int = CALLS, samples: int = SAMPLES) -> None:
        rows, tokens = self.check(exchange, batch), batch.x.shape[0]
        self.add(
            exchange.name,
            tokens,
            "both",
            self.in_graph(lambda: exchange.combine(exchange.dispatch(), rows), calls, samples),
        )
        for metric, us in zip(("dispatch", "combine"), self.apart(exchange, rows, samples), strict=True):
            self.add(exchange.name, tokens, metric, us)


def pipeline_of(rank: Rank) -> MoEPipeline:
    pipeline = build("symmetric", rank.groups(tp_size=1, dp_size=rank.num_ranks), EXPERTS)
    pipeline.dispatcher.open(
        row_bytes=2 * HIDDEN, top_k=TOP_K, scale_width=HIDDEN // GROUP, returned_row_bytes=2 * HIDDEN
    )
    return pipeline


def symmetric(
    rank: Rank, pipeline: MoEPipeline, batch: Batch, name: str = "symmetric", *, in_window: bool = False
) -> Exchange:
    """prepare, dispatch_slots, combine_slots, finalize: what vLLM's experts get. in_window: they write into the window."""
    step = StepPlan(num_tokens_across_dp=(batch.x.shape[0],) * rank.num_ranks, sharding=TokenSharding.REPLICATED)

    def dispatch() -> State:
        prepared = pipeline.prepare_finalize.prepare(batch.x, (batch.weights, batch.ids), step)
        weights, ids = prepared.per_token
        return pipeline.dispatcher.dispatch_slots(prepared.hidden_states, weights, ids, prepared.mask), prepared.handle

    def combine(state: State, rows: torch.Tensor) -> torch.Tensor:
        combined = pipeline.dispatcher.combine_slots(rows, state[0].handle)
        return pipeline.prepare_finalize.finalize(combined, state[1]).hidden_states

    def experts(state: State) -> torch.Tensor:
        return placed(pipeline, state[0], slots_experts(rank, state[0]), in_window)

    def combine_where_it_lies(state: State, rows: torch.Tensor) -> torch.Tensor:
        return combine(state, placed(pipeline, state[0], rows, True, write=False))

    return Exchange(name, dispatch, experts, combine_where_it_lies if in_window else combine)


def placed(
    pipeline: MoEPipeline, slots: State, rows: torch.Tensor, in_window: bool, *, write: bool = True
) -> torch.Tensor:
    """The experts' rows, in the window if in_window says so. Timed calls do not write them again: no expert runs."""
    if not in_window:
        return rows
    memory = pipeline.dispatcher.combine_input(slots.handle, HIDDEN, torch.bfloat16)
    return memory.copy_(rows) if write else memory


def slots_experts(rank: Rank, slots: State) -> torch.Tensor:
    sums = of_own_experts(rank, slots.topk_ids, slots.topk_weights)
    filled = (slots.topk_ids >= 0).any(1, keepdim=True)
    return torch.where(filled, widened(slots.hidden_states, slots.scales) * sums, float("nan")).bfloat16()


def fp8(rank: Rank, pipeline: MoEPipeline, batch: Batch) -> Iterator[Exchange]:
    """Rows in fp8 with a scale for each GROUP columns; combine in bfloat16."""
    dispatcher = pipeline.dispatcher
    rows, scales = quantised(batch.x)
    fp8 = torch.float8_e4m3fn

    def given() -> State:
        return dispatcher.dispatch_slots(rows, batch.weights, batch.ids, scales=scales)

    def cast_before() -> State:
        own_rows, own_scales = cast_on_gpu(batch.x)
        return dispatcher.dispatch_slots(own_rows, batch.weights, batch.ids, scales=own_scales)

    def cast_by_dispatch() -> State:
        return dispatcher.dispatch_slots(batch.x, batch.weights, batch.ids, use_fp8=True)

    def experts(slots: State, in_window: bool) -> torch.Tensor:
        return placed(pipeline, slots, slots_experts(rank, slots), in_window)

    def combine(slots: State, y: torch.Tensor, in_window: bool) -> torch.Tensor:
        return dispatcher.combine_slots(placed(pipeline, slots, y, in_window, write=False), slots.handle)

    ways = {"scales given": given, "cast before": cast_before, "cast by dispatch": cast_by_dispatch}
    for way, dispatch in ways.items():
        for in_window in (False, True):
            name = f"symmetric fp8, {way}" + ", in its window" * in_window
            yield Exchange(
                name, dispatch, partial(experts, in_window=in_window), partial(combine, in_window=in_window), fp8
            )


def sorted_by_expert(rank: Rank, pipeline: MoEPipeline, batch: Batch) -> Exchange:
    dispatcher, first = pipeline.dispatcher, rank.rank * (EXPERTS // rank.num_ranks)
    tokens = RoutedTokens(hidden_states=batch.x, topk_weights=batch.weights, topk_ids=batch.ids)

    def experts(dispatched: State) -> torch.Tensor:
        rows = torch.arange(dispatched.expert_input.shape[0], device="cuda")
        expert = torch.searchsorted(dispatched.tokens_per_expert.cumsum(0), rows, right=True)
        return (dispatched.expert_input.float() * factor(expert + first)[:, None]).bfloat16()

    return Exchange(
        "symmetric, rows sorted by expert",
        lambda: dispatcher.dispatch(tokens),
        experts,
        lambda dispatched, rows: dispatcher.combine(rows, dispatched.handle),
    )


def agrs(rank: Rank, batch: Batch) -> Exchange:
    """vLLM's AgRs: tokens, weights and ids in one launch of NCCL; a reduce-scatter back."""

    def dispatch() -> State:
        gathered = [
            each.new_empty(rank.num_ranks * each.shape[0], each.shape[1])
            for each in (batch.x, batch.weights, batch.ids)
        ]
        with dist._coalescing_manager(device=rank.device):
            for whole, own in zip(gathered, (batch.x, batch.weights, batch.ids), strict=True):
                dist.all_gather_into_tensor(whole, own)
        return gathered

    def experts(state: State) -> torch.Tensor:
        x, weights, ids = state
        return (x.float() * of_own_experts(rank, local(rank, ids), weights)).bfloat16()

    def combine(_: State, rows: torch.Tensor) -> torch.Tensor:
        own = torch.empty_like(batch.x)
        dist.reduce_scatter_tensor(own, rows)
        return own

    return Exchange("AgRs", dispatch, experts, combine)


def link(bench: Bench) -> None:
    num_bytes = 64 << 20
    with open_push(bench.rank.groups(tp_size=1, dp_size=bench.rank.num_ranks).ep, num_bytes) as push:
        us = bench.in_graph(push, 4)
        bench.add("link", 0, "push", us, gb_per_s=round(num_bytes / 1e3 / sorted(us)[len(us) // 2], 1))


def few_sms(bench: Bench, pipeline: MoEPipeline, num_tokens: int) -> None:
    batch = Batch.of(bench.rank.rank, num_tokens)
    for max_sms in SMS:
        pipeline.dispatcher.max_sms = max_sms
        name = "all SMs" if max_sms is None else f"{max_sms} SMs"
        bench.measure(symmetric(bench.rank, pipeline, batch, name), batch, 4, 15)
        bench.measure(symmetric(bench.rank, pipeline, batch, name + ", in its window", in_window=True), batch, 4, 15)
    pipeline.dispatcher.max_sms = None


def beside_products(bench: Bench, pipeline: MoEPipeline, max_sms: int | None, leave: int | None) -> None:
    """leave: the SMs that cuBLASLt leaves alone."""
    batch = Batch.of(bench.rank.rank, 4096)
    pipeline.dispatcher.max_sms = max_sms
    exchange = symmetric(bench.rank, pipeline, batch, in_window=max_sms is not None)
    rows = bench.check(exchange, batch)
    a, b = (torch.randn(GEMM, GEMM, device="cuda").bfloat16() for _ in range(2))
    product, other = torch.empty_like(a), torch.cuda.Stream(priority=-1)

    def exchanges() -> None:
        for _ in range(4):
            exchange.combine(exchange.dispatch(), rows)

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

    torch.backends.cuda.preferred_blas_library("cublaslt")  # cuBLAS itself takes all multiprocessors
    torch._C._set_sm_carveout_experimental(leave)
    name = ("all SMs" if max_sms is None else f"{max_sms} SMs") + ("" if leave is None else f", products leave {leave}")
    for metric, run in (("exchanges", exchanges), ("products", products), ("both", both)):
        bench.add(name, 4096, metric, bench.in_graph(run, 2, 10))
    torch._C._set_sm_carveout_experimental(None)
    pipeline.dispatcher.max_sms = None


def eager(bench: Bench, num_tokens: int) -> None:
    """Host and GPU together: one call from idle to the end ("latency"), and calls in a row."""
    rank, batch = bench.rank, Batch.of(bench.rank.rank, num_tokens)
    groups = rank.groups(tp_size=1, dp_size=rank.num_ranks)
    step = StepPlan(num_tokens_across_dp=(num_tokens,) * rank.num_ranks, sharding=TokenSharding.REPLICATED)
    exchanges = [agrs(rank, batch)]
    for name in ("symmetric", "all2all"):
        pipeline = pipeline_of(rank) if name == "symmetric" else build(name, groups, EXPERTS)

        def dispatch(pipeline: MoEPipeline = pipeline) -> State:
            prepared = pipeline.prepare_finalize.prepare(batch.x, (batch.weights, batch.ids), step)
            return *pipeline.dispatcher.dispatch_with_ids(RoutedTokens.of(prepared)), prepared.handle

        def experts(state: State) -> torch.Tensor:
            sums = of_own_experts(rank, local(rank, state[0].topk_ids), state[0].topk_weights)
            return torch.where(sums > 0, state[0].rows.float() * sums, float("nan")).bfloat16()

        def combine(state: State, rows: torch.Tensor, pipeline: MoEPipeline = pipeline) -> torch.Tensor:
            combined = pipeline.dispatcher.combine_with_ids(rows, state[1])
            return pipeline.prepare_finalize.finalize(combined, state[2]).hidden_states

        exchanges.append(Exchange(name, dispatch, experts, combine))
    for exchange in exchanges:
        rows = bench.check(exchange, batch)
        latency, in_a_row = list[float](), list[float]()
        for series, calls, found in ((30, 1, latency), (15, 20, in_a_row)):
            for _ in range(series):
                bench.meet()
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    exchange.combine(exchange.dispatch(), rows)
                torch.cuda.synchronize()
                found.append((time.perf_counter() - start) * 1e6 / calls)
        bench.add(exchange.name, num_tokens, "latency", latency)
        bench.add(exchange.name, num_tokens, "in a row", in_a_row)


def flashinfer(rank: Rank) -> Callable[[Batch], Iterator[Exchange]]:
    """FlashInfer's one-sided exchange: the experts' rows are copied into its buffer, or written there by the experts."""
    communication = open_flashinfer(
        rank.rank, rank.num_ranks, EXPERTS, top_k=TOP_K, max_tokens=max(TOKENS), hidden=HIDDEN, dtype=torch.bfloat16
    )

    def exchanges(batch: Batch) -> Iterator[Exchange]:
        rows8, scales8 = quantised(batch.x)
        for fp8 in (False, True):
            for in_place in (False, True):

                def dispatch(fp8: bool = fp8) -> State:
                    rows = rows8.view(torch.uint8) if fp8 else batch.x
                    scales = {"hidden_states_scale": scales8} if fp8 else {}
                    most = batch.x.shape[0]
                    return communication.dispatch(
                        rows, batch.ids, batch.weights, runtime_max_tokens_per_rank=most, **scales
                    )

                def experts(state: State, fp8: bool = fp8, in_place: bool = in_place) -> torch.Tensor:
                    ids, rows = local(rank, state.topk_ids), state.hidden_states
                    wide = widened(rows.view(torch.float8_e4m3fn) if fp8 else rows, state.hidden_states_scale)
                    own = wide * of_own_experts(rank, ids, state.topk_weights)
                    y = torch.where((ids >= 0).any(1, keepdim=True), own, 0.0).bfloat16()
                    return communication.get_combine_input_buffer(torch.bfloat16).copy_(y) if in_place else y

                name = (
                    "FlashInfer" + " fp8, scales given" * fp8 + (", in its buffer" if in_place else ", with its copy")
                )
                kind = torch.float8_e4m3fn if fp8 else torch.bfloat16
                yield Exchange(name, dispatch, experts, lambda _, rows: communication.combine(rows), kind)

    return exchanges


def deep_ep(rank: Rank) -> Callable[[Batch], Iterator[Exchange]]:
    """DeepEP's low-latency kernels: rows packed by expert, counts on the GPU, weights applied in combine."""
    import os

    os.environ["NVSHMEM_QP_DEPTH"] = str(4 * 1024 + 64)
    import deep_ep

    per_rank = EXPERTS // rank.num_ranks
    size = deep_ep.Buffer.get_low_latency_rdma_size_hint(1024, HIDDEN, rank.num_ranks, EXPERTS)
    buffer = deep_ep.Buffer(dist.group.WORLD, num_rdma_bytes=size, low_latency_mode=True, num_qps_per_rank=per_rank)
    factors = factor(torch.arange(per_rank, device="cuda") + rank.rank * per_rank).bfloat16()[:, None, None]

    def exchanges(batch: Batch) -> Iterator[Exchange]:
        if batch.x.shape[0] > 1024:
            return
        ids, capacity = batch.ids.to(deep_ep.topk_idx_t), max(batch.x.shape[0], 2)
        buffer.clean_low_latency_buffer(capacity, HIDDEN, EXPERTS)

        def dispatch() -> State:
            rows, _, handle, _, _ = buffer.low_latency_dispatch(batch.x, ids, capacity, EXPERTS, use_fp8=False)
            return rows, handle

        yield Exchange(
            "DeepEP low latency",
            dispatch,
            lambda state: state[0] * factors,
            lambda state, rows: buffer.low_latency_combine(rows, ids, batch.weights, state[1])[0],
        )

    return exchanges


def run(rank: Rank, part: str, tokens: tuple[int, ...]) -> list[Row]:
    bench = Bench(rank)
    if part == "link":
        link(bench)
    elif part == "eager":
        for num_tokens in EAGER_TOKENS:
            eager(bench, num_tokens)
    elif part in LIBRARIES:
        exchanges = LIBRARIES[part](rank)
        for num_tokens in tokens:
            batch = Batch.of(rank.rank, num_tokens)
            for exchange in exchanges(batch):
                bench.measure(exchange, batch)
    else:
        pipeline = pipeline_of(rank)
        if part == "sms":
            for num_tokens in (512, 4096):
                few_sms(bench, pipeline, num_tokens)
        elif part == "products":
            for max_sms in (None, 8, 16, 24):
                for leave in (None, max_sms) if max_sms else (None,):
                    beside_products(bench, pipeline, max_sms, leave)
        else:
            for num_tokens in SORTED_TOKENS if part == "sorted" else tokens:
                batch = Batch.of(rank.rank, num_tokens)
                if part == "bfloat16":
                    found = [
                        symmetric(rank, pipeline, batch),
                        symmetric(rank, pipeline, batch, "symmetric, in its window", in_window=True),
                        agrs(rank, batch),
                    ]
                else:
                    found = (
                        list(fp8(rank, pipeline, batch)) if part == "fp8" else [sorted_by_expert(rank, pipeline, batch)]
                    )
                for exchange in found:
                    bench.measure(exchange, batch)
        pipeline.dispatcher.check_failed()
    return bench.rows


LIBRARIES = {"flashinfer": flashinfer, "deep_ep": deep_ep}
PARTS = ("link", "bfloat16", "fp8", "sorted", "sms", "products", "eager", *LIBRARIES)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    options = parser.parse_args()
    tokens = tuple(map(int, options.tokens.split(",")))
    rows: list[Row] = []
    pool = ProcessRankPool(options.ranks, timeout=60, transport="nccl")
    for entry in options.parts.split(","):
        part = entry.split("#")[0]
        if part in LIBRARIES and importlib.util.find_spec(part) is None:
            print(f"{part} is not installed")
            continue
        started = time.monotonic()
        if part in LIBRARIES:  # in processes of its own
            pool.close()
        outcome = pool.outcomes(run, part, tokens)[0]
        if part in LIBRARIES or isinstance(outcome, BaseException):
            pool.close()
        if isinstance(outcome, BaseException):
            rows.append({"part": entry, "what": "error", "error": f"{type(outcome).__name__}: {outcome}"[:2000]})
            print(rows[-1], flush=True)
        else:
            rows += [
                {"part": entry, "device": torch.cuda.get_device_name(), "ranks": options.ranks, **row}
                for row in outcome
            ]
        options.path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(f"== {entry}: {time.monotonic() - started:.0f} s", flush=True)
    pool.close()


if __name__ == "__main__":
    main()
