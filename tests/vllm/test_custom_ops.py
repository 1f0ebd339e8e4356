"""torch.ops.vllm.maybe_all_gather_and_maybe_unpad and maybe_pad_and_reduce: values, fakes, and under torch.compile."""

import pytest
import torch

from tests.vllm.vllm_ranks import (
    TP2,
    TP2_DP2,
    TP4,
    Grid,
    VllmRanks,
    integers,
    make_config,
    own_slice,
    planned_step,
    ranks,  # noqa: F401 - fixture
    tokens_across_dp,
)
from vllm_npu.core.step_plan import TokenSharding
from vllm_npu.core.token_layout import TokenSlice

pytest.importorskip("vllm")

SLICED, REPLICATED = TokenSharding.SLICED_OVER_TP, TokenSharding.REPLICATED
WIDTH = 3
COUNTS = {
    TP2: [(5,), (1,), (0,), (8,)],
    TP4: [(9,), (4,), (2,), (0,)],
    TP2_DP2: [(5, 2), (0, 3), (1, 0), (0, 0), (4, 4)],
}
CASES = [pytest.param(grid, counts, id=f"{grid}-{counts}") for grid, each in COUNTS.items() for counts in each]


def real_rows(grid: Grid, counts) -> list[int]:
    return [TokenSlice.chunk(count, rank=t, size=grid.tp).length for count in counts for t in range(grid.tp)]


def ranks_of_group(grid: Grid, is_ep_comm: bool) -> range:
    """The grid ranks in the op's group."""
    return range(grid.size) if is_ep_comm else range(grid.dp_rank * grid.tp, (grid.dp_rank + 1) * grid.tp)


def gathered(grid: Grid, counts, is_ep_comm: bool) -> torch.Tensor:
    """The tensor that maybe_all_gather_and_maybe_unpad must return."""
    tokens = tokens_across_dp(7, counts, WIDTH)
    return torch.cat(tokens) if is_ep_comm else tokens[grid.dp_rank]


def summand(rank: int, rows: int) -> torch.Tensor:
    """The input of grid rank `rank` for maybe_pad_and_reduce."""
    return integers(100 + rank, rows, WIDTH)


def reduced_slice(grid: Grid, counts, is_ep_comm: bool) -> torch.Tensor:
    """The tensor that maybe_pad_and_reduce must return: this rank's rows of the sum over the group, padded with zeros."""
    group = ranks_of_group(grid, is_ep_comm)
    rows = real_rows(grid, counts)
    total = sum(summand(rank, sum(rows[each] for each in group)) for rank in group)
    start = sum(rows[rank] for rank in group if rank < grid.rank)
    own = total[start : start + rows[grid.rank]]
    return torch.cat([own, own.new_zeros(-(-counts[grid.dp_rank] // grid.tp) - own.shape[0], WIDTH)])


# ------------------------------------------------------------------------------------------------------- eager


def run_eagerly(grid: Grid, counts, is_ep_comm: bool) -> None:
    x = own_slice(grid, tokens_across_dp(7, counts, WIDTH)[grid.dp_rank])
    before = x.clone()
    rows = sum(real_rows(grid, counts)[each] for each in ranks_of_group(grid, is_ep_comm))
    partial = summand(grid.rank, rows)
    partial_before = partial.clone()
    with planned_step(make_config(grid), counts, SLICED):
        whole = torch.ops.vllm.maybe_all_gather_and_maybe_unpad(x, True, is_ep_comm)
        own = torch.ops.vllm.maybe_pad_and_reduce(partial, is_ep_comm)
    torch.testing.assert_close(whole, gathered(grid, counts, is_ep_comm), rtol=0, atol=0)
    torch.testing.assert_close(own, reduced_slice(grid, counts, is_ep_comm), rtol=0, atol=0)
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(partial, partial_before, rtol=0, atol=0)
    assert whole.untyped_storage().nbytes() == whole.nbytes, "a view keeps the gathered buffer alive"


@pytest.mark.parametrize("is_ep_comm", [False, True], ids=["tp", "ep"])
@pytest.mark.parametrize(("grid", "counts"), CASES)
def test_slices_are_gathered_without_padding_and_sums_scattered_back(
    ranks: VllmRanks,  # noqa: F811
    grid,
    counts,
    is_ep_comm,
):
    ranks.run(run_eagerly, grid, counts, is_ep_comm)


def run_without_slices(grid: Grid) -> None:
    x = integers(grid.rank, 5, WIDTH)
    expected_sum = sum(integers(rank, 5, WIDTH) for rank in ranks_of_group(grid, False))
    counts = (5,) * grid.dp
    gather, reduce = torch.ops.vllm.maybe_all_gather_and_maybe_unpad, torch.ops.vllm.maybe_pad_and_reduce
    outputs = []
    with planned_step(make_config(grid), counts, REPLICATED):
        outputs += [gather(x, True, False), gather(x, True, True), gather(x, False, True)]
        reduced = reduce(x, False)
    with planned_step(make_config(grid), counts, SLICED):
        outputs += [gather(x, False, False), gather(x, False)]
    for output in outputs:
        assert torch.equal(output, x)
        output.fill_(float("nan"))
    assert torch.equal(reduced, expected_sum)
    reduced.fill_(float("nan"))
    assert torch.equal(x, integers(grid.rank, 5, WIDTH)), "an output was an alias of the input"


@pytest.mark.parametrize("grid", [TP2, TP2_DP2], ids=str)
def test_a_step_without_slices_gives_copies_and_an_all_reduce(ranks: VllmRanks, grid):  # noqa: F811
    ranks.run(run_without_slices, grid)


def run_outside_of_a_step(grid: Grid) -> list[str]:
    messages = []
    for call in (
        lambda: torch.ops.vllm.maybe_all_gather_and_maybe_unpad(torch.zeros(2, WIDTH), True),
        lambda: torch.ops.vllm.maybe_pad_and_reduce(torch.zeros(2, WIDTH)),
    ):
        with pytest.raises(ValueError) as error:
            call()
        messages.append(str(error.value))
    return messages


def test_outside_of_a_step_both_say_what_is_missing(ranks: VllmRanks):  # noqa: F811
    for messages in ranks.run(run_outside_of_a_step, TP2):
        assert all("set_forward_context" in message for message in messages)


# ---------------------------------------------------------------------------------------------- fakes, opcheck


def run_fakes(grid: Grid) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    config = make_config(grid)
    for sharding in TokenSharding:
        mode = FakeTensorMode(shape_env=ShapeEnv(allow_dynamic_output_shape_ops=True))
        with planned_step(config, (5,) * grid.dp, sharding), mode:
            x = torch.empty(3, WIDTH, dtype=torch.bfloat16)
            whole = torch.ops.vllm.maybe_all_gather_and_maybe_unpad(x, True, False)
            copied = torch.ops.vllm.maybe_all_gather_and_maybe_unpad(x, False, False)
            own = torch.ops.vllm.maybe_pad_and_reduce(x, False)
            assert (copied.shape, copied.dtype) == (x.shape, x.dtype)
            for output in (whole, own):
                assert (output.shape[1], output.dtype) == (WIDTH, torch.bfloat16)
                if sharding is REPLICATED:
                    assert output.shape[0] == 3
                else:  # a number that the trace does not know
                    assert isinstance(output.shape[0], torch.SymInt)
                    assert torch.fx.experimental.symbolic_shapes.free_unbacked_symbols(output)


def test_the_fakes_know_the_rows_only_where_they_cannot_change(ranks: VllmRanks):  # noqa: F811
    ranks.run(run_fakes, TP2)


def run_opcheck(grid: Grid) -> None:
    config = make_config(grid)
    counts = (5, 2)[: grid.dp]
    checks = ("test_schema", "test_faketensor")
    for sharding in TokenSharding:
        sliced = sharding is SLICED
        tokens = tokens_across_dp(7, counts, WIDTH)[grid.dp_rank]
        x = own_slice(grid, tokens, 0.0) if sliced else tokens
        with planned_step(config, counts, sharding):
            for label, is_ep_comm in ((True, False), (True, True), (False, False)):
                op = torch.ops.vllm.maybe_all_gather_and_maybe_unpad.default
                torch.library.opcheck(op, (x, label, is_ep_comm), test_utils=checks)
            torch.library.opcheck(torch.ops.vllm.maybe_pad_and_reduce.default, (tokens, False), test_utils=checks)


@pytest.mark.parametrize("grid", [TP2, TP2_DP2], ids=str)
def test_schema_and_fakes_pass_opcheck(ranks: VllmRanks, grid):  # noqa: F811
    ranks.run(run_opcheck, grid)


# ------------------------------------------------------------------------------------------------------ compiled


def gather_and_scatter(x: torch.Tensor, is_ep_comm: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Use the ops as a sequence-parallel layer does, with elementwise work before, between and after them."""
    whole = torch.ops.vllm.maybe_all_gather_and_maybe_unpad(x + 1, True, is_ep_comm) * 2
    return whole, torch.ops.vllm.maybe_pad_and_reduce(whole + 1, is_ep_comm) - 3


def run_compiled(grid: Grid, backend: str, is_ep_comm: bool, steps) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(gather_and_scatter, fullgraph=True, backend=counter)
    config = make_config(grid)
    for counts, strategy in steps:
        x = own_slice(grid, tokens_across_dp(sum(counts), counts, WIDTH)[grid.dp_rank], 0.0)
        torch._dynamo.mark_dynamic(x, 0)
        with planned_step(config, counts, SLICED, strategy):
            whole, own = compiled(x, is_ep_comm)
            expected_whole, expected_own = gather_and_scatter(x, is_ep_comm)
        torch.testing.assert_close(whole, expected_whole, rtol=0, atol=0)
        torch.testing.assert_close(own, expected_own, rtol=0, atol=0)
        assert own.shape == x.shape
    assert counter.frame_count == 1, "a step was traced anew"


@pytest.mark.parametrize("is_ep_comm", [False, True], ids=["tp", "ep"])
def test_a_trace_of_one_step_runs_any_other(ranks: VllmRanks, is_ep_comm):  # noqa: F811
    steps = [((5, 7), "mc2"), ((9, 4), "allgather"), ((4, 13), "all2all"), ((6, 6), "naive")]
    ranks.run(run_compiled, TP2_DP2, "eager", is_ep_comm, steps)


@pytest.mark.slow
def test_inductor_follows_the_running_step_too(ranks: VllmRanks):  # noqa: F811
    ranks.run(run_compiled, TP2, "inductor", False, [((5,), "mc2"), ((9,), "allgather"), ((20,), "naive")])
