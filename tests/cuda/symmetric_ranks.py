"""Functions that ranks run in tests of symmetric memory. Each rank makes the tensors of all ranks from one seed, so that it
knows the result without communication."""

import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import torch

from tests.cases import same_bits
from tests.ranks.test_exceptions import SMALL, Steps, good_steps_after_exceptions
from vllm_npu.core.limits import SymmetricLimits
from vllm_npu.errors import HandleMismatchError, InvalidInputError, TransportError
from vllm_npu.strategies.dispatch.base import RoutedTokens
from vllm_npu.strategies.dispatch.symmetric import DispatchedSlots, SymmetricDispatcher
from vllm_npu.strategies.dispatch.symmetric_layout import FP8_GROUP, why_not_symmetric
from vllm_npu.tools.launch import Rank
from vllm_npu.tools.verification import Case, run_case
from vllm_npu.transport.nccl import NcclTransport
from vllm_npu.transport.symmetric_memory import WindowSize, close_windows, gather_facts, open_windows

LIMITS = SymmetricLimits(max_tokens_per_rank=1024, source="tests")
ROUTINGS = ("uniform", "first rank only", "last rank only", "one expert", "own rank only")


@dataclass(frozen=True)
class Shape:
    """Sizes of one exchange."""

    num_tokens: int
    hidden_size: int = 512
    num_experts: int = 16
    top_k: int = 4
    dtype: torch.dtype = torch.bfloat16
    ids_dtype: torch.dtype = torch.int32
    routing: str = "uniform"
    real_rows: int | None = None  # None means no mask
    max_sms: int | None = None


@dataclass(frozen=True)
class Batch:
    """One rank's tokens, and the output that must come back. Values are small integers, so that every sum is exact."""

    hidden_states: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor | None

    @classmethod
    def of(cls, shape: Shape, rank: int, num_ranks: int, seed: int) -> "Batch":
        generator = torch.Generator("cuda").manual_seed(1000 * seed + rank)
        device = "cuda"
        n, k = shape.num_tokens, shape.top_k
        scores = torch.rand(n, shape.num_experts, generator=generator, device=device)
        per_rank = shape.num_experts // num_ranks
        target = {"first rank only": 0, "last rank only": num_ranks - 1, "own rank only": rank}.get(shape.routing)
        if target is not None:
            scores[:, target * per_rank : (target + 1) * per_rank] += 1
        if shape.routing == "one expert":
            scores[:, 3] += 1
            k = 1
        ids = scores.argsort(1, descending=True)[:, :k].to(shape.ids_dtype)
        x = torch.randint(-3, 4, (n, shape.hidden_size), generator=generator, device=device).to(shape.dtype)
        mask = None
        if shape.real_rows is not None:
            mask = torch.arange(n, device=device) < shape.real_rows
            x = torch.where(mask[:, None], x.float(), float("nan")).to(shape.dtype)
            ids = torch.where(mask[:, None], ids, -1)
        return cls(x, (ids.clamp(min=0) % 2 + 1).float(), ids, mask)

    def expected(self) -> torch.Tensor:
        rows = self.hidden_states.float() * (self.weights * factor(self.ids)).sum(1, keepdim=True)
        if self.mask is not None:
            rows = torch.where(self.mask[:, None], rows, 0.0)
        return rows.to(self.hidden_states.dtype)


def factor(expert: torch.Tensor) -> torch.Tensor:
    """The factor of each expert. Neighbouring experts have different factors, and sums stay small."""
    return (expert % 5 - 2).float()


def on_slots(slots: DispatchedSlots, rank: int, num_local_experts: int) -> torch.Tensor:
    """Return each slot's weighted sum over local experts, and NaN for empty slots."""
    local = slots.topk_ids >= 0
    weights = torch.where(local, slots.topk_weights * factor(slots.topk_ids + rank * num_local_experts), 0.0)
    rows = slots.hidden_states.float() * weights.sum(1, keepdim=True)
    return torch.where(local.any(1, keepdim=True), rows, float("nan")).to(slots.hidden_states.dtype)


def dispatcher_of(rank: Rank, num_experts: int, **options) -> SymmetricDispatcher:
    groups = rank.groups(tp_size=1, dp_size=rank.num_ranks)
    return SymmetricDispatcher(groups, num_experts, **{"limits": LIMITS, **options})


def opened(rank: Rank, shape: Shape) -> SymmetricDispatcher:
    dispatcher = dispatcher_of(rank, shape.num_experts, max_sms=shape.max_sms)
    dispatcher.open(row_bytes=2 * 7168, top_k=8, returned_row_bytes=4 * 7168)
    return dispatcher


def poison(dispatcher: SymmetricDispatcher) -> None:
    """Fill all parts of the windows that peers write with NaN. The flags stay as they are."""
    torch.cuda.synchronize()
    dispatcher.groups.ep.barrier()
    for window in range(2):
        memory = dispatcher._windows.bytes_of(window)
        memory[: dispatcher._windows.dispatch_flags_offset].fill_(0xFF)  # NaN in every floating-point dtype
    torch.cuda.synchronize()
    dispatcher.groups.ep.barrier()


def exchange(
    rank: Rank, dispatcher: SymmetricDispatcher, shape: Shape, batch: Batch, *, in_window: bool = False
) -> torch.Tensor:
    slots = dispatcher.dispatch_slots(batch.hidden_states, batch.weights, batch.ids, batch.mask)
    rows = on_slots(slots, rank.rank, shape.num_experts // rank.num_ranks)
    if in_window:
        rows = dispatcher.combine_input(slots.handle, rows.shape[1], rows.dtype).copy_(rows)
    return dispatcher.combine_slots(rows, slots.handle)


def exchanges(rank: Rank, shapes: list[Shape], every_way: bool) -> list[str]:
    """Exchange each shape once with poisoned windows; with every_way also with global ids, sorted
    by expert, and out of windows. Returns the
    faults."""
    faults = []
    for seed, shape in enumerate(shapes):
        dispatcher = opened(rank, shape)
        poison(dispatcher)
        batches = [Batch.of(shape, r, rank.num_ranks, seed) for r in range(rank.num_ranks)]
        own = batches[rank.rank]
        before = [tensor.clone() for tensor in (own.hidden_states, own.weights, own.ids)]
        slots = dispatcher.dispatch_slots(own.hidden_states, own.weights, own.ids, own.mask)
        per_rank = shape.num_experts // rank.num_ranks
        ids = torch.cat([batch.ids for batch in batches]).int()
        local = (ids >= 0) & (ids // per_rank == rank.rank)
        filled = local.any(1)
        if not torch.equal(slots.topk_ids, torch.where(local, ids - rank.rank * per_rank, -1)):
            faults.append(f"{shape}: ids")
        weights = torch.cat([batch.weights for batch in batches])
        if not torch.equal(slots.topk_weights, torch.where(local, weights, 0.0)):
            faults.append(f"{shape}: weights")
        rows = torch.cat([batch.hidden_states for batch in batches])
        if not same_bits(slots.hidden_states[filled], rows[filled]):
            faults.append(f"{shape}: rows")
        given = torch.full_like(own.hidden_states, float("nan"))
        output = dispatcher.combine_slots(on_slots(slots, rank.rank, per_rank), slots.handle, given)
        if output is not given or not torch.equal(output, own.expected()):
            faults.append(f"{shape}: output")
        if every_way:
            local_ids = torch.where(local, ids - rank.rank * per_rank, -1)
            faults += _with_global_ids(rank, dispatcher, shape, own, torch.where(local, ids, -1))
            faults += _sorted_by_expert(rank, dispatcher, shape, own, local_ids, rows)
            if not torch.equal(exchange(rank, dispatcher, shape, own, in_window=True), own.expected()):
                faults.append(f"{shape}: output taken out of windows")
        if not all(same_bits(*pair) for pair in zip(before, (own.hidden_states, own.weights, own.ids), strict=True)):
            faults.append(f"{shape}: an input was written to")
    dispatcher.check_failed()
    return faults


def _with_global_ids(
    rank: Rank, dispatcher: SymmetricDispatcher, shape: Shape, own: Batch, expected_ids: torch.Tensor
) -> list[str]:
    """An exchange with the ids that vLLM's experts take. expected_ids: global, -1 for experts of other ranks."""
    per_rank = shape.num_experts // rank.num_ranks
    slots = dispatcher.dispatch_slots(own.hidden_states, own.weights, own.ids, own.mask, global_ids=True)
    foreign = slots.topk_ids // per_rank != rank.rank
    faults = [f"{shape}: global ids"] * (not torch.equal(torch.where(foreign, -1, slots.topk_ids), expected_ids))
    local_ids = torch.where(foreign, -1, slots.topk_ids - rank.rank * per_rank)
    output = dispatcher.combine_slots(on_slots(slots._replace(topk_ids=local_ids), rank.rank, per_rank), slots.handle)
    return faults + [f"{shape}: output of global ids"] * (not torch.equal(output, own.expected()))


def _sorted_by_expert(
    rank: Rank, dispatcher: SymmetricDispatcher, shape: Shape, own: Batch, local_ids: torch.Tensor, rows: torch.Tensor
) -> list[str]:
    """An exchange for experts that take expert-major rows. local_ids, rows: of all slots, -1 for experts of other ranks."""
    per_rank, faults = shape.num_experts // rank.num_ranks, []
    tokens = RoutedTokens(hidden_states=own.hidden_states, topk_weights=own.weights, topk_ids=own.ids, mask=own.mask)
    dispatched = dispatcher.dispatch(tokens)
    expert, order = local_ids.flatten().sort(stable=True)
    order = order[expert >= 0]
    counts = torch.bincount(local_ids[local_ids >= 0], minlength=per_rank)
    if not torch.equal(dispatched.tokens_per_expert, counts):
        faults.append(f"{shape}: tokens_per_expert")
    elif not same_bits(dispatched.expert_input[: len(order)], rows[order // local_ids.shape[1]]):
        faults.append(f"{shape}: expert_input")
    expert_output = torch.full_like(dispatched.expert_input, float("nan"))
    factors = factor(expert[expert >= 0] + rank.rank * per_rank)[:, None]
    expert_output[: len(order)] = (dispatched.expert_input[: len(order)].float() * factors).to(expert_output.dtype)
    output = dispatcher.combine(expert_output, dispatched.handle)
    return faults + [f"{shape}: output of sorted rows"] * (not torch.equal(output, own.expected()))


def quantised_exchange(rank: Rank, num_tokens: int) -> None:
    """Dispatch fp8 rows with block scales, and combine in bfloat16."""
    shape = Shape(num_tokens=num_tokens, hidden_size=1024)
    dispatcher = opened(rank, shape)
    poison(dispatcher)
    batches = [Batch.of(shape, r, rank.num_ranks, 7) for r in range(rank.num_ranks)]
    own = batches[rank.rank]
    scales = [
        2.0 ** torch.randint(-2, 3, (num_tokens, 8), device="cuda", generator=_seeded(r)) for r in range(rank.num_ranks)
    ]
    slots = dispatcher.dispatch_slots(
        own.hidden_states.to(torch.float8_e4m3fn), own.weights, own.ids, scales=scales[rank.rank]
    )
    per_rank = shape.num_experts // rank.num_ranks
    ids = torch.cat([batch.ids for batch in batches])
    local = ids // per_rank == rank.rank
    filled = local.any(1)
    assert slots.hidden_states.dtype is torch.float8_e4m3fn
    assert torch.equal(slots.scales[filled], torch.cat(scales)[filled])
    rows = torch.cat([batch.hidden_states for batch in batches])
    assert torch.equal(slots.hidden_states.float()[filled], rows.float()[filled])
    wide = slots.hidden_states.float() * slots.scales.repeat_interleave(128, 1)
    coefficients = torch.where(slots.topk_ids >= 0, slots.topk_weights, 0.0).sum(1, keepdim=True)
    output = dispatcher.combine_slots(
        torch.where(filled[:, None], wide * coefficients, float("nan")).bfloat16(), slots.handle
    )
    unscaled = own.hidden_states.float() * scales[rank.rank].repeat_interleave(128, 1)
    assert torch.equal(output, (unscaled * own.weights.sum(1, keepdim=True)).bfloat16())


def cast_exchange(rank: Rank, shape: Shape) -> None:
    """Dispatch rows that the kernel itself casts to fp8: rows and scales have the bits of torch."""
    dispatcher = opened(rank, shape)
    poison(dispatcher)
    batches = [Batch.of(shape, r, rank.num_ranks, 11) for r in range(rank.num_ranks)]
    groups = []
    for r, batch in enumerate(batches):
        x = torch.randn(
            shape.num_tokens, shape.hidden_size // FP8_GROUP, FP8_GROUP, device="cuda", generator=_seeded(r)
        )
        x *= 10.0 ** torch.randint(-4, 4, x.shape[:2], device="cuda", generator=_seeded(r))[..., None]
        x[0, 0] = 0
        groups.append(x.to(batch.hidden_states.dtype).float())
    own, x = batches[rank.rank], groups[rank.rank].flatten(1).to(shape.dtype)
    slots = dispatcher.dispatch_slots(x, own.weights, own.ids, own.mask, use_fp8=True)
    ids, every = torch.cat([batch.ids for batch in batches]), torch.cat(groups)
    filled = (torch.where(ids >= 0, ids // (shape.num_experts // rank.num_ranks), -1) == rank.rank).any(1)
    largest = every.abs().amax(-1).clamp(min=1e-10)
    scales = largest * (1 / 448)
    # torch divides by a number, or a number by a tensor, with one more rounding.
    rows = (every * torch.full_like(largest, 448).div(largest)[..., None]).flatten(1).to(torch.float8_e4m3fn)
    assert torch.equal(slots.scales[filled], scales[filled])
    assert torch.equal(slots.hidden_states.view(torch.uint8)[filled], rows.view(torch.uint8)[filled])
    assert torch.equal(slots.topk_ids >= 0, (ids // (shape.num_experts // rank.num_ranks) == rank.rank) & (ids >= 0))
    wide = rows.float() * scales.repeat_interleave(FP8_GROUP, 1)
    sent = torch.where(filled[:, None], wide, float("nan")).bfloat16()
    output = dispatcher.combine_slots(sent, slots.handle)
    mine = slice(rank.rank * shape.num_tokens, (rank.rank + 1) * shape.num_tokens)
    destinations = torch.stack(
        [
            ((own.ids >= 0) & (own.ids // (shape.num_experts // rank.num_ranks) == r)).any(1)
            for r in range(rank.num_ranks)
        ]
    ).sum(0)
    expected = torch.where(destinations[:, None] > 0, wide[mine].bfloat16().float() * destinations[:, None], 0.0)
    assert torch.equal(output, expected.bfloat16())
    dispatcher.check_failed()


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


def repeats(rank: Rank) -> None:
    """Repeat an exchange of random data. Every repetition must give the same bits."""
    shape = Shape(num_tokens=200, hidden_size=7168, num_experts=64, top_k=8)
    dispatcher = opened(rank, shape)
    own = Batch.of(shape, rank.rank, rank.num_ranks, 3)
    x = torch.randn(200, 7168, device="cuda", generator=_seeded(rank.rank)).bfloat16()
    weights = torch.rand(200, 8, device="cuda", generator=_seeded(rank.rank))
    outputs = []
    for _ in range(20):
        dispatched = dispatcher.dispatch(RoutedTokens(hidden_states=x, topk_weights=weights, topk_ids=own.ids))
        counts = dispatched.tokens_per_expert
        rows = torch.arange(dispatched.expert_input.shape[0], device="cuda")
        expert = torch.searchsorted(counts.cumsum(0), rows, right=True)
        outputs.append(
            dispatcher.combine(
                (dispatched.expert_input.float() * (1 + expert[:, None] / 7)).bfloat16(), dispatched.handle
            )
        )
    assert all(same_bits(outputs[0], output) for output in outputs[1:])
    assert outputs[0].isfinite().all()


def replays(rank: Rank, num_tokens: int, max_sms: int | None) -> None:
    """Capture a graph of three exchanges, of which two take rows out of windows, and replay it with new tokens and new
    routing."""
    shape = Shape(num_tokens=num_tokens, hidden_size=1024, max_sms=max_sms)
    dispatcher = opened(rank, shape)
    still = Batch.of(shape, rank.rank, rank.num_ranks, 0)
    for in_window in (True, False):  # compiles the kernels outside the graph
        exchange(rank, dispatcher, shape, still, in_window=in_window)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # An odd number, so that the last exchange of a replay and the first of the next one use the same window.
        outputs = [exchange(rank, dispatcher, shape, still, in_window=i != 1) for i in range(3)]
    for seed in range(50):
        shape_now = Shape(num_tokens=num_tokens, hidden_size=1024, routing=ROUTINGS[seed % 3])
        fresh = Batch.of(shape_now, rank.rank, rank.num_ranks, seed)
        for buffer, values in (
            (still.hidden_states, fresh.hidden_states),
            (still.weights, fresh.weights),
            (still.ids, fresh.ids),
        ):
            buffer.copy_(values)
        graph.replay()
        assert all(torch.equal(output, fresh.expected()) for output in outputs), seed
        if seed % 10 == 0:
            for in_window in (False, True):  # eager between replays
                assert torch.equal(exchange(rank, dispatcher, shape, fresh, in_window=in_window), fresh.expected())
    dispatcher.check_failed()


def in_flight(rank: Rank, two_streams: bool) -> None:
    """Keep two micro-batches in flight and combine them in both orders, on one stream or two."""
    shapes = [Shape(num_tokens=64, hidden_size=1024), Shape(num_tokens=900, hidden_size=4096)]  # the second fills a GPU
    dispatcher = opened(rank, shapes[0])
    per_rank = shapes[0].num_experts // rank.num_ranks
    streams = [torch.cuda.Stream(), torch.cuda.Stream()] if two_streams else [torch.cuda.current_stream()] * 2
    for seed in range(40):
        batches = [Batch.of(shape, rank.rank, rank.num_ranks, seed) for shape in shapes]
        torch.cuda.synchronize()
        slots, outputs = [], [None, None]
        for i, (batch, stream) in enumerate(zip(batches, streams, strict=True)):
            with torch.cuda.stream(stream):
                if (rank.rank + i + seed) % 2:
                    torch.cuda._sleep(1_000_000)  # delays one stream, not the same one on every rank
                slots.append(dispatcher.dispatch_slots(batch.hidden_states, batch.weights, batch.ids))
        for i in (0, 1) if seed % 2 else (1, 0):
            with torch.cuda.stream(streams[i]):
                outputs[i] = dispatcher.combine_slots(on_slots(slots[i], rank.rank, per_rank), slots[i].handle)
        torch.cuda.synchronize()
        assert all(torch.equal(output, batch.expected()) for output, batch in zip(outputs, batches, strict=True)), seed


def refusals(rank: Rank) -> list[str]:
    """Return the messages of refused calls. Refused calls move no tokens, so the exchange after them must be right."""
    shape = Shape(num_tokens=8)
    dispatcher = opened(rank, shape)
    own = Batch.of(shape, rank.rank, rank.num_ranks, 0)
    tensors = (own.hidden_states, own.weights, own.ids)
    messages = []

    def refused(error: type[Exception], function, *arguments) -> None:
        try:
            function(*arguments)
        except error as raised:
            messages.append(str(raised))
        else:
            raise AssertionError(f"{function.__name__} took {arguments}")

    first, second = dispatcher.dispatch_slots(*tensors), dispatcher.dispatch_slots(*tensors)
    refused(InvalidInputError, dispatcher.dispatch_slots, *tensors)
    outputs = [on_slots(slots, rank.rank, shape.num_experts // rank.num_ranks) for slots in (first, second)]
    refused(InvalidInputError, dispatcher.combine_slots, outputs[0][1:], first.handle)
    for slots, output in zip((first, second), outputs, strict=True):
        assert torch.equal(dispatcher.combine_slots(output, slots.handle), own.expected())
    refused(HandleMismatchError, dispatcher.combine_slots, outputs[0], first.handle)
    many = LIMITS.max_tokens_per_rank + 1
    refused(InvalidInputError, dispatcher.dispatch_slots, *(x[:1].expand(many, -1) for x in tensors))
    refused(InvalidInputError, dispatcher.dispatch_slots, own.hidden_states[:, :511], own.weights, own.ids)
    mask = torch.ones(8, dtype=torch.bool, device="cuda")
    for place in range(1, 4):  # addresses of host memory must not reach a kernel
        arguments = [*tensors, mask]
        arguments[place] = arguments[place].cpu()
        refused(InvalidInputError, dispatcher.dispatch_slots, *arguments)
    slots = dispatcher.dispatch_slots(*tensors)
    refused(InvalidInputError, dispatcher.combine_slots, outputs[0].cpu(), slots.handle)
    refused(InvalidInputError, dispatcher.combine_slots, outputs[0][:, :0], slots.handle)
    memory = dispatcher.combine_input(slots.handle, 2 * shape.hidden_size, shape.dtype)
    refused(InvalidInputError, dispatcher.combine_slots, memory[:, : shape.hidden_size], slots.handle)
    refused(InvalidInputError, dispatcher.combine_input, slots.handle, shape.hidden_size, torch.int32)
    refused(InvalidInputError, dispatcher.combine_input, slots.handle, 1 << 24, shape.dtype)
    dispatcher.abandon(slots.handle)
    for in_window in (False, True):
        assert torch.equal(exchange(rank, dispatcher, shape, own, in_window=in_window), own.expected())
    return messages


def differ_about_windows(rank: Rank, timeout: float) -> str:
    """The last rank's experts write into its window, the others' do not. Returns the error after it."""
    shape = Shape(num_tokens=8)
    own = Batch.of(shape, rank.rank, rank.num_ranks, 0)
    for seconds in (60.0, timeout):  # the first exchanges compile the kernels
        close_windows(rank.groups(tp_size=1, dp_size=rank.num_ranks).ep)
        dispatcher = dispatcher_of(rank, shape.num_experts, timeout=seconds)
        for in_window in (False, True):
            assert torch.equal(exchange(rank, dispatcher, shape, own, in_window=in_window), own.expected())
        torch.cuda.synchronize()
    exchange(rank, dispatcher, shape, own, in_window=rank.rank == rank.num_ranks - 1)
    torch.cuda.synchronize()
    try:
        dispatcher.check_failed()
    except TransportError as error:
        return str(error)
    return "no error"


def strided_tensors(rank: Rank) -> list[str]:
    """Exchange tensors that are not contiguous: every second element or column of larger ones. Returns the faults."""
    faults = []
    close_windows(rank.groups(tp_size=1, dp_size=rank.num_ranks).ep)
    for num_tokens in (300, 7):  # windows keep the size of the first dispatch
        shape = Shape(num_tokens=num_tokens, real_rows=num_tokens // 2)
        dispatcher = opened(rank, shape)
        own = Batch.of(shape, rank.rank, rank.num_ranks, 5)
        shuffle = torch.randperm(
            num_tokens, device="cuda", generator=_seeded(rank.rank)
        )  # masked rows between the others
        x, weights, ids, mask = (
            torch.stack([t[shuffle], torch.ones_like(t)], -1).flatten(-2)[..., ::2]
            for t in (own.hidden_states, own.weights, own.ids, own.mask)
        )
        faults += [f"{num_tokens}: an input is contiguous" for t in (x, weights, ids, mask) if t.is_contiguous()]
        slots = dispatcher.dispatch_slots(x, weights, ids, mask)
        wide = on_slots(slots, rank.rank, shape.num_experts // rank.num_ranks)
        wide = torch.stack([wide, torch.ones_like(wide)], -1).flatten(-2)
        if not torch.equal(dispatcher.combine_slots(wide[:, ::2], slots.handle), own.expected()[shuffle]):
            faults.append(f"{num_tokens}: output")
    return faults


def good_steps_after_exceptions_of_experts(rank: Rank, size: tuple[int, int]) -> None:
    """The function of all dispatchers, with windows that its own pipeline opens."""
    close_windows(rank.groups(tp_size=1, dp_size=rank.num_ranks).ep)
    good_steps_after_exceptions(rank, "symmetric", size)
    close_windows(rank.groups(tp_size=1, dp_size=rank.num_ranks).ep)


def good_exchanges_after_exceptions_in_flight(rank: Rank) -> None:
    """Exceptions with two dispatches in flight and while a graph is captured, each more often than there are windows. Then 100
    eager exchanges, and 100 replays of a new graph."""
    shape = Shape(num_tokens=33)
    dispatcher = opened(rank, shape)
    batches = [Batch.of(shape, rank.rank, rank.num_ranks, seed) for seed in range(3)]
    assert torch.equal(exchange(rank, dispatcher, shape, batches[0]), batches[0].expected())

    def fails(*failing: Batch) -> None:
        with ExitStack() as scopes:
            for batch in failing:
                slots = dispatcher.dispatch_slots(batch.hidden_states, batch.weights, batch.ids)
                scopes.enter_context(dispatcher.scope(slots.handle))
            raise ZeroDivisionError

    for _ in range(3):
        with suppress(ZeroDivisionError):
            fails(*batches[:2])
        torch.cuda.synchronize()
        with suppress(ZeroDivisionError), torch.cuda.graph(torch.cuda.CUDAGraph()):
            fails(batches[2])
    for step in range(100):
        batch = batches[step % 3]
        assert torch.equal(exchange(rank, dispatcher, shape, batch), batch.expected()), step
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = exchange(rank, dispatcher, shape, batches[0])
    for step in range(100):
        output.fill_(float("nan"))
        graph.replay()
        assert torch.equal(output, batches[0].expected()), step
    torch.cuda.synchronize()
    dispatcher.check_failed()


def last_rank_raises_alone(rank: Rank) -> None:
    """The last rank raises in its experts. The others combine, and look after the sync with the output."""

    def raises(*_: object) -> torch.Tensor:
        raise ZeroDivisionError("in the experts of one rank")

    steps = Steps(rank, "symmetric", *SMALL)
    assert steps.is_right()
    steps.run(raises if rank.rank == rank.num_ranks - 1 else steps.experts)
    torch.cuda.synchronize()
    steps.pipeline.dispatcher.check_failed()


def replays_until_the_last_rank_stops(rank: Rank, timeout: float) -> tuple[float, str]:
    """The last rank stops after three replays of a graph, and comes back after the time-out of the others.

    Returns the seconds that the replay took which failed, and the error of the check after it.
    """
    shape = Shape(num_tokens=8)
    own = Batch.of(shape, rank.rank, rank.num_ranks, 0)
    for seconds in (60.0, timeout):  # the first exchange compiles the kernels
        close_windows(rank.groups(tp_size=1, dp_size=rank.num_ranks).ep)
        dispatcher = dispatcher_of(rank, shape.num_experts, timeout=seconds)
        assert torch.equal(exchange(rank, dispatcher, shape, own), own.expected())
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [exchange(rank, dispatcher, shape, own) for _ in range(3)]
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        dispatcher.check_failed()
        assert all(torch.equal(output, own.expected()) for output in outputs)
    if rank.rank == rank.num_ranks - 1:
        time.sleep(timeout + 1)
    started = time.monotonic()
    graph.replay()
    torch.cuda.synchronize()  # as a sync with the step's output
    seconds = time.monotonic() - started
    try:
        dispatcher.check_failed()
    except TransportError as error:
        return seconds, str(error)
    return seconds, "no error"


def seconds_of_windows(rank: Rank) -> tuple[float, float]:
    """The time-outs of windows that no caller gives one: in a watched group, and in a group without a watchdog."""
    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    unwatched = NcclTransport(ep.innermost.process_group, "ep")
    size = WindowSize(received_bytes=1 << 20, returned_bytes=1 << 20, rank_flags=64)
    found = []
    for transport in (ep, unwatched):
        close_windows(transport)
        found.append(open_windows(transport, size).timeout)
        ep.barrier()
    close_windows(ep)
    return found[0], found[1]


def random_steps(rank: Rank, steps: int, seed: int) -> int:
    """Run steps of random sizes, routing, SMs and kinds of combine without a sync in between. Returns the number of wrong
    elements."""
    sizes = torch.Generator().manual_seed(seed)  # the same on every rank
    dispatcher = opened(rank, Shape(num_tokens=1))
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    batches = {}
    for _ in range(steps):
        draw = torch.randint(0, 1 << 30, (4,), generator=sizes).tolist()
        num_tokens = (1, 2, 3, 8, 16, 17, 64, 255, 600, 1000)[draw[0] % 10]
        real_rows = (None, None, num_tokens, num_tokens // 2, 0)[draw[1] % 5]
        shape = Shape(num_tokens=num_tokens, routing=ROUTINGS[draw[2] % 5], real_rows=real_rows)
        dispatcher.max_sms = (None, None, 1, 24)[draw[2] // 5 % 4]
        key = (shape, draw[3] % 4)
        if key not in batches:
            batches[key] = Batch.of(shape, rank.rank, rank.num_ranks, draw[3] % 4)
        in_window = draw[3] // 4 % 2 > 0
        output = exchange(rank, dispatcher, shape, batches[key], in_window=in_window)
        wrong += (output != batches[key].expected()).sum()
    dispatcher.check_failed()
    return int(wrong)


def waits_for_the_last_rank(rank: Rank, timeout: float) -> tuple[float, str]:
    """The last rank stops after one exchange. Returns the seconds until this rank's error, and the error."""
    shape = Shape(num_tokens=8)
    close_windows(rank.groups(tp_size=1, dp_size=rank.num_ranks).ep)
    dispatcher = dispatcher_of(rank, shape.num_experts, timeout=timeout)
    own = Batch.of(shape, rank.rank, rank.num_ranks, 0)
    assert torch.equal(exchange(rank, dispatcher, shape, own), own.expected())
    torch.cuda.synchronize()
    if rank.rank == rank.num_ranks - 1:
        time.sleep(timeout + 2)
        return 0.0, ""
    started = time.monotonic()
    for _ in range(20):  # later kernels do not wait again
        try:
            exchange(rank, dispatcher, shape, own)
        except TransportError as error:
            return time.monotonic() - started, str(error)
    torch.cuda.synchronize()
    elapsed = time.monotonic() - started
    try:
        dispatcher.dispatch_slots(own.hidden_states, own.weights, own.ids)
    except TransportError as error:
        return elapsed, str(error)
    return elapsed, "no error"


def runs_cases(rank: Rank, to_run: list[Case]) -> list[str]:
    """Run verification.run_case for each case. Returns the faults."""
    close_windows(rank.groups(tp_size=1, dp_size=rank.num_ranks).ep)
    return [f"{case}: {fault}" for case in to_run if (fault := run_case(rank, case)) is not None]


def reason(rank: Rank) -> str | None:
    return why_not_symmetric(gather_facts(rank.groups(tp_size=1, dp_size=rank.num_ranks).ep), tokens_per_rank=64)
