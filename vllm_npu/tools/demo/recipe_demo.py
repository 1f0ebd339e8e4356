"""`vllm-npu demo --ascend-emulated --recipes`: vllm-ascend's own recipes, made small, with and without this package.

Each recipe runs twice: with moe_comm=off, which is vllm-ascend alone, and with moe_comm=auto. The tokens have to be equal.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vllm_npu.errors import InvalidInputError
from vllm_npu.tools.demo.ascend_demo import AUTO, OFF, emulated_server
from vllm_npu.tools.demo.recipes import SmallRecipe, make_small
from vllm_npu.tools.demo.session import DemoSession, count_identical
from vllm_npu.tools.engines.engine_processes import EngineFailedError
from vllm_npu.tools.engines.http_engine import Served
from vllm_npu.tools.engines.tiny_models import demo_prompts, write_tiny_model
from vllm_npu.tools.serve_script import read_script, scripts_below

CHIP = "A3"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeRow:
    """One recipe: the tokens with this package against those of vllm-ascend alone."""

    recipe: str
    runs_as: str  # model, topology and graphs of the small form
    left_out: tuple[str, ...]
    not_run: str | None = None  # why there is no small form, or which recipe has the same
    failed: str | None = None  # the server that did not run, with the end of its log
    ran: tuple[str, ...] = ()  # strategies of the last step, which the workers report
    tokens_identical: int = 0
    tokens_total: int = 0
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether all tokens are those of vllm-ascend alone. A recipe that was not run passes."""
        return self.not_run is not None or self.tokens_identical == self.tokens_total > 0


def planned_recipes(path: Path, only: str) -> list[SmallRecipe | RecipeRow]:
    """The recipes in a script, a Markdown file or a folder, made small; a row in place of each that will not be run.

    `only` is a part of the names to take. Raises InvalidInputError if no recipe has such a name, or a file cannot be read.
    """
    planned: list[SmallRecipe | RecipeRow] = []
    try:
        for name, text in scripts_below(path):
            if only.lower() in name.lower():
                planned.append(_planned(name, text, planned))
    except (OSError, UnicodeError) as error:
        raise InvalidInputError(f"--recipes {path}: {error}") from error
    if not planned:
        raise InvalidInputError(
            f"--recipes {path}: there is no `vllm serve` in it, in a script with {only!r} in its name"
        )
    return planned


def _planned(name: str, text: str, before: Sequence[SmallRecipe | RecipeRow]) -> SmallRecipe | RecipeRow:
    try:
        small = make_small(name, read_script(text))
    except InvalidInputError as error:
        return RecipeRow(recipe=name, runs_as="–", left_out=(), not_run=str(error))
    for other in before:
        if isinstance(other, SmallRecipe) and replace(other, name=name, left_out=small.left_out) == small:
            return RecipeRow(recipe=name, runs_as=str(small), left_out=small.left_out, not_run=f"as {other.name}")
    return small


class RecipeDemo:
    """The servers of one run: two for each recipe, one after another."""

    def __init__(self, session: DemoSession) -> None:
        self._session = session
        self.rows: list[RecipeRow] = []

    def execute(self, plan: Sequence[SmallRecipe | RecipeRow]) -> None:
        """Run `plan` and fill `rows`. A server that fails is a row, and the next recipe runs. Raises Interrupted."""
        for planned in plan:
            self.rows.append(planned if isinstance(planned, RecipeRow) else self._run(planned))

    @property
    def problems(self) -> list[str]:
        """One text for each fault."""
        return [
            f"{row.recipe}: {row.failed or f'{row.tokens_total - row.tokens_identical} of {row.tokens_total} tokens differ'}"
            for row in self.rows
            if not row.passed
        ]

    @property
    def facts(self) -> dict[str, Any]:
        """The results, for --json."""
        return {"rows": [asdict(row) | {"passed": row.passed} for row in self.rows]}

    def _run(self, recipe: SmallRecipe) -> RecipeRow:
        folder = self._session.folder / recipe.model.family
        if not folder.exists():
            write_tiny_model(recipe.model, folder, quantised="W8A8" if recipe.int8 else None)
        row = RecipeRow(recipe=recipe.name, runs_as=str(recipe), left_out=recipe.left_out)
        try:
            [(reference, _), (served, ran)] = [self._serve(recipe, moe_comm) for moe_comm in (OFF, AUTO)]
        except EngineFailedError as error:
            return replace(row, failed=str(error))
        return replace(
            row,
            ran=ran,
            tokens_identical=count_identical(served.tokens, reference.tokens),
            tokens_total=sum(map(len, reference.tokens)),
            seconds=served.seconds,
        )

    def _serve(self, recipe: SmallRecipe, moe_comm: str) -> tuple[Served, tuple[str, ...]]:
        """Start a server and generate. Returns the strategies of the last step too. Raises EngineFailedError."""
        with emulated_server(
            self._session,
            f"{recipe.name} {moe_comm}",
            recipe.model,
            recipe.parallelism,
            *(("--quantization", "ascend") if recipe.int8 else ()),
            *recipe.options,
            chip=CHIP,
            environment=recipe.variables,
            moe_comm=moe_comm,
            additional_config=recipe.additional_config,
            dtype="bfloat16" if recipe.int8 else "float16",
            graph_mode=recipe.graph_mode,
        ) as server:
            with self._session.show(f"{recipe.name}: starting {recipe} with moe_comm={moe_comm}"):
                server.wait_until_ready()
            with self._session.show(f"{recipe.name}: generating with moe_comm={moe_comm}"):
                served = server.generate(demo_prompts(), recipe.max_tokens)
                counters = server.take_counters() if moe_comm != OFF else []
        return served, tuple(sorted({str(worker["strategy"]) for worker in counters}))
