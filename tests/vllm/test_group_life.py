"""What the plugin keeps for vLLM's groups: one set, agreed settings, and nothing of them after vLLM's groups have ended."""

import gc
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm.test_moe_runner import Layout, Tokens, check_output, dense_moe
from tests.vllm.vllm_ranks import (
    DP2,
    HIDDEN,
    NUM_EXPERTS,
    TP2,
    TP2_DP2,
    Grid,
    VllmRanks,
    Weights,
    build_layer,
    make_config,
    ranks,  # noqa: F401 - fixture
    vllm_step,
)
from vllm_npu import envs
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.strategies.table import STRATEGIES

pytest.importorskip("vllm")

MAPS, DESCRIPTORS = Path("/proc/self/maps"), Path("/proc/self/fd")
MALFORMED = "/dev/null/no value"
TP2_DP2_NO_EP = Grid(2, 2, ep=False)


def windows() -> int:
    """Number of shared windows that this process maps."""
    return MAPS.read_text().count("memfd:vllm_npu_window")


def run_step(
    grid: Grid,
    config: Any,
    layer: Any,
    strategy: str = "allgather",
    num_experts: int = NUM_EXPERTS,
    counts: tuple[int, ...] = (5, 2),
) -> None:
    from vllm_npu.plugin.step_planner import planner_of

    counts = counts[: grid.dp]
    planner_of(config).propose(strategy)
    tokens = Tokens.random(Layout(grid), grid, counts, torch.float32)
    if num_experts != NUM_EXPERTS:
        wide = torch.randn(sum(counts), num_experts, generator=torch.Generator().manual_seed(3)).split(counts)
        logits = wide[grid.dp_rank]
        tokens = Tokens(tokens.hidden_states, logits.clone(), (tokens.whole[0], logits), tokens.own)
    with vllm_step(grid, config, counts):
        output = layer(hidden_states=tokens.hidden_states, router_logits=tokens.router_logits)
    expected = dense_moe(tokens, Weights.random(torch.float32, num_experts), shared=False)
    check_output(output, tokens, expected, (grid, strategy, num_experts))


# ----------------------------------------------------------------------------------------------- malformed settings


def nothing(grid: Grid) -> None:
    """Makes vLLM end the groups of another grid."""


def start_with_a_malformed_variable(grid: Grid) -> list[str]:
    from vllm_npu.plugin.step_planner import planner_of

    config = make_config(grid)
    layer = build_layer(grid, config)
    messages = []
    for variable in envs.RANK_VARIABLES:
        with pytest.MonkeyPatch.context() as patched:
            if grid.rank == 1:
                patched.setenv(variable.name, MALFORMED)
            with pytest.raises(UnsupportedConfigError) as error:
                planner_of(config)
            messages.append(str(error.value))
    run_step(grid, config, layer)
    return messages


def test_a_malformed_variable_on_one_rank_stops_all_ranks_before_a_token_moves(ranks: VllmRanks):  # noqa: F811
    ranks.run(nothing, TP2)
    for messages in ranks.run(start_with_a_malformed_variable, DP2):
        for variable, message in zip(envs.RANK_VARIABLES, messages, strict=True):
            assert "ranks [1]" in message
            assert variable.name in message
            assert MALFORMED in message


def start_where_one_rank_cannot(grid: Grid) -> str:
    from vllm_npu.plugin import compat
    from vllm_npu.plugin.step_planner import planner_of

    config = make_config(grid)
    layer = build_layer(grid, config)
    with pytest.MonkeyPatch.context() as patched:
        if grid.rank == 1:

            def refuse(*_: Any) -> None:
                raise UnsupportedConfigError("this rank's buffer is too small")

            patched.setattr(compat.current(), "device_limits", refuse)
        with pytest.raises(UnsupportedConfigError) as error:
            planner_of(config)
    run_step(grid, config, layer)
    return str(error.value)


def test_a_rank_whose_start_is_refused_does_not_leave_the_others_waiting(ranks: VllmRanks):  # noqa: F811
    for message in ranks.run(start_where_one_rank_cannot, DP2):
        assert "refused: ranks [0]: nothing; ranks [1]: this rank's buffer is too small" in message


def test_a_malformed_variable_is_refused_before_a_process_starts(monkeypatch):
    for variable in envs.RANK_VARIABLES:
        if variable.kind is not envs.Kind.TEXT:
            with monkeypatch.context() as patched:
                patched.setenv(variable.name, MALFORMED)
                with pytest.raises(ValueError, match=f"{variable.name}='{MALFORMED}'"):
                    make_config(DP2)


# ------------------------------------------------------------------------------------------------------- one set


def run_layer_and_ops(grid: Grid) -> tuple[int, bool]:
    from vllm_npu.plugin.forward_context import current_step
    from vllm_npu.transport.gloo import GlooTransport

    config = make_config(grid)
    run_step(grid, config, build_layer(grid, config))
    x = torch.full((3, HIDDEN), float(grid.tp_rank + 1))
    with vllm_step(grid, config, (3,) * grid.dp):
        assert torch.equal(torch.ops.vllm.maybe_pad_and_reduce(x), torch.full_like(x, 3.0))
        watched = current_step().groups.tp.innermost._watchdog is not None
    gc.collect()
    transports = [each for each in gc.get_objects() if isinstance(each, GlooTransport) and each.group == "tp"]
    return len(transports), watched


@pytest.mark.parametrize("grid", [TP2_DP2_NO_EP, TP2_DP2], ids=str)
def test_ops_and_layers_share_one_watched_set_of_groups(ranks: VllmRanks, grid):  # noqa: F811
    assert ranks.run(run_layer_and_ops, grid) == [(1, True)] * 4


# --------------------------------------------------------------------------------------- models one after another

_before: list[Any] = []  # weak references to what the last grid kept


def run_large_steps(grid: Grid) -> tuple[int, int, int]:
    """A model on this grid, with shared windows. Returns windows before and after, and objects left of the last grid."""
    from vllm_npu.plugin.groups import model_groups
    from vllm_npu.plugin.step_planner import planner_of
    from vllm_npu.transport import gloo

    gc.collect()
    left, of_last_grid = sum(each() is not None for each in _before), windows()
    config = make_config(grid)
    layer = build_layer(grid, config)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gloo, "WINDOW_MIN_BYTES", 1024)
        for strategy in STRATEGIES:
            run_step(grid, config, layer, strategy, counts=(90, 40))
    groups = model_groups(expert_parallel=True)
    assert (groups.topology.tp_size, groups.topology.dp_size) == (grid.tp, grid.dp)
    _before[:] = [weakref.ref(each) for each in (groups.ep.innermost, planner_of(config), layer)]
    return of_last_grid, windows(), left


def test_nothing_of_a_model_outlives_its_groups(ranks: VllmRanks):  # noqa: F811
    """Five models one after another, on groups of other sizes. The descriptors are counted from the second on."""
    ranks.run(nothing, TP2)
    grids = [DP2, TP2_DP2, TP2, TP2_DP2, DP2, TP2_DP2, DP2]
    descriptors = []
    for grid in grids:
        for of_last_grid, now, left in ranks.run(run_large_steps, grid):
            assert of_last_grid == left == 0
            assert now >= 2, "the test uses no window"
        descriptors.append(ranks.run(count_descriptors, grid))
    assert descriptors[-2] == descriptors[3] == descriptors[1], descriptors
    assert descriptors[-1] == descriptors[4], descriptors


def count_descriptors(grid: Grid) -> int:
    gc.collect()
    return len(os.listdir(DESCRIPTORS))


def run_two_models_at_once(grid: Grid) -> None:
    configs = [make_config(grid), make_config(grid)]
    sizes = [NUM_EXPERTS, 2 * NUM_EXPERTS]
    layers = [build_layer(grid, config, num_experts=size) for config, size in zip(configs, sizes, strict=True)]
    for strategy in (*STRATEGIES, *STRATEGIES):
        for config, layer, size in zip(configs, layers, sizes, strict=True):
            run_step(grid, config, layer, strategy, size)


@pytest.mark.parametrize("grid", [DP2, TP2_DP2], ids=str)
def test_two_models_of_other_sizes_at_once(ranks: VllmRanks, grid):  # noqa: F811
    ranks.run(run_two_models_at_once, grid)


def test_no_step_is_planned_where_vllm_has_made_no_groups():
    """Someone may run a part of a model in a forward context of its own, without ranks."""
    from vllm.config import VllmConfig, set_current_vllm_config

    from vllm_npu.plugin.step_planner import plan_step

    config = VllmConfig()
    with set_current_vllm_config(config):
        assert plan_step(vllm_config=config, num_tokens=4) == {}
