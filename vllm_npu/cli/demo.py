"""`vllm-npu demo`: every strategy inside real vLLM on a tiny random model, token by token against vanilla vLLM."""

import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_npu.cli.outputs import JsonPath
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.tools.engines.engine_processes import EngineFailedError, Parallelism, require_vllm
from vllm_npu.tools.engines.engine_set import EngineSet, Generation
from vllm_npu.tools.engines.stop_signals import Interrupted, StopSignals
from vllm_npu.tools.engines.tiny_models import (
    DEEPSEEK_V2,
    DEMO_MAX_TOKENS,
    QWEN3_MOE,
    TinyModel,
    demo_prompts,
    write_tiny_model,
)

# Least gap in log-probability between best and second-best token that the reference must have. fp32 sums in another
# order differ by about 1e-5 here, so that a token can only change by a fault.
SAFE_MARGIN = 1e-3
LOG_WIDTH = 120  # columns of the table where it is not shown on a terminal


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedEngines:
    """One set of engines of the demo; it goes through all strategies without being restarted."""

    model: TinyModel
    parallelism: Parallelism
    compiled: bool = False  # torch.compile instead of eager
    balanced: bool = False  # with redundant experts that move while the engines serve

    @property
    def mode(self) -> str:
        """For tables."""
        return ("compiled" if self.compiled else "eager") + (" EPLB" if self.balanced else "")

    @property
    def engine_args(self) -> dict[str, Any]:
        """vLLM's arguments beyond the topology. Experts move after every EPLB_STEPS steps, and each rank has one more."""
        if not self.balanced:
            return {}
        ranks = self.parallelism.tensor_parallel_size * self.parallelism.data_parallel_size
        steps = {"window_size": EPLB_STEPS, "step_interval": EPLB_STEPS}
        return {
            "enable_eplb": True,
            "eplb_config": {"num_redundant_experts": ranks, "use_async": False, **steps},
        }


EPLB_STEPS = 5
DP2_EP = Parallelism(data_parallel_size=2, expert_parallel=True)
TP2_EP = Parallelism(tensor_parallel_size=2, expert_parallel=True)
TP2_DP2_EP = Parallelism(tensor_parallel_size=2, data_parallel_size=2, expert_parallel=True)

QUICK_PLAN = (PlannedEngines(model=QWEN3_MOE, parallelism=DP2_EP),)
FULL_PLAN = (
    *QUICK_PLAN,
    PlannedEngines(model=QWEN3_MOE, parallelism=TP2_EP),
    PlannedEngines(model=QWEN3_MOE, parallelism=TP2_DP2_EP),
    PlannedEngines(model=QWEN3_MOE, parallelism=DP2_EP, compiled=True),
    PlannedEngines(model=DEEPSEEK_V2, parallelism=DP2_EP),
    PlannedEngines(model=DEEPSEEK_V2, parallelism=TP2_EP),
)
EPLB_PLAN = (*QUICK_PLAN, PlannedEngines(model=QWEN3_MOE, parallelism=TP2_EP))


@dataclass(frozen=True, slots=True)
class Difference:
    """The first generated token that is not the reference's."""

    prompt: int  # index into the prompts
    position: int  # index into the generated tokens
    expected: int | None  # token ids; None: this side had already ended
    got: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One row of the table: one strategy in one set of engines, against the reference."""

    model: str
    topology: str
    mode: str  # eager or compiled, and whether experts move
    strategy: str  # as asked
    strategies_run: list[str]  # as the workers say; anything but [strategy] is a failure
    tokens_identical: int
    tokens_total: int
    first_difference: Difference | None
    collectives_per_moe_layer: float  # calls of one rank in one MoE layer
    collectives: dict[str, int]  # calls by name, all ranks together
    bytes_sent_per_token_per_layer: float  # by all ranks; a token is a prompt's or a generated one, not padding
    tokens_per_second: float  # generated
    seconds: float
    experts_moved: int | None  # into slots of another rank, by all ranks; None: experts stay

    @property
    def passed(self) -> bool:
        """Every token identical, by the strategy that was asked for, with communication, and moves where there are any."""
        return (
            self.first_difference is None
            and self.tokens_identical == self.tokens_total
            and self.strategies_run == [self.strategy]
            and self.collectives_per_moe_layer > 0
            and self.experts_moved != 0
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What vanilla vLLM generated on one worker."""

    model: str
    tokens: list[list[int]]  # one list per prompt
    distinct_tokens: int  # how many different ones: near the total unless decoding degenerates
    smallest_margin: float  # nats
    seconds: float


def demo(
    full: Annotated[
        bool, typer.Option("--full", help="Also TP2×EP, TP2×DP2×EP with sequence parallel, torch.compile, DeepSeek-V2.")
    ] = False,
    eplb: Annotated[
        bool,
        typer.Option("--eplb", help="With redundant experts, moved every few steps: DP2×EP, TP2×EP; with --full all."),
    ] = False,
    ascend_emulated: Annotated[
        bool,
        typer.Option(
            "--ascend-emulated",
            help="Over HTTP beside vllm-ascend, on two emulated NPUs (A3; with --full also A2, DeepSeek-V3, W8A8).",
        ),
    ] = False,
    json_path: JsonPath = None,
    log_folder: Annotated[Path | None, typer.Option("--logs", help="Keep the engines' logs in this folder.")] = None,
) -> None:
    """Run every strategy inside real vLLM on a tiny random model and compare each token with vanilla vLLM.

    Vanilla vLLM on one worker is the reference. Then two data-parallel engines share the experts (DP2×EP) and go
    through the strategies without being restarted. Exit status 1 if any token differs or an engine fails.
    """
    if ascend_emulated and eplb:
        raise UnsupportedConfigError("beside vllm-ascend experts are balanced by vllm-ascend; leave out --eplb")
    if ascend_emulated:
        _ascend_demo(full=full, json_path=json_path, log_folder=log_folder)
        return
    require_vllm()
    plan: tuple[PlannedEngines, ...] = FULL_PLAN if full else EPLB_PLAN if eplb else QUICK_PLAN
    if eplb:
        plan = tuple(replace(planned, balanced=True) for planned in plan)
    stage = Stage()
    started = time.monotonic()
    comparisons: list[Comparison] = []
    references: dict[str, Reference] = {}
    failure: EngineFailedError | None = None
    try:
        with StopSignals() as stop_signals, _temporary_folder(stop_signals) as folder:
            run = DemoRun(folder=folder, log_folder=log_folder, stage=stage, stop_signals=stop_signals)
            try:
                run.execute(plan, references, comparisons)
            except EngineFailedError as error:
                failure = error
    except Interrupted as interruption:
        stage.say(f"{interruption}: engines and temporary files are gone")
        raise typer.Exit(interruption.exit_status) from None

    problems = [problem for row in comparisons for problem in _problems(row)]
    problems += [_margin_problem(row) for row in references.values() if row.smallest_margin < SAFE_MARGIN]
    if failure is not None:
        problems.append(str(failure))
    facts = {
        "vllm_version": _vllm_version(),
        "references": [asdict(reference) for reference in references.values()],
        "comparisons": [asdict(row) | {"passed": row.passed} for row in comparisons],
    }
    _report(results_table(references, comparisons), problems, facts, started, json_path)


def _ascend_demo(*, full: bool, json_path: Path | None, log_folder: Path | None) -> None:
    from vllm_npu.cli import ascend_demo  # imports the emulator

    ascend_demo.require_vllm_ascend()
    stage = Stage()
    started = time.monotonic()
    rows: list[ascend_demo.Row] = []
    failure: EngineFailedError | None = None
    try:
        with StopSignals() as stop_signals, _temporary_folder(stop_signals) as folder:
            run = ascend_demo.AscendDemo(folder=folder, log_folder=log_folder, stage=stage, stop_signals=stop_signals)
            try:
                run.execute(ascend_demo.FULL_PLAN if full else ascend_demo.QUICK_PLAN, rows)
            except EngineFailedError as error:
                failure = error
    except Interrupted as interruption:
        stage.say(f"{interruption}: servers and temporary files are gone")
        raise typer.Exit(interruption.exit_status) from None
    problems = ascend_demo.problems(rows) + ([] if failure is None else [str(failure)])
    facts = {"versions": ascend_demo.versions(), "rows": ascend_demo.as_json(rows)}
    _report(ascend_demo.results_table(rows), problems, facts, started, json_path)


def _report(table: Table, problems: list[str], facts: dict[str, Any], started: float, json_path: Path | None) -> None:
    """Print the table and what is wrong, and write both where asked. Exit status 1 if anything is."""
    console = Console()
    if not console.is_terminal:
        console.width = LOG_WIDTH
    console.print(table)
    for problem in problems:
        console.print(problem, style="red", markup=False, highlight=False, soft_wrap=True)
    if json_path is not None:
        verdict = {"passed": not problems, "problems": problems, "seconds": round(time.monotonic() - started, 1)}
        json_path.write_text(json.dumps(verdict | facts, indent=1) + "\n")
    if problems:
        raise typer.Exit(1)


class Stage:
    """Says on stderr what is going on: a spinner on a terminal, one line per beginning and end elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def show(self, text: str) -> Iterator[None]:
        """While the block runs, show that it does; afterwards, how long it took."""
        started = time.monotonic()
        if self._console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            with Progress(*columns, console=self._console, transient=True) as progress:
                progress.add_task(text, total=None)
                yield
        else:
            self.say(f"… {text}")
            yield
        self.say(f"✓ {text} ({time.monotonic() - started:.0f} s)")


class DemoRun:
    """The engines of one run of the demo, one set after the other."""

    def __init__(self, *, folder: Path, log_folder: Path | None, stage: Stage, stop_signals: StopSignals) -> None:
        self._folder = folder
        self._log_folder = log_folder
        self._stage = stage
        self._stop_signals = stop_signals

    def execute(
        self,
        plan: Sequence[PlannedEngines],
        references: dict[str, Reference],  # filled, by family
        comparisons: list[Comparison],  # filled
    ) -> None:
        """Run `plan`; what is known before an engine fails is kept. Raises EngineFailedError, Interrupted."""
        for planned in plan:
            family = planned.model.family
            if family not in references:
                write_tiny_model(planned.model, self._folder / family)
                references[family] = self._reference(planned.model)
            self._compare(planned, references[family], comparisons)

    def _reference(self, model: TinyModel) -> Reference:
        folder_name = f"{model.family}-reference"
        engines = self._engines(model, Parallelism(), folder_name, strategies=[None], measure_margins=True)
        with self._logs_kept(folder_name), engines:
            with self._stage.show(f"{model.family} TP1: starting vanilla vLLM for the reference"):
                engines.wait_until_ready()
            with self._stage.show(f"{model.family} TP1: generating the reference"):
                generation = engines.generate()
        return Reference(
            model=model.family,
            tokens=generation.tokens,
            distinct_tokens=len({token for tokens in generation.tokens for token in tokens}),
            smallest_margin=generation.smallest_margin or 0.0,
            seconds=generation.seconds,
        )

    def _compare(self, planned: PlannedEngines, reference: Reference, comparisons: list[Comparison]) -> None:
        from vllm_npu.strategies.table import STRATEGIES

        title = f"{planned.model.family} {planned.parallelism} {planned.mode}"
        folder_name = title.replace(" ", "-").replace("×", "").replace("+", "-").lower()
        engines = self._engines(
            planned.model,
            planned.parallelism,
            folder_name,
            strategies=[next(iter(STRATEGIES)), *STRATEGIES],
            compiled=planned.compiled,
            engine_args=planned.engine_args,
        )
        with self._logs_kept(folder_name), engines:
            with self._stage.show(f"{title}: starting engines"):
                engines.wait_until_ready()
            with self._stage.show(f"{title}: warming up"):
                engines.generate()  # the first steps of an engine are slow, whatever the strategy
            for strategy in STRATEGIES:
                with self._stage.show(f"{title}: generating with {strategy}"):
                    generation = engines.generate()
                comparisons.append(
                    compare(
                        generation,
                        reference.tokens,
                        model=planned.model,
                        topology=str(planned.parallelism),
                        mode=planned.mode,
                    )
                )

    def _engines(self, model: TinyModel, parallelism: Parallelism, folder_name: str, **options: Any) -> EngineSet:
        return EngineSet(
            self._folder / model.family,
            parallelism,
            prompts=demo_prompts(),
            max_tokens=DEMO_MAX_TOKENS,
            folder=self._folder / folder_name,
            caches=self._folder / "caches",
            stop_signals=self._stop_signals,
            **options,
        )

    @contextmanager
    def _logs_kept(self, folder_name: str) -> Iterator[None]:
        """Copy the logs of the engines in `folder_name` to the folder that the user named, if one was, in any case."""
        try:
            yield
        finally:
            if self._log_folder is not None:
                self._log_folder.mkdir(parents=True, exist_ok=True)
                for log in (self._folder / folder_name).glob("*.log"):
                    shutil.copy(log, self._log_folder / f"{folder_name}-{log.name}")


def compare(
    generation: Generation, expected: Sequence[list[int]], *, model: TinyModel, topology: str, mode: str
) -> Comparison:
    """Count identical tokens position by position, and sum up what the workers counted."""
    calls: Counter[str] = Counter()
    for worker in generation.counters:
        calls.update(worker["calls"])
    layer_calls = sum(worker["moe_layer_calls"] for worker in generation.counters)
    bytes_sent = sum(worker["bytes_sent"] for worker in generation.counters)
    # The last generated token of a prompt is never an input.
    inputs = sum(map(len, demo_prompts())) + sum(map(len, expected)) - len(expected)
    num_generated = sum(map(len, generation.tokens))
    moved = [worker["eplb"]["experts_received"] for worker in generation.counters if "eplb" in worker]
    return Comparison(
        model=model.family,
        topology=topology,
        mode=mode,
        strategy=str(generation.strategy),
        strategies_run=sorted({str(worker["strategy"]) for worker in generation.counters}),
        tokens_identical=sum(
            got == want
            for got_tokens, want_tokens in zip(generation.tokens, expected, strict=True)
            for got, want in zip(got_tokens, want_tokens, strict=False)
        ),
        tokens_total=sum(map(len, expected)),
        first_difference=first_difference(generation.tokens, expected),
        collectives_per_moe_layer=calls.total() / layer_calls if layer_calls else 0.0,
        collectives=dict(sorted(calls.items())),
        bytes_sent_per_token_per_layer=bytes_sent / (inputs * model.num_moe_layers),
        tokens_per_second=num_generated / generation.seconds,
        seconds=generation.seconds,
        experts_moved=sum(moved) if moved else None,
    )


def first_difference(got: Sequence[list[int]], expected: Sequence[list[int]]) -> Difference | None:
    """The first prompt, and in it the first position, where the two do not agree; None where they do."""
    for prompt, (got_tokens, want_tokens) in enumerate(zip(got, expected, strict=True)):
        for position in range(max(len(got_tokens), len(want_tokens))):
            got_token = got_tokens[position] if position < len(got_tokens) else None
            want_token = want_tokens[position] if position < len(want_tokens) else None
            if got_token != want_token:
                return Difference(prompt, position, want_token, got_token)
    return None


def results_table(references: dict[str, Reference], comparisons: Sequence[Comparison]) -> Table:
    """One row per reference and per comparison, grouped by model."""
    balanced = any(row.experts_moved is not None for row in comparisons)
    moving = ", while experts move between ranks (EPLB)" if balanced else ""
    table = Table(title=f"Greedy tokens against vanilla vLLM{moving}", title_justify="left")
    for header in ("model", "topology", "strategy"):
        table.add_column(header, no_wrap=True)
    for header in ("tokens\nidentical", "collectives\nper MoE layer", "bytes sent per\ntoken and layer", "tokens/s"):
        table.add_column(header, justify="right", no_wrap=True)
    if balanced:
        table.add_column("experts\nmoved", justify="right", no_wrap=True)
    for reference in references.values():
        num_tokens = sum(map(len, reference.tokens))
        table.add_row(
            reference.model, "TP1", "vanilla vLLM", "reference", "–", "–", f"{num_tokens / reference.seconds:.1f}"
        )
        rows = [row for row in comparisons if row.model == reference.model]
        for row in rows:
            topology = f"{row.topology} compiled" if row.mode.startswith("compiled") else row.topology
            table.add_row(
                row.model,
                topology,
                row.strategy if row.strategies_run == [row.strategy] else f"{row.strategy} → {row.strategies_run}",
                f"{row.tokens_identical}/{row.tokens_total}",
                f"{row.collectives_per_moe_layer:.1f}",
                f"{row.bytes_sent_per_token_per_layer:,.0f}",
                f"{row.tokens_per_second:.1f}",
                *([str(row.experts_moved)] if balanced else []),
                style=None if row.passed else "red",
            )
        table.add_section()
    return table


def _problems(row: Comparison) -> list[str]:
    """What is wrong with one row, in words."""
    where = f"{row.model} {row.topology} {row.mode} {row.strategy}"
    problems = []
    if (found := row.first_difference) is not None:
        problems.append(
            f"{where}: {row.tokens_total - row.tokens_identical} of {row.tokens_total} tokens differ, first in prompt "
            f"{found.prompt} at position {found.position}: expected {found.expected}, got {found.got}"
        )
    if row.strategies_run != [row.strategy]:
        problems.append(f"{where}: the workers ran {row.strategies_run}; their logs (--logs) give the reason")
    if not row.collectives_per_moe_layer:
        problems.append(f"{where}: no collective was counted, so nothing was tested")
    if row.experts_moved == 0:
        problems.append(f"{where}: no expert moved, so nothing was tested")
    return problems


def _margin_problem(reference: Reference) -> str:
    return (
        f"{reference.model}: the reference came within {reference.smallest_margin:.1e} of a tie "
        f"(limit {SAFE_MARGIN:.0e}), so identical tokens prove little here; "
        "choose another seed in tiny_models.py"
    )


def _vllm_version() -> str:
    """Of whichever distribution provides vLLM: on CPU it is not called vllm."""
    from importlib.metadata import packages_distributions

    return version(packages_distributions()["vllm"][0])


@contextmanager
def _temporary_folder(stop_signals: StopSignals) -> Iterator[Path]:
    """A folder of our own, removed in the end, however the block ends."""
    folder: Path | None = None
    try:
        with stop_signals.held():
            folder = Path(tempfile.mkdtemp(prefix="vllm-npu-demo-"))
        yield folder
    finally:
        with stop_signals.held():
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
