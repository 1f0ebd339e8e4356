"""Strategies as vLLM's all2all manager over gloo give the output of the dense reference."""

import pytest

pytest.importorskip("vllm")

from tests.strategy_manager_ranks import cases, run_cases
from tests.vllm.vllm_ranks import NUM_RANKS, VllmRanks, ranks  # noqa: F401 - fixture
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.strategies.table import STRATEGIES
from vllm_npu.tools.launch import Rank
from vllm_npu.tools.verification import Case


def test_every_strategy_gives_the_reference(ranks: VllmRanks):  # noqa: F811
    every = [case for name in STRATEGIES for case in cases(name, NUM_RANKS)]
    assert [fault for found in ranks.run_on_pool(run_cases, every) for fault in found] == []


def run_symmetric(rank: Rank) -> str:
    case = Case(strategy="symmetric", tp_size=1, dp_size=4, num_tokens_across_dp=(1, 1, 1, 1))
    with pytest.raises(UnsupportedConfigError) as error:
        run_cases(rank, [case])
    return str(error.value)


def test_symmetric_needs_gpus_and_says_so(ranks: VllmRanks):  # noqa: F811
    for message in ranks.run_on_pool(run_symmetric):
        assert "symmetric cannot run here: not every rank has a CUDA device" in message
