"""Every strategy against the reference: all cases of `verify` on threads, the quick ones on processes over gloo."""

import pytest

from vllm_npu.core.limits import PORTABLE
from vllm_npu.strategies.table import STRATEGIES
from vllm_npu.tools.verification import Case, cases, limits_of_device, run_case


def failures(pool, to_run: list[Case]) -> dict[str, list[str]]:
    outcomes = {str(case): [fault for fault in pool.run(run_case, case) if fault] for case in to_run}
    return {case: faults for case, faults in outcomes.items() if faults}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_equals_the_reference_on_threads(pools, strategy, num_ranks):
    to_run = list(cases(num_ranks, strategies=(strategy,), quick=False, seed=0))
    assert to_run or num_ranks == 1
    assert failures(pools("threaded", num_ranks), to_run) == {}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_equals_the_reference_on_processes(pools, strategy, num_ranks):
    to_run = list(cases(num_ranks, strategies=(strategy,), quick=True, seed=100))
    assert to_run
    assert failures(pools("gloo", num_ranks), to_run) == {}


# Nightly, for its size: the tests above show the same on 2, 3 and 4 ranks.
@pytest.mark.nightly
def test_equals_the_reference_on_eight_ranks(pools):
    assert failures(pools("threaded", 8), list(cases(8, quick=True, seed=7))) == {}


def test_a_cpu_runs_what_the_portable_ops_can(pools):
    assert pools("threaded", 1).run(limits_of_device) == [PORTABLE]
