"""Tests dispatch and combine over symmetric memory: exact results in all shapes, captured graphs, and a rank that stops."""

from dataclasses import replace

import pytest
import torch

from tests.cuda import symmetric_ranks as ranks
from tests.cuda.conftest import NUM_RANKS, SHARED
from tests.cuda.symmetric_ranks import ROUTINGS, Shape
from tests.ranks.test_exceptions import LARGE, SMALL
from vllm_npu.core.limits import NVLINK
from vllm_npu.envs import COLLECTIVE_DEADLINE
from vllm_npu.errors import RankFailureError
from vllm_npu.strategies.table import ALL_STRATEGIES
from vllm_npu.tools.launch import ProcessRankPool
from vllm_npu.tools.verification import cases
from vllm_npu.trust.watchdog import GRACE_SECONDS

pytestmark = pytest.mark.cuda

TOKENS = (1, 2, 3, 7, 16, 17, 33, 255, 257, 1000)
STEPS = 300 if SHARED else 10_000  # two ranks that take turns exchange 200 times in a second


def faults(pool, shapes: list[Shape], every_way: bool = True) -> list[str]:
    return [fault for found in pool.run(ranks.exchanges, shapes, every_way) for fault in found]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_odd_and_skewed_steps_are_exact(gpus, routing):
    assert faults(gpus, [Shape(num_tokens=n, routing=routing) for n in TOKENS]) == []


@pytest.mark.parametrize("routing", ["uniform", "own rank only"])
def test_masked_rows_go_nowhere_and_come_back_as_zeros(gpus, routing):
    shapes = [Shape(num_tokens=n, real_rows=real, routing=routing) for n in TOKENS for real in (0, n // 2, n)]
    assert faults(gpus, shapes) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("hidden_size", [2, 24, 1000, 7168])
def test_dtypes_and_widths(gpus, dtype, hidden_size):
    base = Shape(num_tokens=9, hidden_size=hidden_size, dtype=dtype, ids_dtype=torch.int64)
    every_way = hidden_size == 1000  # each way is a kernel that must be compiled
    assert faults(gpus, [base, replace(base, num_tokens=400)], every_way) == []


@pytest.mark.parametrize("max_sms", [1, 7, 24, 1000])
def test_few_multiprocessors_are_exact(gpus, max_sms):
    base = Shape(num_tokens=0, max_sms=max_sms, hidden_size=1000, ids_dtype=torch.int64)
    shapes = [
        replace(base, num_tokens=n, routing=routing) for n in (0, *TOKENS) for routing in ("uniform", "one expert")
    ]
    shapes += [replace(base, num_tokens=n, real_rows=n // 2) for n in TOKENS]
    shapes += [
        replace(base, num_tokens=n, hidden_size=7168, dtype=torch.float32) for n in (3, 100)
    ]  # a row in two parts
    assert faults(gpus, shapes) == []


@pytest.mark.parametrize(("top_k", "num_experts"), [(1, 8), (2, 8), (3, 24), (6, 64), (8, 256)])
def test_choices_and_experts(gpus, top_k, num_experts):
    base = Shape(num_tokens=13, top_k=top_k, num_experts=num_experts)
    assert faults(gpus, [base, replace(base, num_tokens=300)]) == []


@pytest.mark.parametrize("num_tokens", [1, 5, 300])
def test_fp8_rows_travel_with_their_scales(gpus, num_tokens):
    gpus.run(ranks.quantised_exchange, num_tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("max_sms", [None, 1, 24])
def test_dispatch_casts_rows_to_fp8(gpus, max_sms, dtype):
    base = Shape(num_tokens=1, hidden_size=7168, max_sms=max_sms, dtype=dtype)
    for shape in (base, replace(base, num_tokens=300), replace(base, num_tokens=40, real_rows=13, hidden_size=384)):
        gpus.run(ranks.cast_exchange, shape)


def test_repetitions_give_the_same_bits(gpus):
    gpus.run(ranks.repeats)


@pytest.mark.parametrize(("num_tokens", "max_sms"), [(3, None), (300, None), (3, 24), (300, 24)])
def test_a_captured_graph_takes_any_routing(gpus, num_tokens, max_sms):
    gpus.run(ranks.replays, num_tokens, max_sms)


@pytest.mark.parametrize("two_streams", [False, True])
def test_two_micro_batches_in_flight(gpus, two_streams):
    gpus.run(ranks.in_flight, two_streams)


def test_misuse_is_refused_before_anything_moves(gpus):
    for messages in gpus.run(ranks.refusals):
        for message, part in zip(
            messages,
            [
                "in flight already",
                "a row for each slot",
                "already used",
                "1025 rows",
                "multiple of 4",
                "topk_weights is on cpu",
                "topk_ids is on cpu",
                "mask is on cpu",
                "slot_output is on cpu",
                "with columns",
                "give the whole combine_input",
                "torch.int32",
                "the windows hold",
            ],
            strict=True,
        ):
            assert part in message


def test_random_steps(gpus):
    assert set(gpus.run(ranks.random_steps, STEPS, 0)) == {0}


@pytest.mark.parametrize("strategy", ALL_STRATEGIES)
def test_every_strategy_equals_the_reference(gpus, strategy):
    to_run = list(cases(gpus.num_ranks, strategies=(strategy,), quick=False, seed=0, device=NVLINK))
    assert to_run
    assert [fault for faults in gpus.run(ranks.runs_cases, to_run) for fault in faults] == []


def test_tensors_that_are_not_contiguous(gpus):
    assert [fault for found in gpus.run(ranks.strided_tensors) for fault in found] == []


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_good_steps_after_exceptions_on_all_ranks(gpus, size):
    gpus.run(ranks.good_steps_after_exceptions_of_experts, size)


def test_good_exchanges_after_exceptions_with_two_in_flight_and_in_a_capture(gpus):
    gpus.run(ranks.good_exchanges_after_exceptions_in_flight)


def test_the_others_name_a_rank_that_raises_alone():
    with ProcessRankPool(NUM_RANKS, timeout=10, transport="nccl") as pool:
        *waiting, own = pool.outcomes(ranks.last_rank_raises_alone)
    assert isinstance(own, ZeroDivisionError)
    for error in waiting:
        assert isinstance(error, RankFailureError)
        assert f"rank {NUM_RANKS - 1} did not reach combine within 10 s" in str(error)


def test_a_rank_that_stops_is_named_within_the_time_out():
    with ProcessRankPool(NUM_RANKS, timeout=60, transport="nccl") as pool:
        *waiting, _ = pool.run(ranks.waits_for_the_last_rank, 2.0)
    for elapsed, message in waiting:
        assert f"rank {NUM_RANKS - 1} did not reach dispatch within 2 s" in message
        assert 1.9 < elapsed < 4 + GRACE_SECONDS


def test_a_rank_that_stops_between_replays_is_named_on_all_ranks():
    with ProcessRankPool(NUM_RANKS, timeout=60, transport="nccl") as pool:
        *waiting, late = pool.run(ranks.replays_until_the_last_rank_stops, 3.0)
    for seconds, message in (*waiting, late):
        assert f"rank {NUM_RANKS - 1} did not reach dispatch within 3 s" in message
        assert seconds < 5
    assert all(seconds > 2.9 for seconds, _ in waiting)


def test_ranks_that_differ_about_where_the_experts_rows_lie_fail_after_the_time_out():
    with ProcessRankPool(NUM_RANKS, timeout=60, transport="nccl") as pool:
        for message in pool.run(ranks.differ_about_windows, 3.0):
            assert "did not reach combine within 3 s" in message


def test_kernels_wait_as_long_as_served_collectives(gpus):
    assert set(gpus.run(ranks.seconds_of_windows)) == {(60.0, COLLECTIVE_DEADLINE.read_seconds())}


def test_gpus_of_one_host_are_taken(gpus):
    assert set(gpus.run(ranks.reason)) == {None}
