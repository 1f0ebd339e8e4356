"""A malformed variable on one rank: every rank gets an error that names rank, variable and value. None computes or waits."""

import time

import pytest
import torch

from tests.time_limits import on_this_machine
from vllm_npu import envs
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.tools.launch import Rank
from vllm_npu.trust.settings import agree_on_settings, prepare_together

# No switch, number, strategy or name of a folder. So a variable that takes it is either free text that no rank reads, or one
# that no test covers: then this test fails.
MALFORMED = "/dev/null/no value"
REFUSAL_SECONDS = 10  # on a quiet machine; the pool's time-out is 20
ROWS, WIDTH = 2048, 64  # of float64: more than what goes through sockets

EVERY_RANK_VARIABLE = pytest.mark.parametrize("variable", envs.RANK_VARIABLES, ids=lambda variable: variable.name)


def patched(rank: Rank, name: str, *malformed_on: int) -> pytest.MonkeyPatch:
    """The rank's environment without the variables of this package, and with a malformed one on some ranks."""
    patch = pytest.MonkeyPatch()
    for variable in envs.VARIABLES:
        patch.delenv(variable.name, raising=False)
    if rank.rank in malformed_on:
        patch.setenv(name, MALFORMED)
    return patch


def settle(rank: Rank, name: str, *malformed_on: int) -> str:
    """The error of this rank. It comes before the first collective after agree_on_settings."""
    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    patch = patched(rank, name, *malformed_on)
    began = time.monotonic()
    try:
        agree_on_settings(ep, rank.rank, rank.num_ranks)
    except UnsupportedConfigError as error:
        assert time.monotonic() - began < on_this_machine(REFUSAL_SECONDS)
        return str(error)
    finally:
        patch.undo()
        ep.barrier()  # the group still works
    return ""


@EVERY_RANK_VARIABLE
def test_a_malformed_variable_on_one_rank_is_an_error_on_all_that_names_it(pools, variable):
    for message in pools("gloo", 2).run(settle, variable.name, 1):
        assert "ranks [1]" in message
        assert variable.name in message
        assert MALFORMED in message


# The names of strategies are checked where the topology is known: in the configuration, and again by the step planner.
@pytest.mark.parametrize(
    "variable",
    [each for each in envs.RANK_VARIABLES if each is not envs.MOE_COMM],
    ids=lambda variable: variable.name,
)
def test_a_malformed_variable_on_all_ranks_is_an_error_on_all(pools, variable):
    for message in pools("gloo", 2).run(settle, variable.name, 0, 1):
        assert MALFORMED in message


def settle_with(rank: Rank, values: list[str]) -> str:
    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    patch = patched(rank, "")
    patch.setenv(envs.COLLECTIVE_DEADLINE.name, values[rank.rank])
    try:
        agree_on_settings(ep, rank.rank, rank.num_ranks)
    except UnsupportedConfigError as error:
        return str(error)
    finally:
        patch.undo()
    return ""


def test_what_must_be_equal_is_compared_by_its_value(pools):
    assert pools("gloo", 2).run(settle_with, ["60", "60.0"]) == [""] * 2
    for message in pools("gloo", 2).run(settle_with, ["60", "61"]):
        assert "VLLM_NPU_COLLECTIVE_DEADLINE: ranks [0]: 60.0; ranks [1]: 61.0" in message


def exchange(rank: Rank, name: str) -> str:
    """Large messages over every collective of a transport, without an agreement before them."""
    patch = patched(rank, name, 1)
    try:
        ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
        rows = torch.full((ROWS, WIDTH), float(rank.rank), dtype=torch.float64)
        gathered = ep.all_gather(rows)
        assert gathered[::ROWS, 0].tolist() == list(range(rank.num_ranks))
        assert torch.equal(ep.reduce_scatter(gathered), torch.full_like(rows, rank.num_ranks * float(rank.rank)))
    except UnsupportedConfigError as error:
        return str(error)
    finally:
        patch.undo()
        rank.groups(tp_size=1, dp_size=rank.num_ranks).ep.barrier()
    return ""


@pytest.mark.parametrize("variable", envs.VARIABLES, ids=lambda variable: variable.name)
def test_a_collective_before_any_agreement_gives_right_values_or_the_same_error_on_all(pools, variable):
    messages = pools("gloo", 2).run(exchange, variable.name)
    if variable is envs.SHARED_WINDOW:  # the only one that a collective of gloo reads
        assert all("rank 1" in message and f"{variable.name}={MALFORMED!r}" in message for message in messages)
    else:
        assert messages == [""] * 2


def prepare(rank: Rank, failing: list[int]) -> str:
    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep

    def work() -> int:
        if rank.rank in failing:
            raise UnsupportedConfigError(f"no room\nin process {rank.rank}")
        return rank.rank

    try:
        return str(prepare_together(work, ep))
    except UnsupportedConfigError as error:
        return str(error)


@pytest.mark.parametrize("kind", ["threaded", "gloo"])
def test_a_rank_that_cannot_prepare_is_named_on_every_rank(pools, kind):
    assert pools(kind, 3).run(prepare, []) == ["0", "1", "2"]
    for message in pools(kind, 3).run(prepare, [1, 2]):
        assert "ranks [0]: nothing; ranks [1]: no room in process 1; ranks [2]: no room in process 2" in message
