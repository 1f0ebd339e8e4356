"""Compares every strategy, run by vLLM's all2all manager over NCCL and symmetric memory, with the dense reference."""

import pytest

pytest.importorskip("vllm", reason="needs vLLM")

from tests.cuda.conftest import NUM_RANKS
from tests.strategy_manager_ranks import cases, run_cases
from vllm_npu.strategies.table import ALL_STRATEGIES

pytestmark = pytest.mark.cuda


def test_every_strategy_gives_the_reference(gpus):
    every = [case for name in ALL_STRATEGIES for case in cases(name, NUM_RANKS)]
    assert [fault for found in gpus.run(run_cases, every) for fault in found] == []
