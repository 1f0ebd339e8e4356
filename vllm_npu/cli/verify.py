"""`vllm-npu verify`: every strategy on real ranks against a dense reference."""

import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from vllm_npu.cli.outputs import JsonPath
from vllm_npu.cli.shared_options import Ranks
from vllm_npu.cli.transport_choice import chosen_transport
from vllm_npu.core.limits import DeviceLimits
from vllm_npu.errors import UnsupportedConfigError, VllmNpuError
from vllm_npu.strategies.table import ALL_STRATEGIES, STRATEGIES
from vllm_npu.tools.graph_verification import graph_cases, run_in_graphs
from vllm_npu.tools.launch import RankPool
from vllm_npu.tools.rank_pools import TRANSPORT_CHOICES, open_rank_pool
from vllm_npu.tools.verification import Case, RandomRun, cases, limits_of_device, random_runs, run_case, run_random

SHOWN_FAILURES = 20


def verify(
    transport: Annotated[
        str, typer.Option(help=f"How ranks communicate: {', '.join(TRANSPORT_CHOICES)}.")
    ] = "threaded",
    ranks: Ranks = 4,
    strategy: Annotated[str | None, typer.Option(help="Run only this strategy (default: all).")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Run one dtype and one routing of each layout.")] = False,
    random_count: Annotated[
        int | None, typer.Option("--random", min=1, help="Run this many random cases instead of the fixed ones.")
    ] = None,
    graph: Annotated[
        bool, typer.Option("--graph", help="Capture each layer in graphs, and replay them over other tokens.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of hidden states, routing and experts.")] = 0,
    json_path: JsonPath = None,
) -> None:
    """Run every strategy on every grid of the ranks against a dense mixture of experts in one process.

    Token counts are odd, zero and skewed. Rows that no rank may read are NaN. Results of small integers must be exact. Exit
    status 1 if any case failed. hccl runs on NPUs, or on the emulated Ascend device if there is no CANN. symmetric means nccl
    with that strategy alone.
    """
    if strategy is not None and strategy not in ALL_STRATEGIES:
        raise UnsupportedConfigError(f"unknown strategy {strategy!r}; there are: {', '.join(ALL_STRATEGIES)}")
    if graph and random_count is not None:
        raise UnsupportedConfigError("--graph runs the fixed cases only; leave --random out")
    transport, strategy = chosen_transport(transport, strategy)
    chosen = tuple(ALL_STRATEGIES) if strategy is None else (strategy,)
    started = time.monotonic()
    failures: dict[Case | RandomRun, str] = {}
    with open_rank_pool(transport, ranks) as (pool, device):
        limits = pool.run(limits_of_device)[0]
        to_run: list[Case | RandomRun]
        if graph:
            to_run = list(graph_cases(ranks, strategies=chosen, quick=quick, seed=seed, device=limits))
        elif random_count is None:
            to_run = list(cases(ranks, strategies=chosen, quick=quick, seed=seed, device=limits))
        else:
            to_run = list(random_runs(ranks, random_count, seed, _drawn_strategies(chosen, limits)))
        if not to_run:
            raise UnsupportedConfigError(
                f"{', '.join(chosen)} cannot run on {ranks} ranks on {device}: no case is left"
            )
        for case in track(to_run, f"{transport}, {ranks} ranks on {device}", console=Console(stderr=True)):
            fault = _run(pool, case, graph)
            if fault is not None:
                failures[case] = fault
                if len(failures) <= SHOWN_FAILURES:
                    print(f"FAILED {case}\n       {fault}")
    if len(failures) > SHOWN_FAILURES:
        print(f"... and {len(failures) - SHOWN_FAILURES} more")
    if json_path is not None:
        report = {
            "transport": transport,
            "device": device,
            "ranks": ranks,
            "graph": graph,
            "seed": seed,
            "cases": len(to_run),
            "strategies": Counter((case.case if isinstance(case, RandomRun) else case).strategy for case in to_run),
            "failed": {str(case): fault for case, fault in failures.items()},
            "seconds": round(time.monotonic() - started, 1),
        }
        json_path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"verify: {len(to_run)} cases, {len(failures)} failed")
    if failures:
        raise typer.Exit(1)


def _drawn_strategies(chosen: tuple[str, ...], limits: DeviceLimits) -> list[str]:
    """The chosen strategies that take the small hidden sizes of random cases on this device."""
    drawn = [name for name in chosen if name in STRATEGIES]
    if limits.mc2 is None or limits.mc2.hidden_sizes is not None:
        drawn = [name for name in drawn if name != "mc2"]
    if not limits.all2all:
        drawn = [name for name in drawn if name != "all2all"]
    if not drawn:
        raise UnsupportedConfigError(f"no random cases for {', '.join(chosen)} here; leave --random out")
    return drawn


def _run(pool: RankPool, case: Case | RandomRun, graph: bool) -> str | None:
    """The fault of the first rank that has one, or None."""
    run: Callable[..., str | None] = run_in_graphs if graph else run_case
    if isinstance(case, RandomRun):
        run = run_random
    try:
        return next((fault for fault in pool.run(run, case) if fault), None)
    except VllmNpuError as error:
        return f"{type(error).__name__}: {error}"
