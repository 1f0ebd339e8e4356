"""The faults of the original design, one test each: it fails on the original's shape and passes here."""

from types import SimpleNamespace

import pytest
import torch

from tests.ranks.original_design import (
    OriginalAll2All,
    OriginalAllGather,
    OriginalMC2,
    OriginalNaiveMulticast,
    original_int8,
)
from vllm_npu.core.limits import MoELayer
from vllm_npu.core.routing import ExpertPermutation, local_expert_ids
from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.device.portable_ops import quantize_per_token
from vllm_npu.errors import InvalidInputError, TransportError
from vllm_npu.strategies.prepare_finalize.all2all import All2AllPrepareAndFinalize
from vllm_npu.strategies.prepare_finalize.allgather import AllGatherPrepareAndFinalize
from vllm_npu.strategies.prepare_finalize.mc2 import MC2PrepareAndFinalize
from vllm_npu.strategies.prepare_finalize.naive_multicast import NaiveMulticastPrepareAndFinalize
from vllm_npu.strategies.select import select
from vllm_npu.tools.launch import Rank, ThreadRankPool
from vllm_npu.tools.reference import select_topk
from vllm_npu.trust.recording import CollectiveCounter

HIDDEN, EXPERTS = 4, 8
CLASSES = (MC2PrepareAndFinalize, All2AllPrepareAndFinalize, AllGatherPrepareAndFinalize)
LAYER = MoELayer(num_experts=EXPERTS, top_k=2, hidden_size=HIDDEN, dtype=torch.float32)


def tokens(num_tokens: int, offset: float = 0.0) -> torch.Tensor:
    return torch.arange(num_tokens * HIDDEN, dtype=torch.float32).view(num_tokens, HIDDEN) + 1 + offset


def logits(num_tokens: int) -> torch.Tensor:
    return torch.randn(num_tokens, EXPERTS, generator=torch.Generator().manual_seed(num_tokens))


def plan(*counts: int, sharding: TokenSharding = TokenSharding.REPLICATED) -> StepPlan:
    return StepPlan(num_tokens_across_dp=counts, sharding=sharding)


def on_ranks(num_ranks: int, function, *args) -> list:
    with ThreadRankPool(num_ranks, timeout=10) as pool:
        return pool.run(function, *args)


def round_trip(stages, x: torch.Tensor, step: StepPlan) -> torch.Tensor:
    prepared = stages.prepare(x, (logits(x.shape[0]),), step)
    return stages.finalize(prepared.hidden_states * 10, prepared.handle).hidden_states


@pytest.mark.parametrize("num_tokens", [5, 6, 7, 9])
def test_all2all_pads_only_below_tp_and_slices_unevenly(num_tokens):
    def original(rank: Rank):
        stages = OriginalAll2All(rank.groups(tp_size=4, dp_size=1))
        hidden_states, *_ = stages.prepare(tokens(num_tokens), logits(num_tokens))
        return stages.finalize(hidden_states * 10, False)

    def ours(rank: Rank):
        return round_trip(
            All2AllPrepareAndFinalize(rank.groups(tp_size=4, dp_size=1)), tokens(num_tokens), plan(num_tokens)
        )

    with pytest.raises((RuntimeError, TransportError), match=r"invalid tensor size|failed"):
        on_ranks(4, original)
    assert all(torch.equal(output, tokens(num_tokens) * 10) for output in on_ranks(4, ours))


@pytest.mark.parametrize("num_tokens", [4, 8])
def test_finalize_writes_into_the_callers_hidden_states(num_tokens):
    def original(rank: Rank):
        stages = OriginalAll2All(rank.groups(tp_size=4, dp_size=1))
        x = tokens(num_tokens)
        hidden_states, *_ = stages.prepare(x, logits(num_tokens))
        stages.finalize(hidden_states * 10, False)
        return x

    def ours(rank: Rank):
        untouched = []
        for strategy in (MC2PrepareAndFinalize, All2AllPrepareAndFinalize):
            x = tokens(num_tokens)
            output = round_trip(strategy(rank.groups(tp_size=4, dp_size=1)), x, plan(num_tokens))
            output.zero_()
            untouched.append(torch.equal(x, tokens(num_tokens)))
        return all(untouched)

    assert not any(torch.equal(x, tokens(num_tokens)) for x in on_ranks(4, original))
    assert all(on_ranks(4, ours))


def test_state_on_self_mixes_two_calls_in_flight():
    def original(rank: Rank):
        stages = OriginalAll2All(rank.groups(tp_size=2, dp_size=1))
        a, *_ = stages.prepare(tokens(4), logits(4))
        b, *_ = stages.prepare(tokens(8, offset=100), logits(8))
        first = stages.finalize(a * 10, False)
        return first, stages.finalize(b * 10, False)

    def ours(rank: Rank):
        results = []
        groups = rank.groups(tp_size=2, dp_size=1)
        for strategy in CLASSES:
            stages = strategy(groups)
            a = stages.prepare(tokens(4), (), plan(4))
            b = stages.prepare(tokens(8, offset=100), (), plan(8))
            first = stages.finalize(a.hidden_states * 10, a.handle).hidden_states
            second = stages.finalize(b.hidden_states * 10, b.handle).hidden_states
            factor = 2 if strategy is AllGatherPrepareAndFinalize else 1  # both TP ranks bring a full summand
            results += [torch.equal(first, tokens(4) * 10 * factor), torch.equal(second, tokens(8, 100) * 10 * factor)]
        return all(results)

    with pytest.raises((RuntimeError, AttributeError)):
        on_ranks(2, original)
    assert all(on_ranks(2, ours))


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, HIDDEN), (torch.float32, 2 * HIDDEN)])
def test_output_may_have_another_dtype_or_width_than_the_input(dtype, width):
    def original(rank: Rank):
        stages = OriginalAll2All(rank.groups(tp_size=2, dp_size=1))
        hidden_states, *_ = stages.prepare(tokens(4), logits(4))
        return stages.finalize(hidden_states.new_ones(hidden_states.shape[0], width, dtype=dtype), False)

    def ours(rank: Rank):
        shapes = []
        groups = rank.groups(tp_size=2, dp_size=1)
        for strategy in CLASSES:
            stages = strategy(groups)
            prepared = stages.prepare(tokens(4), (), plan(4))
            routed = prepared.hidden_states.new_ones(prepared.hidden_states.shape[0], width, dtype=dtype)
            output = stages.finalize(routed, prepared.handle).hidden_states
            shapes.append((tuple(output.shape), output.dtype))
        return set(shapes)

    with pytest.raises((RuntimeError, TransportError)):
        on_ranks(2, original)
    assert on_ranks(2, ours) == [{((4, width), dtype)}] * 2


def test_mask_is_as_long_as_the_slice_of_hidden_states():
    max_tokens, tp_size = 1001, 8

    def original(rank: Rank):
        padded = -(-max_tokens // tp_size) * tp_size
        context = SimpleNamespace(padded_num_tokens=padded, mc2_mask=torch.zeros(max_tokens, dtype=torch.bool)[:padded])
        stages = OriginalMC2(rank.groups(tp_size=tp_size, dp_size=1), context)
        hidden_states, _, mask = stages.prepare(tokens(max_tokens), logits(max_tokens))
        return hidden_states.shape[0] == mask.shape[0]

    def ours(rank: Rank):
        stages = MC2PrepareAndFinalize(rank.groups(tp_size=tp_size, dp_size=1))
        prepared = stages.prepare(tokens(max_tokens), (), plan(max_tokens))
        assert prepared.hidden_states.shape[0] == prepared.mask.shape[0] == 126
        return int(prepared.mask.sum())

    assert not all(on_ranks(tp_size, original))
    assert sum(on_ranks(tp_size, ours)) == max_tokens


@pytest.mark.parametrize("flag", ["enable_shared_expert_dp", "replace_allreduce"])
def test_mask_is_sliced_if_and_only_if_hidden_states_are(flag):
    num_tokens = 6

    def original(rank: Rank):
        context = SimpleNamespace(padded_num_tokens=num_tokens, mc2_mask=torch.ones(num_tokens, dtype=torch.bool))
        stages = OriginalMC2(rank.groups(tp_size=2, dp_size=1), context)
        hidden_states, _, mask = stages.prepare(tokens(num_tokens), logits(num_tokens), **{flag: True})
        return hidden_states.shape[0] == mask.shape[0]

    def original_without_mask(rank: Rank):
        context = SimpleNamespace(padded_num_tokens=num_tokens, mc2_mask=None)
        return OriginalMC2(rank.groups(tp_size=2, dp_size=1), context).prepare(tokens(num_tokens), logits(num_tokens))

    def ours(rank: Rank):
        flags = {"enable_shared_expert_dp": False, "replace_allreduce": False, "sequence_parallel": False, flag: True}
        step = plan(num_tokens - 1, sharding=TokenSharding.from_flags(**flags))  # a full step has no mask
        stages = MC2PrepareAndFinalize(rank.groups(tp_size=2, dp_size=1))
        prepared = stages.prepare(tokens(3), (), step)
        return prepared.hidden_states.shape[0] == prepared.mask.shape[0] == 3

    assert not any(on_ranks(2, original))
    with pytest.raises(TypeError):
        on_ranks(2, original_without_mask)
    assert all(on_ranks(2, ours))


@pytest.mark.parametrize("strategy", [AllGatherPrepareAndFinalize, NaiveMulticastPrepareAndFinalize])
def test_output_has_the_rows_of_the_input_for_every_flag(strategy):
    counts = (3, 5)
    original_class = OriginalAllGather if strategy is AllGatherPrepareAndFinalize else OriginalNaiveMulticast

    def original(rank: Rank):
        context = SimpleNamespace(enable_sp=False, max_tokens_across_dp=5, cu_tokens_across_dp=[3, 8])
        stages = original_class(rank.groups(tp_size=1, dp_size=2), context)
        x = tokens(counts[rank.rank])
        hidden_states, *_ = stages.prepare(x, logits(x.shape[0]), enable_shared_expert_dp=True)
        return stages.finalize(hidden_states, False).shape[0] == x.shape[0]

    def ours(rank: Rank):
        stages = strategy(rank.groups(tp_size=1, dp_size=2))
        rows = []
        for sharding in TokenSharding:
            for reduce_results in (False, True):
                x = tokens(counts[rank.rank])
                prepared = stages.prepare(x, (), plan(*counts, sharding=sharding))
                output = stages.finalize(prepared.hidden_states, prepared.handle, reduce_results=reduce_results)
                assert output.reduced, "there is no other TP rank"
                rows.append(output.hidden_states.shape[0] == x.shape[0] and output.sharding is sharding)
        return all(rows)

    assert not any(on_ranks(2, original))
    assert all(on_ranks(2, ours))


def test_padding_tokens_reach_no_expert():
    """In the original all padding rows have equal logits, so all of them choose the same experts."""
    num_tokens, padded = 1, 8

    def original(rank: Rank):
        context = SimpleNamespace(padded_num_tokens=padded, mc2_mask=torch.arange(padded) < num_tokens)
        stages = OriginalMC2(rank.groups(tp_size=1, dp_size=2), context)
        _, router_logits, _ = stages.prepare(tokens(num_tokens), logits(num_tokens))
        _, ids = select_topk(router_logits, 2)
        return torch.bincount(ids[num_tokens:].flatten().long(), minlength=EXPERTS).tolist()

    def ours(rank: Rank):
        counts = (num_tokens, padded, 0)  # an idle rank: without one mc2 does not pad
        x = tokens(counts[rank.rank])
        stages = MC2PrepareAndFinalize(rank.groups(tp_size=1, dp_size=3))
        prepared = stages.prepare(x, select_topk(logits(x.shape[0]), 2), plan(*counts))
        weights, ids = prepared.per_token
        assert bool((weights[x.shape[0] :] == 0).all())
        assert bool((ids[x.shape[0] :] == -1).all())
        permutation = ExpertPermutation.build(local_expert_ids(ids, 0, EXPERTS), EXPERTS)
        return ids.shape[0], int(permutation.tokens_per_expert.sum())

    assert on_ranks(2, original) == [[padded - num_tokens] * 2 + [0] * (EXPERTS - 2)] * 2
    assert on_ranks(3, ours) == [(padded, num_tokens * 2), (padded, padded * 2), (padded, 0)]


def test_finalize_does_not_ask_again_for_the_mode():
    def original(rank: Rank):
        context = SimpleNamespace(enable_sp=False, max_tokens_across_dp=4)
        stages = OriginalAllGather(rank.groups(tp_size=2, dp_size=2), context)
        hidden_states, *_ = stages.prepare(tokens(4), logits(4))
        context.enable_sp = True  # the switch is read anew in finalize: a DP gather meets an EP scatter
        return stages.finalize(hidden_states, False).shape[0]

    def ours(rank: Rank):
        stages = AllGatherPrepareAndFinalize(rank.groups(tp_size=2, dp_size=2))
        prepared = stages.prepare(tokens(4), (), plan(4, 4))
        stages.prepare(tokens(2), (), plan(4, 4, sharding=TokenSharding.SLICED_OVER_TP))  # another mode in between
        return stages.finalize(prepared.hidden_states, prepared.handle).hidden_states.shape[0]

    assert on_ranks(4, original) == [2] * 4
    assert on_ranks(4, ours) == [4] * 4


def test_prepare_and_finalize_use_one_group_object():
    def original(rank: Rank):
        at_prepare, at_finalize = CollectiveCounter(), CollectiveCounter()
        context = SimpleNamespace(enable_sp=False, max_tokens_across_dp=4)
        groups = rank.groups(tp_size=1, dp_size=2, counter=at_prepare)
        stages = OriginalAllGather(
            groups, context, current_dp_group=rank.groups(tp_size=1, dp_size=2, counter=at_finalize).dp
        )
        hidden_states, *_ = stages.prepare(tokens(4), logits(4))
        stages.finalize(hidden_states, False)
        return dict(at_prepare.calls), dict(at_finalize.calls)

    def ours(rank: Rank):
        counter = CollectiveCounter()
        stages = AllGatherPrepareAndFinalize(rank.groups(tp_size=1, dp_size=2, counter=counter))
        prepared = stages.prepare(tokens(4), (), plan(4, 4))
        stages.groups = rank.groups(tp_size=1, dp_size=2)  # groups made anew in between
        stages.finalize(prepared.hidden_states, prepared.handle)
        return dict(counter.calls)

    assert on_ranks(2, original) == [({"dp.all_gather": 2}, {"dp.reduce_scatter": 1})] * 2
    assert on_ranks(2, ours) == [{"dp.all_gather": 1, "dp.reduce_scatter": 1}] * 2


def test_output_keeps_no_larger_buffer_alive():
    num_tokens, padded = 1, 4096

    def original(rank: Rank):
        context = SimpleNamespace(padded_num_tokens=padded, mc2_mask=torch.arange(padded) < num_tokens)
        stages = OriginalMC2(rank.groups(tp_size=2, dp_size=1), context)
        hidden_states, *_ = stages.prepare(tokens(num_tokens), logits(num_tokens))
        return stages.finalize(hidden_states, False).untyped_storage().nbytes()

    def ours(rank: Rank):
        largest = 0
        counts = (num_tokens, padded)
        for strategy in CLASSES:
            stages = strategy(rank.groups(tp_size=1, dp_size=2))
            prepared = stages.prepare(tokens(counts[rank.rank]), (), plan(*counts))
            output = stages.finalize(prepared.hidden_states, prepared.handle).hidden_states
            largest = max(largest, output.untyped_storage().nbytes() - output.nbytes)
        return largest

    assert on_ranks(2, original) == [padded * HIDDEN * 4] * 2
    assert on_ranks(2, ours) == [0, 0]


def test_multicast_sends_one_message_a_rank_that_has_tokens_and_scatters_the_sum():
    counts = (3, 0, 5)

    def original(rank: Rank):
        counter = CollectiveCounter()
        context = SimpleNamespace(cu_tokens_across_dp=[3, 3, 8])
        stages = OriginalNaiveMulticast(rank.groups(tp_size=1, dp_size=3, counter=counter), context)
        x = tokens(counts[rank.rank])
        hidden_states, *_ = stages.prepare(x, logits(x.shape[0]))
        stages.finalize(hidden_states, False)
        return dict(counter.calls)

    def ours(rank: Rank):
        counter = CollectiveCounter()
        stages = NaiveMulticastPrepareAndFinalize(rank.groups(tp_size=1, dp_size=3, counter=counter))
        x = tokens(counts[rank.rank])
        prepared = stages.prepare(
            x, (torch.ones(x.shape[0], 2), torch.zeros(x.shape[0], 2, dtype=torch.int32)), plan(*counts)
        )
        output = stages.finalize(prepared.hidden_states, prepared.handle).hidden_states
        assert torch.equal(output, x * 3)
        return dict(counter.calls)

    assert on_ranks(3, original) == [{"dp.broadcast": 6, "dp.all_reduce": 1}] * 3
    assert on_ranks(3, ours) == [{"dp.broadcast": 2, "dp.reduce_scatter": 1}] * 3


def test_more_tokens_than_planned_are_refused():
    def original(rank: Rank):
        context = SimpleNamespace(padded_num_tokens=4, mc2_mask=torch.ones(4, dtype=torch.bool))
        stages = OriginalMC2(rank.groups(tp_size=2, dp_size=1), context)
        hidden_states, _, mask = stages.prepare(tokens(6), logits(6))
        return hidden_states.shape[0], mask.shape[0]

    def ours(rank: Rank):
        refusals = []
        for strategy in CLASSES:
            with pytest.raises(InvalidInputError, match="has 6 rows on rank"):
                strategy(rank.groups(tp_size=2, dp_size=1)).prepare(tokens(6), (), plan(4))
            refusals.append(strategy)
        return len(refusals)

    assert on_ranks(2, original) == [(3, 2)] * 2  # silently: more rows than the mask covers
    assert on_ranks(2, ours) == [3, 3]


def test_the_output_says_whether_a_sum_over_tp_is_missing():
    """A caller that obeys the tag gets the same sum from every strategy; one that only knows reduce_results does not."""

    def original(rank: Rank):
        outputs = []
        groups = rank.groups(tp_size=2, dp_size=1)
        for stages in (OriginalAll2All(groups), OriginalAllGather(groups, SimpleNamespace(enable_sp=False))):
            hidden_states, *_ = stages.prepare(tokens(4), logits(4))
            share = hidden_states / 2 if isinstance(stages, OriginalAllGather) else hidden_states
            outputs.append(groups.tp.all_reduce(stages.finalize(share, reduce_results=False)))
        return torch.equal(*outputs)

    def ours(rank: Rank):
        outputs = []
        groups = rank.groups(tp_size=2, dp_size=1)
        for strategy in CLASSES:
            for reduce_results in (False, True):
                stages = strategy(groups)
                prepared = stages.prepare(tokens(4), (), plan(4))
                gathered = strategy is AllGatherPrepareAndFinalize
                share = prepared.hidden_states / 2 if gathered else prepared.hidden_states
                output = stages.finalize(share, prepared.handle, reduce_results=reduce_results)
                assert output.reduced == (reduce_results or not gathered)
                outputs.append(output.hidden_states if output.reduced else groups.tp.all_reduce(output.hidden_states))
        return all(torch.equal(output, tokens(4)) for output in outputs)

    assert not any(on_ranks(2, original))
    assert all(on_ranks(2, ours))


def test_mc2_is_not_taken_beyond_its_capacity_nor_with_no_rows():
    def original(rank: Rank):
        rows = []
        for num_tokens in (1000, 0):
            context = SimpleNamespace(padded_num_tokens=num_tokens, mc2_mask=torch.ones(num_tokens, dtype=torch.bool))
            stages = OriginalMC2(rank.groups(tp_size=1, dp_size=1), context)
            rows.append(stages.prepare(tokens(num_tokens), logits(num_tokens))[0].shape[0])
        return rows

    def ours(rank: Rank):
        topology = ParallelTopology.of_rank(0, tp_size=1, dp_size=2)
        selection = select("mc2", topology, plan(1000, 3), layer=LAYER)
        stages = MC2PrepareAndFinalize(rank.groups(tp_size=1, dp_size=1))
        prepared = stages.prepare(tokens(0), (), plan(0))
        return selection.strategy, "512" in selection.reason, prepared.hidden_states.shape[0], bool(prepared.mask.any())

    assert on_ranks(1, original) == [[1000, 0]]
    assert on_ranks(1, ours) == [("all2all", True, 1, False)]


def test_allgather_moves_ids_and_weights_in_one_message_without_padding():
    counts, top_k = (2, 30), 2

    def original(rank: Rank):
        counter = CollectiveCounter()
        context = SimpleNamespace(enable_sp=False, max_tokens_across_dp=max(counts))
        stages = OriginalAllGather(rank.groups(tp_size=1, dp_size=2, counter=counter), context)
        x = tokens(counts[rank.rank])
        stages.prepare(x, logits(x.shape[0]))
        return counter.calls["dp.all_gather"], counter.bytes_sent["dp.all_gather"]

    def ours(rank: Rank):
        counter = CollectiveCounter()
        stages = AllGatherPrepareAndFinalize(rank.groups(tp_size=1, dp_size=2, counter=counter))
        x = tokens(counts[rank.rank])
        weights, ids = select_topk(logits(x.shape[0]), top_k)
        stages.prepare(x, (weights, ids), plan(*counts))
        return counter.calls["dp.all_gather"], counter.bytes_sent["dp.all_gather"]

    padded_row = 4 * (HIDDEN + EXPERTS)
    assert on_ranks(2, original) == [(2, 30 * padded_row)] * 2
    packed_row = 4 * HIDDEN + 8 * top_k
    assert on_ranks(2, ours) == [(1, 2 * packed_row), (1, 30 * packed_row)]


def test_a_row_of_zeros_has_a_defined_int8_value():
    rows = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    assert original_int8(rows)[0][0].isnan().all()
    values, scales = quantize_per_token(rows)
    assert values.tolist() == [[0, 0], [64, -127]]  # 63.5 rounds half to even
    assert scales.tolist() == [0.0, pytest.approx(2 / 127)]
