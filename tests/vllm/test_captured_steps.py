"""What a planner remembers of captured graphs."""

import pytest

from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin.captured_steps import CapturedSteps, Held
from vllm_npu.trust.recording import CollectiveCounter

SMALL, LARGE = ("FULL", 4), ("FULL", 8)


def test_a_replay_counts_the_collectives_that_its_capture_counted():
    counter = CollectiveCounter()
    steps = CapturedSteps(counter)
    steps.begin(None, Held((4,), "mc2"))
    counter.add("ep", "dispatch", 5)
    for graph, sent in ((SMALL, 10), (LARGE, 20)):
        steps.begin(graph, Held((graph[1],), "mc2"))
        counter.add("ep", "dispatch", sent)
    steps.begin(None, Held((3,), "mc2"))
    counter.add("ep", "dispatch", 7)
    for graph in (SMALL, LARGE, LARGE):
        steps.begin(graph, Held((graph[1],), "mc2"))
    assert counter.calls["ep.dispatch"] == 4 + 3
    assert counter.bytes_sent["ep.dispatch"] == 5 + 10 + 20 + 7 + (10 + 20 + 20)


def test_without_a_counter_nothing_is_counted():
    steps = CapturedSteps(None)
    steps.begin(SMALL, Held((4,), "mc2"))
    steps.begin(SMALL, Held((4,), "mc2"))


@pytest.mark.parametrize("other", [Held((4, 4), "allgather"), Held((4, 3), "mc2")])
def test_a_replay_of_another_step_is_refused_with_both_steps(other):
    steps = CapturedSteps(None)
    steps.begin(SMALL, Held((4, 4), "mc2"))
    wanted = rf"holds mc2 for \[4, 4\] tokens.* wants {other.strategy} for \[4, {other.num_tokens_across_dp[1]}\]"
    with pytest.raises(UnsupportedConfigError, match=wanted):
        steps.begin(SMALL, other)


def test_the_strategy_changes_only_while_there_is_no_graph():
    steps = CapturedSteps(None)
    steps.begin(None, Held((4,), "mc2"))
    steps.check_change("naive")
    steps.begin(SMALL, Held((4,), "mc2"))
    with pytest.raises(UnsupportedConfigError, match="cannot change to naive: 1 captured graphs hold mc2"):
        steps.check_change("naive")
