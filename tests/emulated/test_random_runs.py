"""Randomised runs of collectives and MoE ops over 2, 3, 4 and 8 ranks, each compared with a plain reference.

All ranks draw the same runs from one seed, so each rank knows what every other one sends. A failure names the seed, the
run and the drawn arguments; SEED=... RUN=... in the environment repeats one run alone.
"""

import os
import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.cases import seeded
from tests.emulated.references import (
    Layer,
    counts_of,
    distinct_ids,
    flat,
    is_undefined,
    members,
    product_int8,
    quotient_int8,
    random_rows,
    small_integers,
    sorted_pairs,
    sum_of_pairs,
    through_int8_groups,
)

pytestmark = pytest.mark.emulated

npu = torch.ops.npu

Check = Callable[[], None]
Finish = Callable[[], None]  # waits for a run that was started, and checks it


def same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal in dtype, shape and values; NaN equals NaN."""
    torch.testing.assert_close(got.cpu(), wanted, rtol=0, atol=0, equal_nan=True)


def front(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """`got` begins with `wanted`; the rest is undefined."""
    got = got.cpu()
    same(got[: len(wanted)], wanted)
    assert is_undefined(got[len(wanted) :])


# --- Collectives ---

REDUCED = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int32, torch.int64)
MOVED = (*REDUCED, torch.uint8, torch.int16, torch.float64)
REDUCTIONS = {
    "sum": (dist.ReduceOp.SUM, lambda parts: parts.sum(0)),
    "max": (dist.ReduceOp.MAX, lambda parts: parts.amax(0)),
    "min": (dist.ReduceOp.MIN, lambda parts: parts.amin(0)),
    "product": (dist.ReduceOp.PRODUCT, lambda parts: parts.prod(0)),
}
LENGTHS = (0, 1, 2, 7, 1000, 70_001, 300_007)  # of the shared memory: nothing, part of a piece, several pieces


class Members:
    """The group of one run: what its ranks send, and what this rank must get."""

    def __init__(self, group: dist.ProcessGroup, ranks: list[int], rank: int, drawn: dict[str, Any]) -> None:
        self.group, self.ranks, self.size, self.place = group, ranks, len(ranks), ranks.index(rank)
        self.dtype, self.length, self.seed = drawn["dtype"], drawn["length"], drawn["data"]
        self.root, self.reduction = drawn["root"] % self.size, drawn["reduction"]
        self.counts = [row[: self.size] for row in drawn["counts"][: self.size]]  # [sender][receiver]
        self.options = {"group": group, "async_op": drawn["is_async"]}
        self.only_read: list[tuple[torch.Tensor, torch.Tensor]] = []  # inputs, and what they must still be afterwards

    def input_of(self, place: int, length: int) -> torch.Tensor:
        """What a member sends: values of 1..3, whose reductions over 8 ranks every type but int8 holds."""
        values = torch.randint(1, 4, (length,), generator=seeded(self.seed + place))
        return values.clamp_max(1 if self.reduction == "product" and place > 3 else 3).to(self.dtype)

    def inputs(self, length: int) -> list[torch.Tensor]:
        return [self.input_of(place, length) for place in range(self.size)]

    def in_place(self) -> torch.Tensor:
        return self.input_of(self.place, self.length).npu()

    def mine(self, length: int) -> torch.Tensor:
        values = self.input_of(self.place, length)
        self.only_read.append((values.npu(), values))
        return self.only_read[-1][0]

    def out(self, length: int) -> torch.Tensor:
        return torch.full((length,), 99).to(self.dtype).npu()

    def reduced(self, length: int) -> torch.Tensor:
        parts = torch.stack(self.inputs(length))
        wide = parts if parts.is_floating_point() else parts.long()
        return REDUCTIONS[self.reduction][1](wide).to(self.dtype)


def all_reduce(m: Members) -> tuple[Any, Check]:
    x = m.in_place()
    return dist.all_reduce(x, REDUCTIONS[m.reduction][0], **m.options), lambda: same(x, m.reduced(m.length))


def reduce(m: Members) -> tuple[Any, Check]:
    x = m.in_place()
    work = dist.reduce(x, m.ranks[m.root], REDUCTIONS[m.reduction][0], **m.options)
    return work, lambda: same(x, m.reduced(m.length)) if m.place == m.root else None


def broadcast(m: Members) -> tuple[Any, Check]:
    x = m.in_place()
    return dist.broadcast(x, m.ranks[m.root], **m.options), lambda: same(x, m.input_of(m.root, m.length))


def all_gather_into_tensor(m: Members) -> tuple[Any, Check]:
    x, out = m.mine(m.length), m.out(m.size * m.length)
    work = dist.all_gather_into_tensor(out, x, **m.options)
    return work, lambda: same(out, torch.cat(m.inputs(m.length)))


def all_gather(m: Members) -> tuple[Any, Check]:
    """Of uneven lengths, and of even ones, for which torch_npu pads by an aclnn operator."""
    lengths = [m.counts[place][0] for place in range(m.size)] if m.length > 2 else [m.length] * m.size
    x, outs = m.mine(lengths[m.place]), [m.out(length) for length in lengths]

    def check() -> None:
        for place, out in enumerate(outs):
            same(out, m.input_of(place, lengths[place]))

    return dist.all_gather(outs, x, **m.options), check


def all_gather_object(m: Members) -> tuple[Any, Check]:
    objects: list[Any] = [None] * m.size
    dist.all_gather_object(objects, {"place": m.place, "text": "x" * m.counts[m.place][0]}, group=m.group)
    wanted = [{"place": place, "text": "x" * m.counts[place][0]} for place in range(m.size)]

    def check() -> None:
        assert objects == wanted

    return None, check


def reduce_scatter_tensor(m: Members) -> tuple[Any, Check]:
    x, out = m.mine(m.size * m.length), m.out(m.length)
    work = dist.reduce_scatter_tensor(out, x, REDUCTIONS[m.reduction][0], **m.options)
    return work, lambda: same(out, m.reduced(m.size * m.length)[m.place * m.length :][: m.length])


def reduce_scatter(m: Members) -> tuple[Any, Check]:
    lengths = m.counts[0]
    total = sum(lengths)
    parts = [part.contiguous() for part in m.mine(total).split(lengths)]
    out = m.out(lengths[m.place])
    work = dist.reduce_scatter(out, parts, REDUCTIONS[m.reduction][0], **m.options)
    return work, lambda: same(out, m.reduced(total).split(lengths)[m.place])


def all_to_all_single(m: Members) -> tuple[Any, Check]:
    sent, received = m.counts[m.place], [m.counts[peer][m.place] for peer in range(m.size)]
    x, out = m.mine(sum(sent)), m.out(sum(received))
    work = dist.all_to_all_single(out, x, received, sent, **m.options)
    return work, lambda: same(out, torch.cat(from_peers(m)))


def all_to_all(m: Members) -> tuple[Any, Check]:
    sent, received = m.counts[m.place], [m.counts[peer][m.place] for peer in range(m.size)]
    parts = [part.contiguous() for part in m.mine(sum(sent)).split(sent)]
    outs = [m.out(length) for length in received]

    def check() -> None:
        for out, wanted in zip(outs, from_peers(m), strict=True):
            same(out, wanted)

    return dist.all_to_all(outs, parts, **m.options), check


def from_peers(m: Members) -> list[torch.Tensor]:
    return [m.input_of(peer, sum(m.counts[peer])).split(m.counts[peer])[m.place] for peer in range(m.size)]


def scatter(m: Members) -> tuple[Any, Check]:
    parts = [m.input_of(place, m.length).npu() for place in range(m.size)] if m.place == m.root else None
    out = m.out(m.length)
    return dist.scatter(out, parts, m.ranks[m.root], **m.options), lambda: same(out, m.input_of(m.place, m.length))


def messages(m: Members) -> tuple[Any, Check]:
    """To the right and from the left, of each member's own length."""
    lengths = [m.counts[place][0] + 1 for place in range(m.size)]
    left, right = (m.place - 1) % m.size, (m.place + 1) % m.size
    x, out = m.mine(lengths[m.place]), m.out(lengths[left])
    both = [
        dist.P2POp(dist.isend, x, m.ranks[right], m.group),
        dist.P2POp(dist.irecv, out, m.ranks[left], m.group),
    ]
    works = dist.batch_isend_irecv(both)

    def check() -> None:
        for work in works:
            work.wait()
        same(out, m.input_of(left, lengths[left]))

    return None, check


def barrier(m: Members) -> tuple[Any, Check]:
    return dist.barrier(**m.options), lambda: None


REDUCING = (all_reduce, reduce, reduce_scatter_tensor, reduce_scatter)
MOVING = (
    broadcast,
    all_gather_into_tensor,
    all_gather,
    all_gather_object,
    all_to_all_single,
    all_to_all,
    scatter,
    messages,
    barrier,
)
COLLECTIVES = {collective.__name__: collective for collective in (*REDUCING, *MOVING)}


def draw_collective(draw: random.Random, size: int, groups: int) -> dict[str, Any]:
    kind = draw.choice(list(COLLECTIVES))
    counts = (0, 1, draw.randrange(200), draw.choice((50, 100_003)))
    return {
        "kind": kind,
        "dtype": draw.choice(REDUCED if COLLECTIVES[kind] in REDUCING else MOVED),
        "length": draw.choice(LENGTHS),
        "counts": [[draw.choice(counts) for _ in range(size)] for _ in range(size)],
        "root": draw.randrange(size),
        "reduction": draw.choice(list(REDUCTIONS)),
        "is_async": draw.random() < 0.5,
        "group": draw.randrange(groups),
        "stream": draw.randrange(3),
        "data": draw.randrange(1 << 30),
    }


class Collectives:
    """Starts collectives on three streams and in several groups; up to four are unfinished at a time."""

    def __init__(self, rank: int, size: int, draw: random.Random) -> None:
        self.rank, self.size = rank, size
        self.streams = [None, torch.npu.Stream(), torch.npu.Stream()]
        ranks = [list(range(size))]
        ranks += [sorted(draw.sample(range(size), draw.randrange(2, size + 1))) for _ in range(2)]
        self.groups = [(dist.new_group(each), each) for each in ranks]

    def start(self, drawn: dict[str, Any]) -> Finish | None:
        group, ranks = self.groups[drawn["group"]]
        if self.rank not in ranks:
            return None
        stream = self.streams[drawn["stream"]]
        with torch.npu.stream(stream) if stream else nullcontext():
            own = Members(group, ranks, self.rank, drawn)
            work, check = COLLECTIVES[drawn["kind"]](own)

        def finish() -> None:
            with torch.npu.stream(stream) if stream else nullcontext():
                if work is not None:
                    work.wait()
                check()
                for tensor, wanted in own.only_read:
                    same(tensor, wanted)

        return finish


# --- Dispatch, the experts, combine ---


def draw_layer(draw: random.Random, size: int) -> dict[str, Any]:
    shared_experts, shared_ranks = draw.choice([(0, 0), (0, 0), (1, 1), (1, 2), (2, 2)]) if size > 2 else (0, 0)
    tokens = [draw.randrange(0, 9) for _ in range(size)]
    mask = draw.choice(("none", "none", "uneven", "prefix", "pairs", "all false"))
    if mask != "uneven":
        tokens = [max(tokens)] * size
    special = (0, 0, 0) if draw.random() < 0.7 else (1, 2, 2)
    experts_per_rank = draw.randrange(1, 5)
    top_k = draw.randrange(1, min(8, experts_per_rank * (size - shared_ranks)) + 1)
    return {
        "tokens": tokens,
        "mask": mask,
        "global_bs": size * (max(tokens) + draw.choice((0, 3))) if mask == "uneven" or draw.random() < 0.3 else 0,
        "shared": (shared_experts, shared_ranks),
        "special": special,
        "experts_per_rank": experts_per_rank,
        "top_k": top_k,
        "width": draw.choice((8, 16, 32)),
        "dtype": draw.choice((torch.bfloat16, torch.float16)),
        "quant_mode": draw.choice((0, 0, 2)),
        "smooth": draw.random() < 0.5,
        "comm_quant_mode": draw.choice((0, 0, 0, 2)),
        "token_nums_type": draw.choice((0, 1)),
        "shared_expert_x": draw.random() < 0.3 and shared_ranks == 0,
        "data": draw.randrange(1 << 20),
    }


class Experts:
    """All experts' linear layers and the arguments that go with them, and what they make of a row."""

    def __init__(self, layer: Layer, drawn: dict[str, Any]) -> None:
        self.layer, seed, width = layer, drawn["data"], layer.width
        self.is_quantised = drawn["quant_mode"] == 2
        count = layer.shared_experts + layer.experts  # the shared ones first, as in dispatch's scales
        self.weight = small_integers(count, width, width, dtype=layer.dtype, seed=seed + 1).clamp(-1, 1)
        self.weight_int8 = torch.randint(-128, 128, (count, width, width), generator=seeded(seed + 2)).to(torch.int8)
        self.weight_scale = random_rows(count, width, seed=seed + 3).abs() * 1e-3
        self.smooth = random_rows(count, width, seed=seed + 4).abs() + 0.5 if drawn["smooth"] else None

    def index(self, rank: int, token: int, k: int) -> int:
        """The expert that pair (token, k) of a rank goes to; k from top_k on stands for the shared ones."""
        if k >= self.layer.top_k:
            return k - self.layer.top_k
        return self.layer.shared_experts + int(self.layer.ids[rank][token, k])

    def of_rank(self, rank: int) -> slice:
        if rank < self.layer.shared_ranks:
            shared = rank // (self.layer.shared_ranks // self.layer.shared_experts)
            return slice(shared, shared + 1)
        first = self.layer.shared_experts + (rank - self.layer.shared_ranks) * self.layer.experts_per_rank
        return slice(first, first + self.layer.experts_per_rank)

    def sent(self, rank: int, token: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[H] what dispatch sends for a pair, and its scale."""
        row = self.layer.x[rank][token]
        if not self.is_quantised:
            return row, torch.tensor(float("nan"))
        row = row.float() if self.smooth is None else row.float() * self.smooth[self.index(rank, token, k)]
        values, scale = product_int8(row[None])
        return values[0], scale[0]

    def output(self, rank: int, token: int, k: int) -> torch.Tensor:
        """[H] what the expert gives back for a pair."""
        row, scale = self.sent(rank, token, k)
        expert = self.index(rank, token, k)
        if not self.is_quantised:
            return (row.float() @ self.weight[expert].float()).to(self.layer.dtype)
        sums = row.long() @ self.weight_int8[expert].long()
        return ((sums.float() * self.scale()[expert].float()) * scale).to(self.layer.dtype)

    def scale(self) -> torch.Tensor:
        return self.weight_scale.bfloat16() if self.layer.dtype is torch.bfloat16 else self.weight_scale

    def apply(self, rank: int, rows: torch.Tensor, scales: torch.Tensor, drawn: dict[str, Any], groups: torch.Tensor):
        own = self.of_rank(rank)
        options: dict[str, Any] = {"weight": [self.weight[own].npu()]}
        if self.is_quantised:
            options = {
                "weight": [self.weight_int8[own].npu()],
                "scale": [self.scale()[own].npu()],
                "per_token_scale": [scales],
                "output_dtype": self.layer.dtype,
            }
        kind = drawn["token_nums_type"]  # 0 and 1 mean the same to both ops
        return npu.npu_grouped_matmul(
            [rows], group_list=groups, split_item=2, group_type=0, group_list_type=kind, **options
        )[0]


def draw_masks(drawn: dict[str, Any]) -> list[torch.Tensor] | None:
    tokens, top_k = drawn["tokens"], drawn["top_k"]
    generator = seeded(drawn["data"])
    if drawn["mask"] == "prefix":
        return [torch.arange(n) < torch.randint(0, n + 1, (1,), generator=generator) for n in tokens]
    if drawn["mask"] == "pairs":
        return [torch.rand(n, top_k, generator=generator) < 0.6 for n in tokens]
    if drawn["mask"] == "all false":
        return [torch.zeros(n, dtype=torch.bool) for n in tokens]
    return None


def run_layer(rank: int, size: int, drawn: dict[str, Any]) -> None:
    shared_experts, shared_ranks = drawn["shared"]
    layer = Layer(
        size,
        drawn["tokens"],
        dtype=drawn["dtype"],
        masks=draw_masks(drawn),
        shared_experts=shared_experts,
        shared_ranks=shared_ranks,
        special=drawn["special"],
        global_bs=drawn["global_bs"],
        top_k=drawn["top_k"],
        experts_per_rank=drawn["experts_per_rank"],
        width=drawn["width"],
        integers=drawn["quant_mode"] == 0,
        seed=drawn["data"],
    )
    experts = Experts(layer, drawn)
    _, copy, constant = layer.special
    both = members(layer, rank)
    smooth = experts.smooth.npu() if experts.is_quantised and experts.smooth is not None else None
    x, ids = layer.x[rank].npu(), layer.ids[rank].npu()
    rows, scales, assist, token_nums, recv_counts, _, _ = npu.npu_moe_distribute_dispatch_v2(
        x,
        ids,
        quant_mode=drawn["quant_mode"],
        scales=smooth,
        expert_token_nums_type=drawn["token_nums_type"],
        **both,
    )
    check_dispatch(layer, experts, rank, drawn, rows, scales, assist, token_nums, recv_counts)

    outputs = experts.apply(rank, rows, scales, drawn, token_nums)
    triples = flat(layer.arrivals(rank))
    front(outputs, stack([experts.output(*triple) for triple in triples], layer))

    constants: dict[str, torch.Tensor] = {}
    if copy or constant:
        constants["ori_x"] = layer.x[rank]
    if constant:
        constants["const_expert_alpha_1"] = small_integers(constant, dtype=layer.dtype, seed=70)
        constants["const_expert_alpha_2"] = small_integers(constant, dtype=layer.dtype, seed=71)
        constants["const_expert_v"] = small_integers(constant, layer.width, dtype=layer.dtype, seed=72)
    if drawn["shared_expert_x"]:
        constants["shared_expert_x"] = small_integers(*layer.x[rank].shape, dtype=layer.dtype, seed=73)
    out = npu.npu_moe_distribute_combine_v2(
        outputs,
        ids,
        assist,
        recv_counts,
        layer.weights[rank].npu(),
        comm_quant_mode=drawn["comm_quant_mode"],
        **both,
        **{name: tensor.npu() for name, tensor in constants.items()},
    )
    same(out, combined(layer, experts, rank, drawn, constants))
    same(x, layer.x[rank])
    same(ids, layer.ids[rank])


def stack(rows: list[torch.Tensor], layer: Layer, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.stack(rows) if rows else torch.empty(0, layer.width, dtype=dtype or layer.dtype)


def check_dispatch(
    layer: Layer,
    experts: Experts,
    rank: int,
    drawn: dict[str, Any],
    rows: torch.Tensor,
    scales: torch.Tensor,
    assist: torch.Tensor,
    token_nums: torch.Tensor,
    recv_counts: torch.Tensor,
) -> None:
    arrivals = layer.arrivals(rank)
    triples = flat(arrivals)
    sent = [experts.sent(*triple) for triple in triples]
    assert len(rows) == layer.capacity(rank)
    front(rows, stack([row for row, _ in sent], layer, torch.int8 if experts.is_quantised else None))
    if experts.is_quantised:
        front(scales, torch.stack([scale for _, scale in sent]) if sent else torch.empty(0))
    else:
        assert is_undefined(scales.cpu())
    front(assist, torch.tensor(triples, dtype=torch.int32).flatten())
    sizes = torch.tensor([[len(part) for part in by_source] for by_source in arrivals])
    front(recv_counts, sizes.flatten().cumsum(0).int())
    per_expert = sizes.sum(1)
    same(token_nums, per_expert if drawn["token_nums_type"] == 1 else per_expert.cumsum(0))


def combined(
    layer: Layer, experts: Experts, rank: int, drawn: dict[str, Any], constants: dict[str, torch.Tensor]
) -> torch.Tensor:
    """[B, H]: float32, k ascending, a multiply and an add; then the shared experts, unweighted."""
    out = torch.full((layer.tokens[rank], layer.width), float("nan"), dtype=layer.dtype)
    active = layer.active(rank)
    zero, copy, _ = layer.special

    def returned(token: int, k: int) -> torch.Tensor:
        row = experts.output(rank, token, k)
        return (through_int8_groups(row) if drawn["comm_quant_mode"] == 2 else row).float()

    def special(token: int, expert: int) -> torch.Tensor | None:
        kind = expert - layer.experts
        if kind < zero:
            return None
        own = constants["ori_x"][token].float()
        if kind < zero + copy:
            return own
        i = kind - zero - copy
        alphas = [constants[f"const_expert_alpha_{n}"][i].float() for n in (1, 2)]
        return own * alphas[0] + constants["const_expert_v"][i].float() * alphas[1]

    for token in range(layer.tokens[rank]):
        if not active[token].any():
            continue
        total = torch.zeros(layer.width)
        for k, expert in enumerate(layer.ids[rank][token].tolist()):
            if not active[token, k]:
                continue
            addend = returned(token, k) if expert < layer.experts else special(token, expert)
            if addend is not None:
                total = total + addend * layer.weights[rank][token, k]
        for shared in range(layer.shared_experts):
            total = total + returned(token, layer.top_k + shared)
        if "shared_expert_x" in constants:
            total = total + constants["shared_expert_x"][token].float()
        out[token] = total.to(layer.dtype)
    return out


# --- Routing on one rank, and between ranks by all_to_all and re_routing ---


def draw_routing(draw: random.Random) -> dict[str, Any]:
    experts = draw.randrange(2, 17)
    first = draw.randrange(experts)
    return {
        "tokens": draw.randrange(1, 40),
        "top_k": draw.randrange(1, min(8, experts) + 1),
        "experts": experts,
        "first": first,
        "end": draw.randrange(first + 1, experts + 1),
        "width": draw.choice((8, 32, 40)),
        "dtype": draw.choice((torch.bfloat16, torch.float16, torch.float32)),
        "quant_mode": draw.choice((-1, -1, 1)),
        "tokens_num_type": draw.choice((0, 1, 2)),
        "row_idx_type": draw.choice((0, 1)),
        "index_dtype": draw.choice((torch.int32, torch.int64)),
        "data": draw.randrange(1 << 20),
    }


def run_routing(rank: int, size: int, drawn: dict[str, Any]) -> None:
    seed = drawn["data"] + 1000 * rank
    tokens, top_k, experts = (drawn[name] for name in ("tokens", "top_k", "experts"))
    x = random_rows(tokens, drawn["width"], dtype=drawn["dtype"], seed=seed)
    ids = distinct_ids(tokens, top_k, experts, seed + 1)
    weights = random_rows(tokens, top_k, seed=seed + 2)
    check_init_routing(x, ids, weights, drawn)

    # All pairs: permute, unpermute.
    pairs = sorted_pairs(ids, 0, experts)
    permuted, index = npu.npu_moe_token_permute(x.npu(), ids.to(drawn["index_dtype"]).npu())
    same(permuted, x[[pair // top_k for pair in pairs]])
    same(index, torch.tensor(pairs).argsort().int())
    same(npu.npu_moe_token_unpermute(permuted, index, weights.npu()), weighted_sum(x, weights, drawn["dtype"]))
    check_re_routing(rank, size, drawn)


def weighted_sum(x: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    total = torch.zeros(x.shape)
    for k in range(weights.shape[1]):
        total = total + x.float() * weights[:, k, None]
    return total.to(dtype)


def check_init_routing(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, drawn: dict[str, Any]) -> None:
    """The experts of one range; then their rows come back to their tokens, the others' as zeros."""
    top_k, experts, first, end = (drawn[name] for name in ("top_k", "experts", "first", "end"))
    pairs = sorted_pairs(ids, first, end)
    rows, index, counts, scales = npu.npu_moe_init_routing_v2(
        x.npu(),
        ids.npu(),
        active_num=-1,
        expert_num=experts,
        expert_tokens_num_type=drawn["tokens_num_type"],
        expert_tokens_num_flag=True,
        active_expert_range=[first, end],
        quant_mode=drawn["quant_mode"],
        row_idx_type=drawn["row_idx_type"],
    )
    sources = x[[pair // top_k for pair in pairs]]
    if drawn["quant_mode"] == 1:
        values, wanted_scales = quotient_int8(sources.float().numpy()) if pairs else (np.empty((0, x.shape[1])), [])
        front(rows, torch.from_numpy(np.asarray(values, dtype=np.int8)))
        front(scales, torch.from_numpy(np.asarray(wanted_scales, dtype=np.float32)))
    else:
        front(rows, sources)
        assert is_undefined(scales.cpu())
    if drawn["row_idx_type"] == 1:
        front(index, torch.tensor(pairs, dtype=torch.int32))
    else:
        place = {pair: i for i, pair in enumerate(pairs)}
        assert index.tolist() == [place.get(pair, -1) for pair in range(ids.numel())]
    by_expert = counts_of(ids, first, end)
    if drawn["tokens_num_type"] == 2:
        used = [[expert, count] for expert, count in enumerate(by_expert, start=first) if count]
        assert counts.tolist() == used + [[0, 0]] * (experts - len(used))
    else:
        wanted = torch.tensor(by_expert)
        same(counts, wanted if drawn["tokens_num_type"] == 1 else wanted.cumsum(0))
    if drawn["quant_mode"] == -1 and drawn["row_idx_type"] == 0:
        scales, of_pair = weights.to(x.dtype), index.cpu().view(ids.shape)
        out = npu.npu_moe_finalize_routing(rows.unsqueeze(1), None, None, None, scales.npu(), index, None, 3)
        kind = np.float16 if x.dtype == torch.float16 else np.float32
        same(out, sum_of_pairs(rows.cpu(), of_pair, scales, kind).to(x.dtype))
        past = torch.where(index < 0, rows.shape[0], index)
        out = npu.npu_moe_token_unpermute(rows, past, weights.npu())
        same(out, sum_of_pairs(rows.cpu(), of_pair, weights, np.float32).to(x.dtype))


def check_re_routing(rank: int, size: int, drawn: dict[str, Any]) -> None:
    """Ranks send each other rows by expert, and each puts what it received in its experts' order."""
    local = 1 + drawn["experts"] % 4
    generator = seeded(drawn["data"])
    counts = torch.randint(0, 5, (size, size, local), generator=generator)  # [sender, receiver, its expert]
    width, dtype = drawn["width"], torch.bfloat16
    sent = [random_rows(int(counts[peer].sum()), width, dtype=dtype, seed=drawn["data"] + peer) for peer in range(size)]
    by_receiver = [rows.split(counts[peer].sum(1).tolist()) for peer, rows in enumerate(sent)]
    received = counts[:, rank].sum(1).tolist()
    rows = torch.full((sum(received), width), float("nan"), dtype=dtype).npu()
    dist.all_to_all_single(rows, sent[rank].npu(), received, counts[rank].sum(1).tolist())
    arrived = torch.cat([by_receiver[peer][rank] for peer in range(size)])
    same(rows, arrived)
    if len(arrived) == 0:
        return
    scales = torch.arange(float(len(arrived)))
    origin = [e for peer in range(size) for e in range(local) for _ in range(int(counts[peer, rank, e]))]
    order = sorted(range(len(origin)), key=lambda row: origin[row])
    out, out_scales, index, nums = npu.npu_moe_re_routing(rows, counts[:, rank].npu(), per_token_scales=scales.npu())
    same(out, arrived[order])
    same(out_scales, scales[order])
    assert index.tolist() == order
    assert nums.tolist() == counts[:, rank].sum(0).tolist()


# --- The runs ---

UNFINISHED = 4  # collectives at a time
SHARES = ("collective", "collective", "layer", "layer", "routing")


def random_runs(rank: int, size: int, seed: int, count: int) -> dict[str, int]:
    """`count` runs; returns how many there were of each sort."""
    torch.set_num_threads(1)
    collectives = Collectives(rank, size, random.Random(seed))
    unfinished: list[tuple[str, Finish]] = []
    done = dict.fromkeys(SHARES, 0)
    only = os.environ.get("RUN")

    def attempt(name: str, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except (AssertionError, RuntimeError, ValueError, IndexError, TypeError) as error:
            raise AssertionError(f"rank {rank} of {size}: {name}") from error

    for run in range(count):
        draw = random.Random(f"{seed}/{run}")
        sort = SHARES[run % len(SHARES)]
        if sort == "collective":
            drawn = draw_collective(draw, size, len(collectives.groups))
        else:
            drawn = draw_layer(draw, size) if sort == "layer" else draw_routing(draw)
        if only is not None and int(only) != run:
            continue
        name = f"seed {seed}, run {run}: {sort} {drawn}"
        done[sort] += 1
        if sort == "layer":
            attempt(name, lambda drawn=drawn: run_layer(rank, size, drawn))
        elif sort == "routing":
            attempt(name, lambda drawn=drawn: run_routing(rank, size, drawn))
        else:
            finish = attempt(name, lambda drawn=drawn: collectives.start(drawn))
            if finish is not None:
                unfinished.append((name, finish))
        while len(unfinished) > UNFINISHED:
            attempt(*unfinished.pop(draw.randrange(len(unfinished))))
    for name, finish in unfinished:
        attempt(name, finish)
    torch.npu.synchronize()
    return done


# One launch of ranks for each number of them: a launch costs seconds, a run milliseconds.
@pytest.mark.parametrize(
    ("size", "count", "env"),
    [
        (2, 60, {}),
        (3, 50, {"VLLM_NPU_EMULATOR_ASYNC": "11"}),
        (4, 60, {}),
        (8, 30, {"TASK_QUEUE_ENABLE": "2"}),
    ],
)
def test_random_runs(run_in_ranks, size: int, count: int, env: dict[str, str]) -> None:
    seed = int(os.environ.get("SEED", size))
    outcome = run_in_ranks(random_runs, size, seed, count, env={"VLLM_NPU_EMULATOR_LIMITS": "none"} | env)  # small rows
    wanted = {sort: count * SHARES.count(sort) // len(SHARES) for sort in SHARES}
    assert outcome.returned == [wanted] * size or "RUN" in os.environ
