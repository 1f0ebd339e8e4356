"""What a worker makes anew after a failed step, on ranks without an engine: vLLM's groups, ours, and what planners agree on."""

import gc
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from tests.time_limits import on_this_machine
from tests.vllm.test_group_life import DESCRIPTORS, run_step, windows
from tests.vllm.vllm_ranks import DP2, DP4, Grid, VllmRanks, build_layer, make_config
from vllm_npu import envs
from vllm_npu.errors import RankFailureError
from vllm_npu.strategies.table import STRATEGIES

pytest.importorskip("vllm")

VICTIM = 1
QUIET_DEADLINE = 3.0  # seconds for a collective on a quiet machine
CLOSING_SECONDS = 2.0  # for gloo's threads; below the deadline, since ranks wait for one another meanwhile
KINDS = ("socket", "pipe", "eventpoll")  # of which every gloo group has some
LARGE = (90, 40, 70, 5)  # tokens of each rank: their messages go through shared memory


@pytest.fixture
def own_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmRanks]:
    """Processes of this test alone: it replaces their default group. They read the deadline when they make their groups."""
    monkeypatch.setenv(envs.COLLECTIVE_DEADLINE.name, str(on_this_machine(QUIET_DEADLINE)))
    started = VllmRanks()
    yield started
    started.close()


def settled_descriptors(expected: Counter[str] | None) -> Counter[str]:
    """Sockets, pipes and event polls of this rank. Waits for gloo's threads, which close those of an old epoch at their time.

    COLLECTIVE over all processes: gloo also closes the sockets to a rank that has left its groups, so none may leave before all
    have counted.
    """
    from vllm.distributed.parallel_state import get_world_group

    get_world_group().barrier()
    give_up = time.monotonic() + CLOSING_SECONDS
    while True:
        gc.collect()
        found: Counter[str] = Counter()
        for descriptor in DESCRIPTORS.iterdir():
            with suppress(FileNotFoundError):  # that of this listing
                target = str(descriptor.readlink())
                found += Counter(kind for kind in KINDS if kind in target)
        if found == expected or time.monotonic() > give_up:
            break
        time.sleep(0.1)
    get_world_group().barrier()
    return found


def break_a_step_and_go_on(grid: Grid, times: int) -> dict[str, Any]:
    """The victim raises an exception before its step begins, so it has planned fewer steps than the others."""
    from vllm.config import set_current_vllm_config

    from vllm_npu.plugin.cpu.worker_retry import leave_epoch, open_epoch
    from vllm_npu.plugin.groups import collective_counter, present_watchdog
    from vllm_npu.plugin.step_planner import planner_of
    from vllm_npu.transport import gloo
    from vllm_npu.transport.renewal import ProcessGroups

    config = make_config(grid)
    layer = build_layer(grid, config)
    culprits, descriptors = [], []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gloo, "WINDOW_MIN_BYTES", 1024)
        for strategy in STRATEGIES:
            run_step(grid, config, layer, strategy, counts=LARGE)
        process_groups = ProcessGroups(timeout=present_watchdog().deadline)
        for _ in range(times):
            watchdog = present_watchdog()
            counted = collective_counter().bytes_sent.total()
            if grid.rank == VICTIM:
                watchdog.tell_fault(ValueError("no such expert"))
            else:
                with pytest.raises(RankFailureError) as error:
                    run_step(grid, config, layer, "all2all", counts=LARGE)
                culprits.append((error.value.ranks, "failed in its own step" in str(error.value)))
                del error
            leave_epoch(process_groups)
            assert windows() == 0, "shared memory of the old epoch"
            with set_current_vllm_config(config):  # as the sentinel's handle_command does
                open_epoch(process_groups, watchdog.next_epoch(), use_all2all=config.parallel_config.use_all2all)
            for strategy in STRATEGIES:
                run_step(grid, config, layer, strategy, counts=LARGE)
            assert collective_counter().bytes_sent.total() > counted, "the counts of the old epoch are lost"
            descriptors.append(settled_descriptors(descriptors[0] if descriptors else None))
    return {
        "culprits": culprits,
        "descriptors": descriptors,
        "epoch": present_watchdog().epoch,
        "strategy": planner_of(config).selection.strategy,
    }


@pytest.mark.parametrize("grid", [DP2, pytest.param(DP4, marks=pytest.mark.nightly)], ids=str)
def test_ranks_that_failed_in_different_steps_go_on_together(own_ranks: VllmRanks, grid: Grid):
    times = 3
    seen = own_ranks.run(break_a_step_and_go_on, grid, times)
    for process, each in enumerate(seen):
        victim = process % grid.size == VICTIM
        assert each["culprits"] == ([] if victim else [((VICTIM,), True)] * times)
        assert each["epoch"] == times
        assert each["strategy"] == list(STRATEGIES)[-1]
        assert each["descriptors"][-1] == each["descriptors"][0], "groups of old epochs stay open"
