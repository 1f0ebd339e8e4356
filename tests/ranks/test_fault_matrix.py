"""What has broken implementations: empty ranks, odd counts, poison in unused rows, micro-batches within one another, exceptions
between stages. RANDOM_CASES=5000 is the nightly form."""

import os

import pytest

from vllm_npu.errors import InvalidInputError
from vllm_npu.tools.launch import Rank
from vllm_npu.tools.verification import Case, empty_rank_cases, random_runs, run_case, run_random

RANDOM_CASES = int(os.environ.get("RANDOM_CASES", "500"))
SEED = int(os.environ.get("RANDOM_SEED", "0"))
SHARES = {1: 0.04, 2: 0.32, 3: 0.24, 4: 0.4}  # of the drawn cases, by the number of ranks


def faults_of(rank: Rank, run, cases) -> list[str]:
    """All cases in one launch; a case that raises ends it, since the ranks may be out of step."""
    faults = []
    for case in cases:
        try:
            fault = run(rank, case)
        except Exception as error:
            error.add_note(f"in {case}")
            raise
        faults += [f"{case}: {fault}"] if fault else []
    return faults


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_every_pattern_of_empty_ranks(pools, num_ranks):
    cases = list(empty_rank_cases(num_ranks, seed=5))
    assert len({case.num_tokens_across_dp for case in cases}) == 2**num_ranks
    assert pools("threaded", num_ranks).run(faults_of, run_case, cases) == [[]] * num_ranks


@pytest.mark.parametrize("num_ranks", SHARES)
def test_drawn_cases(pools, num_ranks):
    runs = random_runs(num_ranks, round(RANDOM_CASES * SHARES[num_ranks]), SEED)
    assert pools("threaded", num_ranks).run(faults_of, run_random, runs) == [[]] * num_ranks


def test_the_draw_covers_what_it_is_for():
    runs = random_runs(4, 200, 0)
    assert runs == random_runs(4, 200, 0)
    assert runs != random_runs(4, 200, 1)
    assert any(257 in run.case.num_tokens_across_dp for run in runs)
    assert any(0 in run.case.num_tokens_across_dp for run in runs)
    assert any(run.between is not None and run.between.strategy != run.case.strategy for run in runs)
    assert any(run.interrupted for run in runs)
    assert {(run.case.tp_size, run.case.sharding.value) for run in runs} >= {
        (1, "replicated"),
        (2, "sliced_over_tp"),
        (4, "replicated"),
    }


def run_wrongly(rank: Rank, case: Case) -> str | None:
    """Raises between dispatch and combine, which nobody expects."""
    return run_case(rank, case, lambda: (_ for _ in ()).throw(InvalidInputError("between")))


def test_an_exception_between_stages_reaches_the_caller(pools):
    case = Case(strategy="all2all", tp_size=1, dp_size=2, num_tokens_across_dp=(3, 0))
    assert all(isinstance(error, InvalidInputError) for error in pools("threaded", 2).outcomes(run_wrongly, case))
