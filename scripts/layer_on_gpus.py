"""Times of a whole mixture-of-experts layer between GPUs of one host: its exchange, its experts, both, and both at once.

`python scripts/layer_on_gpus.py OUT.json [--ranks 2] [--models qwen3,deepseek] [--tokens 128,...] [--vllm-kernels FILE]`.
bfloat16, random weights, uniform routing. A layer is checked against a float64 product of some tokens before it is timed.
FILE is vLLM's `model_executor/layers/fused_moe/fused_moe.py`, if vLLM is not installed: its kernel `fused_moe_kernel` is
compiled out of it. The kernels around it (placing pairs, activation, sum of a token's rows) are of this script.

exchange    dispatch and combine of symmetric without experts: combine sends, or takes out of windows
experts     the experts alone, on rows that a dispatch brought: "vLLM" is its kernel with the configuration that vLLM
            chooses, and an activation over all rows, as in vLLM; "fused" has the activation in the first product;
            "grouped_mm" is torch's, on sorted rows
layer       AgRs or symmetric, with these experts. "adds up in combine": combine reads the experts' rows of a token itself.
            "halves": two halves of the tokens are in flight, on two streams, and exchanges take 24 multiprocessors.
            "places known": the pairs are sorted beside the dispatch, by ids that an earlier dispatch brought. This is no way
            to run a layer: it shows what a dispatch that brings ids before rows could save

A time is that of a call in a CUDA graph of calls in a row, in us, of the slowest rank: median, p10 and p90.
"""

import argparse
import ast
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from exchange_on_gpus import Bench, Row, agrs, link
from triton.tools.tensor_descriptor import TensorDescriptor

from vllm_npu.strategies.dispatch.base import RoutedTokens
from vllm_npu.strategies.dispatch.symmetric import (
    TAKE_MAX_TOKENS,
    DispatchedSlots,
    SymmetricDispatcher,
    SymmetricHandle,
)
from vllm_npu.tools.launch import ProcessRankPool, Rank
from vllm_npu.transport.kernels.permute import rank_pairs_kernel

TOKENS = (128, 512, 1024, 2048, 4096)
SAMPLES = 20
BOUND = 0.02  # largest relative error of a token: bfloat16 rows, activations and sums
CHECKED = 4  # tokens of each rank
SHARE = 24  # multiprocessors of an exchange beside experts


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a layer."""

    name: str
    hidden: int
    inner: int
    experts: int
    top_k: int = 8


MODELS = {
    "qwen3": Model("Qwen3-30B-A3B", 2048, 768, 128),
    "deepseek": Model("DeepSeek-V3", 7168, 2048, 256),
}


@triton.jit
def local_ids_kernel(local, ids, first, num, PER_RANK: tl.constexpr, BLOCK: tl.constexpr):
    """Global ids to ids of this rank's experts, -1 for those of other ranks."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(ids + at, mask=at < num, other=-1) - first
    tl.store(local + at, tl.where((own >= 0) & (own < PER_RANK), own, -1), mask=at < num)


@triton.jit
def place_kernel(
    order,  # [most rows] int32: the pair in each place; filled with num_pairs before
    positions,  # [num_pairs] int32: the place of each pair
    block_experts,  # [most blocks] int32
    num_places,  # [1] int32
    ranks,  # [num_pairs] int32, of rank_pairs_kernel
    counts,  # [EXPERTS] int64
    ids,  # [num_pairs] int32, local, -1: none
    num_pairs,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Give each expert a whole number of blocks of BLOCK_M places, and each pair a place among its expert's."""
    experts = tl.arange(0, EXPERTS)
    blocks = (tl.load(counts + experts).to(tl.int32) + BLOCK_M - 1) // BLOCK_M
    first = tl.cumsum(blocks, 0) - blocks
    pairs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(ids + pairs, mask=pairs < num_pairs, other=-1)
    starts = tl.sum(tl.where(experts[None, :] == own[:, None], first[None, :], 0), 1) * BLOCK_M
    place = starts + tl.load(ranks + pairs, mask=own >= 0, other=0)
    tl.store(positions + pairs, place, mask=own >= 0)
    tl.store(order + place, pairs, mask=own >= 0)
    if tl.program_id(0) == 0:
        tl.store(num_places, tl.sum(blocks, 0) * BLOCK_M)
    for expert in tl.range(tl.program_id(0), EXPERTS, tl.num_programs(0)):
        start = tl.sum(tl.where(experts == expert, first, 0), 0)
        for block in tl.range(0, tl.sum(tl.where(experts == expert, blocks, 0), 0)):
            tl.store(block_experts + start + block, expert)


@triton.jit
def _tile(num_places, num_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Block of rows and block of columns of this program: neighbours share rows and columns. The first is -1 past the end."""
    blocks = tl.load(num_places) // BLOCK_M
    columns = tl.cdiv(num_columns, BLOCK_N)
    group, inside = tl.program_id(0) // (GROUP * columns), tl.program_id(0) % (GROUP * columns)
    size = tl.minimum(blocks - group * GROUP, GROUP)
    real = inside < size * columns
    size = tl.maximum(size, 1)
    return tl.where(real, group * GROUP + inside % size, -1), inside // size


@triton.jit
def gate_up_kernel(
    inner,  # [most rows, INNER] bfloat16
    rows,  # [num_slots, HIDDEN] bfloat16
    weights,  # descriptor of [experts * 2 * INNER, HIDDEN]: of each expert the gate's rows, then the others
    order,
    block_experts,
    num_places,
    num_pairs,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """inner = silu(rows x gate) * (rows x up), for the pairs in order."""
    block, column = _tile(num_places, INNER, BLOCK_M, BLOCK_N, GROUP)
    if block < 0:
        return
    expert = tl.load(block_experts + block)
    places = block * BLOCK_M + tl.arange(0, BLOCK_M)
    pairs = tl.load(order + places)
    real = pairs < num_pairs
    slots = tl.where(real, pairs // TOP_K, 0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    source = rows + slots[:, None] * HIDDEN + k[None, :]
    gate_at = expert * (2 * INNER) + column * BLOCK_N
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, HIDDEN, BLOCK_K):
        x = tl.load(source + start, mask=real[:, None], other=0.0)
        gate = tl.dot(x, weights.load([gate_at, start]).T, gate)
        up = tl.dot(x, weights.load([gate_at + INNER, start]).T, up)
    value = gate / (1 + tl.exp(-gate)) * up
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(inner + places[:, None].to(tl.int64) * INNER + columns[None, :], value.to(tl.bfloat16), mask=real[:, None])


@triton.jit
def down_kernel(
    output,  # [most rows, HIDDEN] bfloat16
    inner,  # [most rows, INNER] bfloat16
    weights,  # descriptor of [experts * HIDDEN, INNER]
    order,
    block_experts,
    num_places,
    num_pairs,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """output = inner x weights, for the pairs in order."""
    block, column = _tile(num_places, HIDDEN, BLOCK_M, BLOCK_N, GROUP)
    if block < 0:
        return
    expert = tl.load(block_experts + block)
    places = block * BLOCK_M + tl.arange(0, BLOCK_M)
    real = tl.load(order + places) < num_pairs
    k = tl.arange(0, BLOCK_K)
    source = inner + places[:, None].to(tl.int64) * INNER + k[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, INNER, BLOCK_K):
        x = tl.load(source + start, mask=real[:, None], other=0.0)
        total = tl.dot(x, weights.load([expert * HIDDEN + column * BLOCK_N, start]).T, total)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(
        output + places[:, None].to(tl.int64) * HIDDEN + columns[None, :], total.to(tl.bfloat16), mask=real[:, None]
    )


@triton.jit
def sum_kernel(
    output,  # [num_slots, WIDTH] bfloat16
    rows,  # [any, WIDTH] bfloat16
    positions,  # [num_slots, TOP_K] int32: row of each pair; BY_PAIR: not read, the pair's number is its row
    ids,  # [num_slots, TOP_K] int32; -1: the pair has no row
    weights,  # [num_slots, TOP_K] float32; BY_PAIR: not read, rows have their weight
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    BY_PAIR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """output[slot] = sum over k of weight * row, in float32; zeros without a row."""
    slot = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        pair = slot * TOP_K + k
        has_row = tl.load(ids + pair) >= 0
        position, weight = pair, 1.0
        if not BY_PAIR:
            position = tl.load(positions + pair, mask=has_row, other=0).to(tl.int64)
            weight = tl.load(weights + pair)
        row = tl.load(rows + position * WIDTH + columns, mask=inside & has_row, other=0.0)
        total += weight * row.to(tl.float32)
    tl.store(output + slot * WIDTH + columns, total.to(tl.bfloat16), mask=inside)


@triton.jit
def activation_kernel(output, x, INNER: tl.constexpr, BLOCK: tl.constexpr):
    """output[row] = silu(x[row, :INNER]) * x[row, INNER:], for every row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < INNER
    gate = tl.load(x + row * 2 * INNER + columns, mask=inside).to(tl.float32)
    up = tl.load(x + row * 2 * INNER + INNER + columns, mask=inside).to(tl.float32)
    tl.store(output + row * INNER + columns, (gate / (1 + tl.exp(-gate)) * up).to(tl.bfloat16), mask=inside)


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut."""

    m: int
    n: int
    k: int
    group: int
    warps: int
    stages: int


def tiles_for(rows: float) -> list[tuple[Tile, Tile]]:
    """Tiles of both products to try, for experts of about this many rows."""
    if rows <= 24:
        return [(Tile(16, 64, 128, 1, 4, 3), Tile(16, 128, 128, 1, 4, 3))]
    if rows <= 80:
        return [(Tile(64, 64, 64, 4, 4, 4), Tile(64, 128, 64, 4, 4, 4))]
    return [
        (Tile(128, 64, 64, 8, 8, 3), Tile(128, 128, 64, 8, 8, 3)),
        (Tile(128, 128, 64, 8, 8, 4), Tile(128, 256, 64, 8, 8, 4)),
    ]


@dataclass(frozen=True, slots=True)
class Placed:
    """Pairs of slots and choices, sorted by expert."""

    order: torch.Tensor
    positions: torch.Tensor
    block_experts: torch.Tensor
    num_places: torch.Tensor


class Layer:
    """The experts of one rank, and the tokens of all."""

    def __init__(self, rank: Rank, model: Model, vllm_kernels: str | None) -> None:
        self.rank, self.model = rank, model
        self.per_rank = model.experts // rank.num_ranks
        self.first = rank.rank * self.per_rank
        self.w13 = torch.empty(self.per_rank, 2 * model.inner, model.hidden, device="cuda", dtype=torch.bfloat16)
        self.w2 = torch.empty(self.per_rank, model.hidden, model.inner, device="cuda", dtype=torch.bfloat16)
        for expert in range(self.per_rank):
            self.w13[expert], self.w2[expert] = weights_of(model, self.first + expert)
        self.fused_moe_kernel = vllm_kernel(vllm_kernels)
        self.dispatcher = SymmetricDispatcher(rank.groups(tp_size=1, dp_size=rank.num_ranks), model.experts)
        self.dispatcher.open(row_bytes=2 * 7168, top_k=model.top_k)

    def tokens(self, num_tokens: int) -> RoutedTokens:
        generator = torch.Generator("cuda").manual_seed(100_000 * self.rank.rank + num_tokens)
        x = torch.randn(num_tokens, self.model.hidden, device="cuda", generator=generator).bfloat16()
        logits = torch.randn(num_tokens, self.model.experts, device="cuda", generator=generator)
        weights, ids = torch.topk(logits.softmax(-1), self.model.top_k)
        weights = (weights / weights.sum(-1, keepdim=True)).contiguous()
        return RoutedTokens(hidden_states=x, topk_weights=weights, topk_ids=ids.int())

    def error(self, tokens: RoutedTokens, output: torch.Tensor) -> float:
        """The largest relative error of a token of the first few, against float64."""
        errors = []
        for t in range(min(CHECKED, output.shape[0])):
            x, expected = tokens.hidden_states[t].double(), 0.0
            for weight, expert in zip(tokens.topk_weights[t].double(), tokens.topk_ids[t].tolist(), strict=True):
                w13, w2 = (each.double() for each in weights_of(self.model, expert))
                gate, up = (w13 @ x).chunk(2)
                expected += weight * (w2 @ (torch.nn.functional.silu(gate) * up))
            errors.append(float((output[t].double() - expected).norm() / expected.norm()))
        finite = bool(output.isfinite().all())
        return max(errors) if finite else float("nan")

    def place(self, ids: torch.Tensor, block_m: int) -> Placed:
        """ids: [slots, top_k] int32, local."""
        num_pairs = ids.numel()
        most = num_pairs + self.per_rank * block_m
        ranks, positions = torch.empty_like(ids), torch.empty_like(ids)
        counts = torch.empty(self.per_rank, dtype=torch.int64, device="cuda")
        block = min(4096, triton.next_power_of_2(num_pairs))
        rank_pairs_kernel[(self.per_rank,)](
            ranks, counts, ids, num_pairs, PAIRS=block, DEPENDENT_LAUNCH=False, num_warps=min(16, max(1, block // 256))
        )
        order = torch.full((most,), num_pairs, dtype=torch.int32, device="cuda")
        block_experts = torch.empty(most // block_m, dtype=torch.int32, device="cuda")
        num_places = torch.empty(1, dtype=torch.int32, device="cuda")
        place_kernel[(triton.cdiv(num_pairs, 256),)](
            order, positions, block_experts, num_places, ranks, counts, ids, num_pairs,
            EXPERTS=self.per_rank, BLOCK_M=block_m, BLOCK=256, num_warps=8,
        )  # fmt: skip
        return Placed(order, positions, block_experts, num_places)

    def products(self, rows: torch.Tensor, placed: Placed, num_pairs: int, tiles: tuple[Tile, Tile]) -> torch.Tensor:
        """Each pair's row of its expert, at its place."""
        model, most = self.model, placed.order.shape[0]
        inner, output = rows.new_empty(most, model.inner), rows.new_empty(most, model.hidden)
        shared = (placed.order, placed.block_experts, placed.num_places, num_pairs)
        first, second = tiles
        grid = (triton.cdiv(most, first.m) * triton.cdiv(model.inner, first.n),)
        gate_up_kernel[grid](
            inner, rows, descriptor(self.w13, first), *shared,
            TOP_K=model.top_k, HIDDEN=model.hidden, INNER=model.inner, BLOCK_M=first.m, BLOCK_N=first.n,
            BLOCK_K=first.k, GROUP=first.group, num_warps=first.warps, num_stages=first.stages,
        )  # fmt: skip
        grid = (triton.cdiv(most, second.m) * triton.cdiv(model.hidden, second.n),)
        down_kernel[grid](
            output, inner, descriptor(self.w2, second), *shared,
            HIDDEN=model.hidden, INNER=model.inner, BLOCK_M=second.m, BLOCK_N=second.n, BLOCK_K=second.k,
            GROUP=second.group, num_warps=second.warps, num_stages=second.stages,
        )  # fmt: skip
        return output

    def fused(self, slots: DispatchedSlots, tiles: tuple[Tile, Tile]) -> tuple[torch.Tensor, Placed]:
        """Rows of pairs, and their places."""
        placed = self.place(slots.topk_ids, tiles[0].m)
        return self.products(slots.hidden_states, placed, slots.topk_ids.numel(), tiles), placed

    def summed(
        self, out: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor, placed: Placed | None, weights: torch.Tensor
    ) -> torch.Tensor:
        """Each slot's weighted sum of its rows. placed None: rows have their weights, and lie in the order of pairs."""
        positions = ids if placed is None else placed.positions
        sum_kernel[(ids.shape[0], triton.cdiv(rows.shape[1], 1024))](
            out, rows, positions, ids, weights,
            WIDTH=rows.shape[1], TOP_K=ids.shape[1], BY_PAIR=placed is None, BLOCK=1024,
        )  # fmt: skip
        return out

    def fused_sum(self, slots: DispatchedSlots, tiles: tuple[Tile, Tile], out: torch.Tensor) -> torch.Tensor:
        rows, placed = self.fused(slots, tiles)
        return self.summed(out, rows, slots.topk_ids, placed, slots.topk_weights)

    def vllm(
        self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, config: dict[str, int], out: torch.Tensor
    ) -> torch.Tensor:
        """As vLLM's TritonExperts does it: ids are local, and pairs of other ranks' experts are left out of the products."""
        model = self.model
        num_pairs = ids.numel()
        placed = self.place(ids, config["BLOCK_SIZE_M"])
        both, inner, each = (
            rows.new_empty(num_pairs, 2 * model.inner),
            rows.new_empty(num_pairs, model.inner),
            rows.new_empty(num_pairs, model.hidden),
        )

        def product(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, top_k: int, by_weight: bool) -> None:
            most = placed.order.shape[0]
            grid = (triton.cdiv(most, config["BLOCK_SIZE_M"]) * triton.cdiv(b.shape[1], config["BLOCK_SIZE_N"]),)
            self.fused_moe_kernel[grid](
                a, b, c, None, None, None, weights, placed.order, placed.block_experts, placed.num_places,
                b.shape[1], b.shape[2], most, num_pairs, a.stride(0), a.stride(1), b.stride(0), b.stride(2),
                b.stride(1), c.stride(0), c.stride(1), 0, 0, 0, 0, 0, 0, 0, 0, 0,
                naive_block_assignment=False, SPLIT_K=1, MUL_ROUTED_WEIGHT=by_weight, top_k=top_k,
                compute_type=tl.bfloat16, use_fp8_w8a8=False, use_int8_w8a8=False, use_int8_w8a16=False,
                per_channel_quant=False, HAS_BIAS=False, SWAP_AB=False, **config,
            )  # fmt: skip

        product(rows, self.w13, both, model.top_k, False)
        block = min(1024, triton.next_power_of_2(model.inner))
        activation_kernel[(num_pairs, triton.cdiv(model.inner, block))](inner, both, INNER=model.inner, BLOCK=block)
        product(inner, self.w2, each, 1, True)
        return self.summed(out, each, ids, None, weights)

    def local(self, ids: torch.Tensor) -> torch.Tensor:
        local = torch.empty_like(ids)
        local_ids_kernel[(triton.cdiv(ids.numel(), 1024),)](
            local, ids, self.first, ids.numel(), PER_RANK=self.per_rank, BLOCK=1024
        )
        return local


def weights_of(model: Model, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """w13 and w2 of an expert, the same on every rank."""
    generator = torch.Generator("cuda").manual_seed(expert)
    w13 = torch.randn(2 * model.inner, model.hidden, device="cuda", generator=generator) * model.hidden**-0.5
    w2 = torch.randn(model.hidden, model.inner, device="cuda", generator=generator) * model.inner**-0.5
    return w13.bfloat16(), w2.bfloat16()


def descriptor(weights: torch.Tensor, tile: Tile) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(weights.view(-1, weights.shape[2]), [tile.n, tile.k])


@cache
def vllm_kernel(path: str | None) -> Any:
    """vLLM's fused_moe_kernel, or None."""
    if path is None:
        return None
    source = Path(path).read_text(encoding="utf-8")
    wanted = ("write_zeros_to_output", "fused_moe_kernel")
    functions = [each for each in ast.parse(source).body if isinstance(each, ast.FunctionDef) and each.name in wanted]
    lines = source.splitlines()
    text = "import triton\nimport triton.language as tl\n\n\n"
    for each in functions:
        text += "\n".join(lines[each.decorator_list[0].lineno - 1 : each.end_lineno]) + "\n\n\n"
    folder = tempfile.mkdtemp()
    Path(folder, "vllm_moe_kernel.py").write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("vllm_moe_kernel", Path(folder, "vllm_moe_kernel.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["vllm_moe_kernel"] = module
    spec.loader.exec_module(module)
    return module.fused_moe_kernel


def vllm_config(num_slots: int, experts: int) -> dict[str, int]:
    """What vLLM 0.32 chooses for bfloat16 where it has no tuned table: no table names an H200 with these experts."""
    big = num_slots > 512
    return {
        "BLOCK_SIZE_M": 128 if big else 64 if num_slots > 96 else 32,
        "BLOCK_SIZE_N": 128,
        "BLOCK_SIZE_K": 64,
        "GROUP_SIZE_M": 16 if num_slots // experts > 128 else 1,
        "num_warps": 8 if num_slots > 128 else 4,
        "num_stages": 3,
    }


VLLM_TUNED = {
    "BLOCK_SIZE_M": 128,
    "BLOCK_SIZE_N": 256,
    "BLOCK_SIZE_K": 64,
    "GROUP_SIZE_M": 16,
    "num_warps": 8,
    "num_stages": 4,
}
"""vLLM's table for 128 experts with inner size 768 on an H200, from 4096 rows on."""


def measure(bench: Bench, layer: Layer, num_tokens: int) -> None:
    model, dispatcher, ranks = layer.model, layer.dispatcher, layer.rank.num_ranks
    tokens = layer.tokens(num_tokens)
    x, weights, ids = tokens.hidden_states, tokens.topk_weights, tokens.topk_ids
    num_slots = ranks * num_tokens
    scratch = x.new_empty(num_slots, model.hidden)
    calls = 4 if num_tokens >= 1024 or model.hidden > 4096 else 10

    def add(kind: str, name: str, run: Callable[[], object], check: bool = False, **more: Any) -> float:
        if check:
            for _ in range(2):
                output = run()
                error = worst(layer.error(tokens, output))
                if not error < BOUND:
                    bench.add(f"{model.name} {name}", num_tokens, "WRONG", [0.0], error=error)
                    return float("inf")
        us = bench.in_graph(run, calls, SAMPLES)
        bench.add(f"{model.name} {name}", num_tokens, kind, us, **more)
        return sorted(us)[len(us) // 2]

    def sent() -> DispatchedSlots:
        return dispatcher.dispatch_slots(x, weights, ids)

    def window(slots: DispatchedSlots) -> torch.Tensor:
        return dispatcher.combine_input(slots.handle, model.hidden, x.dtype)

    add("exchange", "combine sends", lambda: dispatcher.combine_slots(scratch, sent().handle))

    def taken() -> torch.Tensor:
        slots = sent()
        return dispatcher.combine_slots(window(slots), slots.handle)

    add("exchange", "combine takes", taken)
    peer = agrs(layer.rank, _Batch(x, weights, ids))
    add("exchange", "AgRs", lambda: peer.combine(None, peer.dispatch()[0]))

    # The experts alone, on the rows of one dispatch.
    slots = sent()
    rows, slot_ids, slot_weights = slots.hidden_states.clone(), slots.topk_ids.clone(), slots.topk_weights.clone()
    dispatcher.combine_slots(scratch, slots.handle)
    still = slots._replace(hidden_states=rows, topk_ids=slot_ids, topk_weights=slot_weights)
    rows_per_expert = num_tokens * model.top_k * ranks / model.experts
    best, tiles = float("inf"), tiles_for(rows_per_expert)[0]
    for number, each in enumerate(tiles_for(rows_per_expert)):
        us = add("experts", f"fused, tiles {number}", lambda each=each: layer.fused_sum(still, each, scratch))
        us = worst(us)  # equal on all ranks, so that all choose alike
        if us < best:
            best, tiles = us, each
    add("part", "placing", lambda: layer.place(slot_ids, tiles[0].m))
    placed = layer.place(slot_ids, tiles[0].m)
    add("part", "both products", lambda: layer.products(rows, placed, slot_ids.numel(), tiles))
    configs = {"": vllm_config(num_slots, layer.per_rank)}
    if num_slots >= 1024:
        configs[", tuned"] = VLLM_TUNED
    if layer.fused_moe_kernel is not None:
        for suffix, config in configs.items():
            add(
                "experts",
                "vLLM" + suffix,
                lambda config=config: layer.vllm(rows, slot_ids, slot_weights, config, scratch),
            )

    # Layers.
    if layer.fused_moe_kernel is not None:
        for suffix, config in configs.items():

            def with_agrs(config: dict[str, int] = config) -> torch.Tensor:
                gathered, all_weights, all_ids = peer.dispatch()
                y = layer.vllm(gathered, layer.local(all_ids), all_weights, config, torch.empty_like(gathered))
                return peer.combine(None, y)

            def with_symmetric(config: dict[str, int] = config) -> torch.Tensor:
                slots = sent()
                out = window(slots) if num_tokens <= TAKE_MAX_TOKENS else scratch
                y = layer.vllm(slots.hidden_states, slots.topk_ids, slots.topk_weights, config, out)
                return dispatcher.combine_slots(y, slots.handle)

            add("layer", "AgRs, vLLM" + suffix, with_agrs, True)
            add("layer", "symmetric, vLLM" + suffix, with_symmetric, True)

    def apart() -> torch.Tensor:
        slots = sent()
        out = window(slots) if num_tokens <= TAKE_MAX_TOKENS else scratch
        return dispatcher.combine_slots(layer.fused_sum(slots, tiles, out), slots.handle)

    add("layer", "symmetric, fused", apart, True)

    def in_combine() -> torch.Tensor:
        slots = sent()
        y, placed = layer.fused(slots, tiles)
        return dispatcher.combine(y, sorted_handle(slots, y, placed))

    add("layer", "symmetric, fused, adds up in combine", in_combine, True)

    def places_known() -> torch.Tensor:
        main, side = torch.cuda.current_stream(), other_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            placed = layer.place(slot_ids, tiles[0].m)
        slots = sent()
        main.wait_stream(side)
        y = layer.products(slots.hidden_states, placed, slots.topk_ids.numel(), tiles)
        return dispatcher.combine(y, sorted_handle(slots, y, placed))

    add("layer", "symmetric, fused, adds up in combine, places known", places_known, True)
    if num_tokens >= 1024:
        add("layer", "symmetric, fused, halves", lambda: halves(layer, tokens, tiles_for(rows_per_expert / 2)[0]), True)
        dispatcher.max_sms = None
    grouped(layer, tokens, add)
    dispatcher.check_failed()


def worst(error: float) -> float:
    """The largest of all ranks; inf where one is nan. COLLECTIVE."""
    found = torch.tensor([error], device="cuda").nan_to_num(float("inf"))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def sorted_handle(slots: DispatchedSlots, y: torch.Tensor, placed: Placed) -> SymmetricHandle:
    return SymmetricHandle(
        rows=y.shape[0],
        slots=slots.handle,
        local_ids=slots.topk_ids,
        weights=slots.topk_weights,
        positions=placed.positions,
    )


@dataclass(frozen=True, slots=True)
class _Batch:
    x: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor


@cache
def other_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream(priority=-1)


def halves(layer: Layer, tokens: RoutedTokens, tiles: tuple[Tile, Tile]) -> torch.Tensor:
    """Two halves of the tokens in flight: one is exchanged while the experts compute the other."""
    dispatcher, main, side = layer.dispatcher, torch.cuda.current_stream(), other_stream()
    dispatcher.max_sms = SHARE
    half = tokens.hidden_states.shape[0] // 2
    parts = [
        (tokens.hidden_states[i : i + half], tokens.topk_weights[i : i + half], tokens.topk_ids[i : i + half])
        for i in (0, half)
    ]
    output = torch.empty_like(tokens.hidden_states)

    def experts(slots: DispatchedSlots) -> torch.Tensor:
        out = dispatcher.combine_input(slots.handle, layer.model.hidden, torch.bfloat16)
        return layer.fused_sum(slots, tiles, out)

    first = dispatcher.dispatch_slots(*parts[0])
    side.wait_stream(main)
    with torch.cuda.stream(side):
        second = dispatcher.dispatch_slots(*parts[1])
        second_here = side.record_event()
    y = experts(first)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        dispatcher.combine_slots(y, first.handle, output[:half])
    main.wait_event(second_here)
    y = experts(second)
    main.wait_stream(side)
    dispatcher.combine_slots(y, second.handle, output[half:])
    return output


def grouped(layer: Layer, tokens: RoutedTokens, add: Callable[..., float]) -> None:
    """torch's grouped product on rows sorted by expert."""
    model, dispatcher = layer.model, layer.dispatcher

    def products(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        ends = counts.cumsum(0).to(torch.int32)
        both = torch._grouped_mm(rows, layer.w13.transpose(1, 2), ends)
        inner = both.new_empty(both.shape[0], model.inner)
        block = min(1024, triton.next_power_of_2(model.inner))
        activation_kernel[(both.shape[0], triton.cdiv(model.inner, block))](inner, both, INNER=model.inner, BLOCK=block)
        return torch._grouped_mm(inner, layer.w2.transpose(1, 2), ends)

    still = dispatcher.dispatch(tokens)
    dispatcher.combine(torch.zeros_like(still.expert_input), still.handle)
    add("part", "both products, grouped_mm", lambda: products(still.expert_input, still.tokens_per_expert))

    def whole() -> torch.Tensor:
        dispatched = dispatcher.dispatch(tokens)
        return dispatcher.combine(products(dispatched.expert_input, dispatched.tokens_per_expert), dispatched.handle)

    add("layer", "symmetric, grouped_mm", whole, True)


def run(rank: Rank, name: str, token_counts: tuple[int, ...], vllm_kernels: str | None) -> list[Row]:
    bench = Bench(rank)
    link(bench)
    layer = Layer(rank, MODELS[name], vllm_kernels)
    for num_tokens in token_counts:
        measure(bench, layer, num_tokens)
    return bench.rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--vllm-kernels")
    options = parser.parse_args()
    kernels = options.vllm_kernels
    if kernels is None and (found := importlib.util.find_spec("vllm")) is not None and found.origin is not None:
        kernels = str(Path(found.origin).parent / "model_executor/layers/fused_moe/fused_moe.py")
    rows: list[Row] = []
    for name in options.models.split(","):
        started = time.monotonic()
        with ProcessRankPool(options.ranks, timeout=60, transport="nccl") as pool:
            outcome = pool.outcomes(run, name, tuple(map(int, options.tokens.split(","))), kernels)[0]
        if isinstance(outcome, BaseException):
            rows.append({"what": "error", "model": name, "error": f"{type(outcome).__name__}: {outcome}"[:2000]})
            print(rows[-1], flush=True)
        else:
            rows += [{"device": torch.cuda.get_device_name(), "ranks": options.ranks, **row} for row in outcome]
        options.path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(f"== {name}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
