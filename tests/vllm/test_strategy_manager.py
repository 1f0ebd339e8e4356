"""Strategies as vLLM's all2all manager, over gloo: what vLLM's experts get and give, against the dense reference."""

import pytest

pytest.importorskip("vllm")

from tests.strategy_manager_ranks import cases, run_cases
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.strategies import STRATEGIES
from vllm_npu.transport.launch import ProcessRankPool
from vllm_npu.verification import Case


@pytest.fixture(scope="module")
def ranks():
    with ProcessRankPool(4, timeout=120, transport="gloo") as pool:
        yield pool


def test_every_strategy_gives_the_reference(ranks):
    every = [case for name in STRATEGIES for case in cases(name, 4)]
    assert [fault for found in ranks.run(run_cases, every) for fault in found] == []


def test_symmetric_needs_gpus_and_says_so(ranks):
    case = Case(strategy="symmetric", tp_size=1, dp_size=4, num_tokens_across_dp=(1, 1, 1, 1))
    with pytest.raises(UnsupportedConfigError, match="symmetric cannot run here: not every rank has a CUDA device"):
        ranks.run(run_cases, [case])
