"""`vllm-npu demo`: every strategy in real vLLM on a tiny random model, token by token against vanilla vLLM or vllm-ascend."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.table import Table

from vllm_npu.cli.demo_tables import ascend_table, recipe_table, vanilla_table
from vllm_npu.cli.outputs import JsonPath
from vllm_npu.cli.stages import console_for_tables, shown_session
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.tools.demo import ascend_demo, recipe_demo, vanilla_demo
from vllm_npu.tools.demo.session import DemoSession
from vllm_npu.tools.engines.engine_processes import EngineFailedError, require_vllm

Demo = TypeVar("Demo", vanilla_demo.VanillaDemo, ascend_demo.AscendDemo, recipe_demo.RecipeDemo)


def demo(
    full: Annotated[
        bool, typer.Option("--full", help="Also TP2×EP, TP2×DP2×EP with sequence parallel, torch.compile, DeepSeek-V2.")
    ] = False,
    eplb: Annotated[
        bool,
        typer.Option(
            "--eplb", help="With redundant experts that move every few steps: DP2×EP, TP2×EP; with --full all."
        ),
    ] = False,
    ascend_emulated: Annotated[
        bool,
        typer.Option(
            "--ascend-emulated",
            help="Over HTTP beside vllm-ascend, on two emulated NPUs (A3; with --full also A2, DeepSeek-V3, W8A8).",
        ),
    ] = False,
    recipes: Annotated[
        Path | None,
        typer.Option(
            "--recipes",
            exists=True,
            help="With --ascend-emulated, in place of the usual servers: a script with `vllm serve`, a Markdown file, or a "
            "folder of them, as vllm-ascend's tutorials are. Each recipe runs on a tiny model with its own options.",
        ),
    ] = None,
    only: Annotated[str, typer.Option("--only", help="With --recipes: a part of the names to take.")] = "",
    json_path: JsonPath = None,
    log_folder: Annotated[Path | None, typer.Option("--logs", help="Keep the engines' logs in this folder.")] = None,
) -> None:
    """Run every strategy in real vLLM on a tiny random model and compare each token with vanilla vLLM.

    Vanilla vLLM on one worker is the reference. Then two data-parallel engines share the experts (DP2×EP) and run one strategy
    after another without a restart. Exit status 1 if any token differs or an engine fails.
    """
    if ascend_emulated and eplb:
        raise UnsupportedConfigError("beside vllm-ascend experts are balanced by vllm-ascend; leave out --eplb")
    if recipes is None and only:
        raise UnsupportedConfigError("--only names recipes; give --recipes too")
    if recipes is not None and (full or not ascend_emulated):
        raise UnsupportedConfigError("--recipes runs beside vllm-ascend: give --ascend-emulated, and leave out --full")
    if ascend_emulated:
        ascend_demo.require_vllm_ascend()
        if recipes is not None:
            _run(
                recipe_demo.RecipeDemo,
                recipe_demo.planned_recipes(recipes, only),
                lambda finished: recipe_table(finished.rows),
                json_path=json_path,
                log_folder=log_folder,
            )
            return
        servers = ascend_demo.FULL_PLAN if full else ascend_demo.QUICK_PLAN
        _run(
            ascend_demo.AscendDemo,
            servers,
            lambda finished: ascend_table(finished.rows),
            json_path=json_path,
            log_folder=log_folder,
        )
        return
    require_vllm()
    engines = vanilla_demo.FULL_PLAN if full else vanilla_demo.EPLB_PLAN if eplb else vanilla_demo.QUICK_PLAN
    _run(
        vanilla_demo.VanillaDemo,
        [replace(planned, balanced=eplb) for planned in engines],
        lambda finished: vanilla_table(finished.references, finished.rows),
        json_path=json_path,
        log_folder=log_folder,
    )


def _run(
    start: Callable[[DemoSession], Demo],
    plan: Sequence[Any],
    table: Callable[[Demo], Table],
    *,
    json_path: Path | None,
    log_folder: Path | None,
) -> None:
    """Run the plan, print the table and the problems, and write them to `json_path`. Exit with status 1 if there are any."""
    started = time.monotonic()
    failures = []
    with shown_session(log_folder) as session:
        run = start(session)
        try:
            run.execute(plan)
        except EngineFailedError as error:
            failures.append(str(error))

    problems = run.problems + failures
    console = console_for_tables()
    console.print(table(run))
    for problem in problems:
        console.print(problem, style="red", markup=False, highlight=False, soft_wrap=True)
    if json_path is not None:
        verdict = {"passed": not problems, "problems": problems, "seconds": round(time.monotonic() - started, 1)}
        json_path.write_text(json.dumps(verdict | run.facts, indent=1) + "\n")
    if problems:
        raise typer.Exit(1)
