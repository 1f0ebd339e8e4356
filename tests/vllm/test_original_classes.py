"""The four classes of the original design, with their names and signatures, on several ranks of vLLM's own groups."""

import inspect
import threading
from contextlib import contextmanager
from itertools import product

import pytest
import torch

from tests.vllm.vllm_ranks import (
    DP2,
    NUM_EXPERTS,
    TP2,
    TP2_DP2,
    TP4,
    Grid,
    VllmRanks,
    build_layer,
    make_config,
    own_slice,
    ranks,  # noqa: F401 - fixture
    tokens_across_dp,
    vllm_step,
)
from vllm_npu.core.token_layout import TokenSlice
from vllm_npu.errors import HandleMismatchError, InvalidInputError

pytest.importorskip("vllm")

WIDTH = 6
NAMES = {
    "mc2": "FusedMoEPrepareAndFinalizeWithMC2",
    "all2all": "FusedMoEPrepareAndFinalizeWithAll2All",
    "allgather": "FusedMoEPrepareAndFinalizeWithAllGather",
    "naive": "FusedMoEPrepareAndFinalizeWithNaiveMulticast",
}
FLAGS = list(product((False, True), repeat=2))  # enable_shared_expert_dp, replace_allreduce


def original_class(strategy: str):
    from vllm_npu.plugin import fused_moe

    return getattr(fused_moe, NAMES[strategy])


@pytest.mark.parametrize("name", NAMES.values())
def test_the_signatures_are_those_of_the_original(name):
    from vllm_npu.plugin import fused_moe

    cls = getattr(fused_moe, name)
    assert issubclass(cls, fused_moe.FusedMoEPrepareAndFinalize)
    signatures = {
        method: str(inspect.signature(getattr(cls, method)).replace(return_annotation=inspect.Signature.empty))
        for method in ("__init__", "prepare", "finalize")
    }
    assert signatures == {
        "__init__": "(self, moe_config: vllm.model_executor.layers.fused_moe.config.FusedMoEConfig)",
        "prepare": "(self, hidden_states: torch.Tensor, router_logits: torch.Tensor, "
        "enable_shared_expert_dp: bool = False, replace_allreduce: bool = False)",
        "finalize": "(self, hidden_states: torch.Tensor, reduce_results: bool)",
    }


# -------------------------------------------------------------------------------------------------- round trips


def logits_of(hidden_states: torch.Tensor) -> torch.Tensor:
    """Logits that identify their tokens."""
    return hidden_states[:, :1] * 10 + torch.arange(NUM_EXPERTS)


def contributions(strategy: str, grid: Grid, sliced: bool, reduce_results: bool) -> int:
    """The factor c in finalize(prepare(x)) == c * x: the number of ranks whose shares are added up."""
    if strategy in ("mc2", "all2all"):
        return 1
    return grid.size if sliced else grid.dp * (grid.tp if reduce_results else 1)


def check_prepared(strategy, grid, counts, sliced, hidden_states, router_logits, mask) -> None:
    """The tokens that a rank works on: its own slice for mc2 and all2all, all tokens of the group for allgather and naive."""
    tokens = tokens_across_dp(3, counts, WIDTH)
    own = tokens[grid.dp_rank]
    if strategy == "mc2":
        assert hidden_states.shape[0] == -(-max(*counts, 1) // grid.tp)
        assert (mask is None) == (min(counts) == hidden_states.shape[0] * grid.tp)  # every rank brings a full step
        if mask is None:
            mask = torch.ones(hidden_states.shape[0], dtype=torch.bool)
        assert mask.shape == hidden_states.shape[:1]
        assert mask.dtype == torch.bool
        real = int(mask.sum())
        assert mask[:real].all()
        expected = TokenSlice.chunk(own.shape[0], rank=grid.tp_rank, size=grid.tp).take(own)
        if not sliced:  # chunks of what all ranks are padded to
            rows = hidden_states.shape[0]
            expected = own[grid.tp_rank * rows : (grid.tp_rank + 1) * rows]
        hidden_states, router_logits = hidden_states[:real], router_logits[:real]
    else:
        assert mask is None
        cut = TokenSlice.chunk if sliced else TokenSlice.even
        expected = cut(own.shape[0], rank=grid.tp_rank, size=grid.tp).take(own)
    if strategy in ("allgather", "naive"):
        expected = torch.cat(tokens)
    assert torch.equal(hidden_states, expected)
    assert torch.equal(router_logits, logits_of(expected))


def run_round_trips(grid: Grid, strategy: str, counts, sequence_parallel: bool) -> None:
    config = make_config(grid)
    layer = build_layer(grid, config, sequence_parallel=sequence_parallel)
    stages = original_class(strategy)(layer.moe_config)
    whole = tokens_across_dp(3, counts, WIDTH)[grid.dp_rank]
    with vllm_step(grid, config, counts):
        for flags, reduce_results in product(FLAGS, (False, True)):
            case = f"enable_shared_expert_dp, replace_allreduce = {flags}, reduce_results={reduce_results}"
            sliced = sequence_parallel or any(flags)
            x = own_slice(grid, whole) if sliced else whole.clone()
            real = TokenSlice.chunk(len(whole), rank=grid.tp_rank, size=grid.tp).length if sliced else len(whole)
            logits = logits_of(x)
            before = x.clone(), logits.clone()
            hidden_states, router_logits, mask = stages.prepare(x, logits, *flags)
            check_prepared(strategy, grid, counts, sliced, hidden_states, router_logits, mask)
            output = stages.finalize(hidden_states.clone(), reduce_results)
            assert output.shape == x.shape, case
            factor = contributions(strategy, grid, sliced, reduce_results)
            assert torch.equal(output[:real], factor * x[:real]), case
            assert not output[real:].any(), f"{case}: a padding row is not zero"
            output.fill_(float("nan"))
            torch.testing.assert_close((x, logits), before, rtol=0, atol=0, equal_nan=True)


COUNTS = {
    TP2: [(5,), (1,), (0,), (8,)],
    TP4: [(9,), (2,)],
    DP2: [(5, 2), (0, 3), (0, 0), (4, 4)],
    TP2_DP2: [(5, 2), (0, 3), (1, 1), (0, 0), (7, 8)],
}
TRIPS = [
    pytest.param(grid, sequence_parallel, id=f"{grid}{'-sequence-parallel' if sequence_parallel else ''}")
    for grid, sequence_parallel in [(TP2, False), (TP4, False), (DP2, False), (TP2_DP2, False), (TP2_DP2, True)]
]


@pytest.mark.parametrize("strategy", NAMES)
@pytest.mark.parametrize(("grid", "sequence_parallel"), TRIPS)
def test_finalize_undoes_prepare_whatever_the_flags(ranks: VllmRanks, grid, sequence_parallel, strategy):  # noqa: F811
    for counts in COUNTS[grid]:
        ranks.run(run_round_trips, grid, strategy, counts, sequence_parallel)


def run_without_expert_parallelism(grid: Grid, strategy: str) -> None:
    run_round_trips(grid, strategy, (5, 2), False)


@pytest.mark.parametrize("strategy", NAMES)
def test_the_round_trip_does_not_need_expert_parallelism(ranks: VllmRanks, strategy):  # noqa: F811
    ranks.run(run_without_expert_parallelism, Grid(2, 2, ep=False), strategy)


def run_other_output(grid: Grid, strategy: str) -> None:
    config = make_config(grid)
    stages = original_class(strategy)(build_layer(grid, config).moe_config)
    counts = (5, 2)[: grid.dp]
    x = tokens_across_dp(3, counts, WIDTH)[grid.dp_rank]
    with vllm_step(grid, config, counts):
        for dtype, width in ((torch.float64, 2), (torch.bfloat16, 2 * WIDTH)):
            hidden_states, _, _ = stages.prepare(x, logits_of(x))
            output = stages.finalize(hidden_states.repeat(1, 2)[:, :width].to(dtype), True)
            expected = contributions(strategy, grid, False, True) * x.repeat(1, 2)[:, :width]
            assert torch.equal(output, expected.to(dtype))


@pytest.mark.parametrize("strategy", NAMES)
@pytest.mark.parametrize("grid", [TP2, TP2_DP2], ids=str)
def test_experts_may_change_the_dtype_and_the_width(ranks: VllmRanks, grid, strategy):  # noqa: F811
    ranks.run(run_other_output, grid, strategy)


# ---------------------------------------------------------------------------------------------- calls in flight


@contextmanager
def in_micro_batch(index: int):
    """Tell vLLM's dual batch overlap that this thread works on micro-batch `index`."""
    from vllm.v1.worker import ubatching

    ubatching._THREAD_ID_TO_CONTEXT[threading.get_ident()] = index
    try:
        assert ubatching.dbo_current_ubatch_id() == index
        yield
    finally:
        del ubatching._THREAD_ID_TO_CONTEXT[threading.get_ident()]


def run_micro_batches(grid: Grid, strategy: str) -> None:
    config = make_config(grid)
    stages = original_class(strategy)(build_layer(grid, config).moe_config)
    counts = [(5, 2)[: grid.dp], (1, 6)[: grid.dp]]
    x = [tokens_across_dp(3 + index, each, WIDTH)[grid.dp_rank] for index, each in enumerate(counts)]
    prepared = []
    for index in (0, 1):
        with vllm_step(grid, config, counts[index]), in_micro_batch(index):
            prepared.append(stages.prepare(x[index], logits_of(x[index]))[0])
    for index in (0, 1):
        with vllm_step(grid, config, counts[index]), in_micro_batch(index):
            output = stages.finalize(prepared[index], True)
            assert torch.equal(output, contributions(strategy, grid, False, True) * x[index])


@pytest.mark.parametrize("strategy", NAMES)
@pytest.mark.parametrize("grid", [TP2, TP2_DP2], ids=str)
def test_two_micro_batches_may_interleave(ranks: VllmRanks, grid, strategy):  # noqa: F811
    ranks.run(run_micro_batches, grid, strategy)


def run_misuse(grid: Grid, strategy: str) -> list[str]:
    config = make_config(grid)
    stages = original_class(strategy)(build_layer(grid, config).moe_config)
    counts = (5, 2)[: grid.dp]
    x = tokens_across_dp(3, counts, WIDTH)[grid.dp_rank]
    messages = []
    with vllm_step(grid, config, counts):
        with pytest.raises(HandleMismatchError) as never_prepared:
            stages.finalize(x, True)
        stages.finalize(stages.prepare(x, logits_of(x))[0], True)
        with pytest.raises(HandleMismatchError) as twice:
            stages.finalize(x, True)
        with pytest.raises(InvalidInputError) as fewer_tokens:
            stages.prepare(x, logits_of(x[:-1]))
        with pytest.raises(InvalidInputError) as more_experts:
            stages.prepare(x, logits_of(x).repeat(1, 2))
        with pytest.raises(InvalidInputError) as other_step:
            stages.prepare(x[:-1], logits_of(x[:-1]))
        stages.prepare(x, logits_of(x))  # an exception in the experts leaves this one behind
        output = stages.finalize(stages.prepare(x, logits_of(x))[0], True)
        assert torch.equal(output, contributions(strategy, grid, False, True) * x)
        with in_micro_batch(1), pytest.raises(HandleMismatchError):
            stages.finalize(x, True)
    with pytest.raises(InvalidInputError) as no_step:
        stages.prepare(x, logits_of(x))
    errors = (never_prepared, twice, fewer_tokens, more_experts, other_step, no_step)
    return messages + [str(error.value) for error in errors]


@pytest.mark.parametrize("strategy", NAMES)
def test_misuse_is_named_and_leaves_the_object_usable(ranks: VllmRanks, strategy):  # noqa: F811
    for messages in ranks.run(run_misuse, TP2_DP2, strategy):
        never_prepared, twice, fewer_tokens, more_experts, other_step, no_step = messages
        assert never_prepared == twice == f"{NAMES[strategy]}.finalize without a prepare in micro-batch 0"
        assert "router_logits" in fewer_tokens
        assert f"{2 * NUM_EXPERTS}" in more_experts
        assert "the step plan" in other_step
        assert "set_forward_context" in no_step
