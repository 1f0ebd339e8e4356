"""A stage's start and finish: the plain stage's bits, two micro-batches in flight, finished in either order.

On threads and over gloo here; tests/emulated/test_token_ops.py runs IN_FLIGHT on NPU tensors.
"""

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.cases import distinct_ids, same_bits, seeded
from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.errors import HandleMismatchError, InvalidInputError, TransportError
from vllm_npu.strategies.dispatch.base import RoutedTokens
from vllm_npu.strategies.select import build
from vllm_npu.tools.launch import ProcessRankPool, Rank
from vllm_npu.trust.recording import CollectiveCounter

EXPERTS, TOP_K, HIDDEN = 12, 2, 16
ORDERS = [(0, 1), (1, 0)]


def batches_of(rank: Rank) -> Iterator[RoutedTokens]:
    """Two micro-batches of different sizes, one of them empty on a rank: hidden states with a NaN, weights, ids."""
    for batch, tokens in enumerate((rank.rank * 2 + 3, rank.rank)):
        generator = seeded(10 * rank.rank + batch)
        hidden_states = torch.randn(tokens, HIDDEN, generator=generator, device="cpu").half()
        hidden_states[-1:, 0] = float("nan")
        weights = torch.rand(tokens, TOP_K, generator=generator, device="cpu")
        ids = distinct_ids(tokens, TOP_K, EXPERTS, generator)
        hidden_states, weights, ids = (each.to(rank.device) for each in (hidden_states, weights, ids))
        yield RoutedTokens(hidden_states=hidden_states, topk_weights=weights, topk_ids=ids)


def in_flight(rank: Rank, strategy: str) -> None:
    """dispatch and combine of both batches: as the plain stages have it, whatever finishes first."""
    dispatcher = build(strategy, rank.groups(tp_size=1, dp_size=rank.num_ranks), EXPERTS).dispatcher
    batches = list(batches_of(rank))
    plain = [dispatcher.dispatch(batch) for batch in batches]
    wanted = [dispatcher.combine(each.expert_input * 2, each.handle) for each in plain]
    for order in ORDERS:
        for back in ORDERS:
            mine = [replace(batch, hidden_states=batch.hidden_states.clone()) for batch in batches]
            pending = [dispatcher.dispatch_start(batch) for batch in mine]
            mine[0].hidden_states.fill_(-7)  # the start has read it
            dispatched = {i: pending[i].finish() for i in order}
            for i, each in enumerate(plain):
                rows = int(each.tokens_per_expert.sum())
                assert same_bits(dispatched[i].expert_input[:rows], each.expert_input[:rows])
                assert same_bits(dispatched[i].tokens_per_expert, each.tokens_per_expert)
            combined = {i: dispatcher.combine(dispatched[i].expert_input * 2, dispatched[i].handle) for i in back}
            assert all(same_bits(combined[i], each) for i, each in enumerate(wanted))
            with pytest.raises(HandleMismatchError, match="has already used"):
                pending[0].finish()
            with pytest.raises(HandleMismatchError, match="has already used"):
                dispatcher.combine(dispatched[0].expert_input, dispatched[0].handle)


def between(rank: Rank, strategy: str) -> None:
    """Other collectives of the same group, and the plain stages, while a batch is in flight."""
    groups = rank.groups(tp_size=1, dp_size=rank.num_ranks)
    dispatcher = build(strategy, groups, EXPERTS).dispatcher
    first, second = batches_of(rank)
    pending = dispatcher.dispatch_start(first)
    for _ in range(3):
        assert groups.ep.all_gather(torch.tensor([rank.rank], device=rank.device)).tolist() == [*range(rank.num_ranks)]
        assert groups.ep.all_reduce(torch.ones(5, device=rank.device)).tolist() == [rank.num_ranks] * 5
        plain = dispatcher.dispatch(second)
        groups.ep.barrier()
        dispatcher.combine(plain.expert_input, plain.handle)
    late, plain = pending.finish(), dispatcher.dispatch(first)
    assert same_bits(late.tokens_per_expert, plain.tokens_per_expert)
    assert same_bits(late.expert_input[: late.handle.rows], plain.expert_input[: late.handle.rows])


def counts_and_overlap(rank: Rank, strategy: str) -> None:
    """A pipeline with something to do meanwhile: the same output and counts, and it ran once."""
    done, results = [], []
    batch = next(batches_of(rank))
    tensors = batch.hidden_states, batch.topk_weights, batch.topk_ids
    step = StepPlan(
        num_tokens_across_dp=tuple(2 * r + 3 for r in range(rank.num_ranks)), sharding=TokenSharding.REPLICATED
    )
    for meanwhile in (None, lambda: done.append(1)):
        counter = CollectiveCounter()
        pipeline = build(strategy, rank.groups(tp_size=1, dp_size=rank.num_ranks, counter=counter), EXPERTS)
        output = pipeline.run(*tensors, lambda rows, *_: rows * 3, step, meanwhile=meanwhile)
        results.append((output.hidden_states, counter.calls, counter.bytes_sent))
    assert done == [1]
    assert same_bits(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]


def leaves_the_sum_over_tp(rank: Rank) -> tuple[bool, int]:
    """Of a pipeline whose caller adds up over TP itself: the tag of its output, and its all-reduces."""
    counter = CollectiveCounter()
    pipeline = build("allgather", rank.groups(tp_size=2, dp_size=1, counter=counter), EXPERTS)
    tensors = torch.ones(3, HIDDEN), torch.ones(3, 1), torch.tensor([[0], [5], [11]])
    step = StepPlan(num_tokens_across_dp=(3,), sharding=TokenSharding.REPLICATED)
    output = pipeline.run(*tensors, lambda rows, *_: rows, step, reduce_results=False)
    return output.reduced, counter.calls["tp.all_reduce"]


def test_a_pipeline_leaves_the_sum_over_tp_to_its_caller(pools):
    assert pools("threaded", 2).run(leaves_the_sum_over_tp) == [(False, 0)] * 2


def start_does_not_wait(rank: Rank) -> None:
    """The last rank comes late to an all-to-all. The others have started theirs by then."""
    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    rows, sizes = torch.ones(2 * rank.num_ranks, HIDDEN, device=rank.device), [2] * rank.num_ranks
    for seconds in (0, 1.5):  # the first round opens all connections
        ep.barrier()
        if rank.rank == rank.num_ranks - 1:
            time.sleep(seconds)
        started = time.monotonic()
        pending = ep.all_to_all_start(rows, sizes, sizes)
        took = time.monotonic() - started
        pending.finish()
    assert took < 1, f"the start waited {took:.1f} s for a rank that was late"


def one_tensor_alone(rank: Rank) -> None:
    """exchange_tokens_start of one large tensor, which is its own message: the caller may write it after the start."""
    groups = rank.groups(tp_size=1, dp_size=rank.num_ranks)
    for t in (groups.tp, groups.ep):
        rows = 1 << 18
        x = torch.full((rows * t.size, 8), float(rank.rank), device=rank.device)
        pending = t.exchange_tokens_start([x], torch.full((t.size,), rows, device=rank.device))
        x.fill_(-7)
        (received,), sent_rows, received_rows = pending.finish()
        assert sent_rows == received_rows == [rows] * t.size
        senders = [rank.rank] if t.size == 1 else range(t.size)
        assert [part.unique().tolist() for part in received.split(rows)] == [[sender] for sender in senders]


# What each rank runs, by what it shows.
IN_FLIGHT = {"two batches": in_flight, "others between": between, "meanwhile": counts_and_overlap}


@pytest.mark.parametrize("kind", ["threaded", "gloo"])
@pytest.mark.parametrize("shows", IN_FLIGHT)
@pytest.mark.parametrize("strategy", ["all2all", "allgather"])
def test_start_and_finish(pools, kind, shows, strategy):
    pools(kind, 3).run(IN_FLIGHT[shows], strategy)


@pytest.mark.parametrize("kind", ["threaded", "gloo"])
def test_one_tensor_alone_may_be_written_after_the_start(pools, kind):
    pools(kind, 3).run(one_tensor_alone)


def test_a_start_does_not_wait_for_the_other_ranks(pools):
    pools("gloo", 3).run(start_does_not_wait)


def starts_without_the_others(rank: Rank) -> None:
    ep = rank.groups(tp_size=1, dp_size=2).ep
    ep.barrier()
    if rank.rank == 0:
        raise ValueError("its own fault, before its all-to-all")
    ep.all_to_all_start(torch.ones(2, HIDDEN, device=rank.device), [1, 1], [1, 1]).finish()


@pytest.mark.timeout(120)
def test_a_finish_fails_in_time_where_another_rank_never_starts():
    with ProcessRankPool(2, timeout=10) as pool:
        started = time.monotonic()
        own, waiting = pool.outcomes(starts_without_the_others)
        assert time.monotonic() - started < 40
    assert isinstance(own, ValueError)
    assert isinstance(waiting, TransportError)
    assert str(waiting).startswith("all_to_all on group 'ep' failed on rank 1: ")


def refused(rank: Rank) -> None:
    t = rank.groups(tp_size=1, dp_size=2).ep
    with pytest.raises(InvalidInputError, match="add up to"):
        t.all_to_all_start(torch.zeros(3, 1), [1, 1], [1, 1])
    with pytest.raises(InvalidInputError, match="cannot share a message"):
        t.exchange_tokens_start([torch.zeros(3)], torch.ones(2, dtype=torch.int64))
    assert t.all_to_all_start(torch.ones(2, 1) * t.rank, [1, 1], [1, 1]).finish().flatten().tolist() == [0, 1]


def test_a_start_refuses_what_the_plain_call_refuses(pools):
    pools("threaded", 2).run(refused)
