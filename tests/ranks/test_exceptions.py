"""An exception between dispatch and combine, on every dispatcher: what the dispatch took is given back.

After an exception on all ranks, 100 steps give the reference. After an exception on one rank, the others' error names it.
tests/cuda and tests/emulated run the functions of this file on GPUs and on the emulated Ascend device.
"""

import traceback
from collections.abc import Callable

import pytest
import torch

from vllm_npu.core.step_plan import StepPlan
from vllm_npu.errors import InvalidInputError, RankFailureError
from vllm_npu.strategies.pipeline import ExpertsFunction, MoEPipeline
from vllm_npu.strategies.select import build
from vllm_npu.strategies.table import STRATEGIES
from vllm_npu.tools.launch import ProcessRankPool, Rank
from vllm_npu.tools.verification import Case, CaseTensors

GOOD_STEPS = 100
FAILURES = 5  # more than a dispatcher can have in flight
SMALL, LARGE = (17, 32), (520, 256)  # rows and columns; the large ones go through gloo's shared memory


class Steps:
    """Steps of one pipeline on this rank."""

    def __init__(self, rank: Rank, strategy: str, tokens: int, hidden_size: int) -> None:
        groups = rank.groups(tp_size=1, dp_size=rank.num_ranks)
        self.case = Case(
            strategy=strategy,
            tp_size=1,
            dp_size=rank.num_ranks,
            num_tokens_across_dp=tuple(range(tokens, tokens + rank.num_ranks)),
            hidden_size=hidden_size,
            width=hidden_size,
        )
        self.pipeline: MoEPipeline = build(strategy, groups, self.case.num_experts)
        tensors = CaseTensors.of(self.case)
        self.inputs = tensors.input_of(groups.topology, self.case.sharding, rank.device)
        self.experts = tensors.experts_of(groups.topology, rank.device)
        self.expected = tensors.expected_on(groups.topology, self.case.sharding)
        self.step = StepPlan(num_tokens_across_dp=self.case.num_tokens_across_dp, sharding=self.case.sharding)

    def run(self, experts: ExpertsFunction, meanwhile: Callable[[], None] | None = None) -> torch.Tensor:
        return self.pipeline.run(*self.inputs, experts, self.step, meanwhile=meanwhile).hidden_states

    def is_right(self) -> bool:
        return torch.equal(self.run(self.experts).cpu(), self.expected)


def _raises(*_: object) -> torch.Tensor:
    raise ZeroDivisionError("in the experts")


def _is_refused(expert_input: torch.Tensor, *_: object) -> torch.Tensor:
    return expert_input[:-1]  # too few rows: combine refuses them


def good_steps_after_exceptions(rank: Rank, strategy: str, size: tuple[int, int] = SMALL) -> None:
    """All ranks fail in the same steps, in every way. The errors are kept, and with them all tensors of the failed calls."""
    steps = Steps(rank, strategy, *size)
    assert steps.is_right()
    kept = []
    for _ in range(FAILURES):
        for experts, meanwhile, error in (
            (_raises, None, ZeroDivisionError),
            (_raises, lambda: None, ZeroDivisionError),
            (steps.experts, _raises, ZeroDivisionError),
            (_is_refused, None, InvalidInputError),
        ):
            with pytest.raises(error) as raised:
                steps.run(experts, meanwhile)
            kept.append(raised)
        assert steps.is_right()
    assert all(steps.is_right() for _ in range(GOOD_STEPS))
    assert all(traceback.format_exception(raised.value) for raised in kept)


def last_rank_raises(rank: Rank, strategy: str) -> None:
    """The last rank raises in its experts. The others wait in combine, or in the collective after it."""
    steps = Steps(rank, strategy, *SMALL)
    assert steps.is_right()
    steps.run(_raises if rank.rank == rank.num_ranks - 1 else steps.experts)


@pytest.mark.parametrize("kind", ["threaded", "gloo"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_good_steps_after_exceptions_on_all_ranks(pools, kind, strategy):
    pools(kind, 3).run(good_steps_after_exceptions, strategy)


@pytest.mark.parametrize("strategy", ["all2all", "allgather"])
def test_good_steps_through_shared_memory_after_exceptions_on_all_ranks(pools, strategy):
    pools("gloo", 2).run(good_steps_after_exceptions, strategy, LARGE)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_others_name_a_rank_that_raises_alone(strategy):
    with ProcessRankPool(2, timeout=4, start_method="forkserver") as pool:
        waiting, own = pool.outcomes(last_rank_raises, strategy)
    assert isinstance(own, ZeroDivisionError)
    assert isinstance(waiting, RankFailureError)
    assert waiting.ranks == (1,)
