"""The wait for a decision of vllm-ascend's EPLB ends when the deciding process has ended."""

import multiprocessing

import pytest

from vllm_npu.errors import ExpertBalancerError
from vllm_npu.plugin.ascend.balancer_watch import WatchedDecisions

FORK = multiprocessing.get_context("fork")


def put(decisions, value) -> None:
    decisions.put(value)


def test_a_decision_is_returned_also_after_its_process_has_ended():
    decisions = FORK.Queue(maxsize=1)
    process = FORK.Process(target=put, args=(decisions, "moves"))
    process.start()
    process.join()
    watched = WatchedDecisions(decisions, process)
    assert watched.get() == "moves"
    with pytest.raises(ExpertBalancerError, match="has ended, and this rank needs its decision"):
        watched.get()
