"""`vllm-npu demo --ascend-emulated --recipes`: vllm-ascend's own recipes, made small, with and without this package.

Each recipe runs twice: with moe_comm=off, which is vllm-ascend alone, and with moe_comm=auto. The tokens have to be equal.
"""

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vllm_npu.errors import InvalidInputError
from vllm_npu.tools.demo.ascend_demo import AUTO, OFF, emulated_server
from vllm_npu.tools.demo.recipes import PRODUCER, SmallRecipe, joined, make_small
from vllm_npu.tools.demo.session import DemoSession, count_identical
from vllm_npu.tools.engines.engine_processes import EngineFailedError
from vllm_npu.tools.engines.http_engine import HttpEngine, Served
from vllm_npu.tools.engines.tiny_models import demo_prompts, write_tiny_model
from vllm_npu.tools.serve_script import read_script, scripts_below

CHIP = "A3"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeRow:
    """One recipe: the tokens with this package against those of vllm-ascend alone."""

    recipe: str
    runs_as: str  # model, topology and graphs of the small form; of both nodes, if a prefill node computes the prompts
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

    A decode node gets a prefill node of the same file: the last one before it, or else the first one behind it. Scripts in
    files of their own count as one file. `only` is a part of the names to take. Raises InvalidInputError if no recipe has
    such a name, or a file cannot be read.
    """
    try:
        scripts = list(scripts_below(path))
    except (OSError, UnicodeError) as error:
        raise InvalidInputError(f"--recipes {path}: {error}") from error
    made = [_made_small(name, text) for name, text in scripts]
    planned: list[SmallRecipe | RecipeRow] = []
    for number, ((name, _), small) in enumerate(zip(scripts, made, strict=True)):
        if only.lower() in name.lower():
            nearest_first = [*reversed(made[:number]), *made[number + 1 :]]
            whole = _with_prefill_node(small, nearest_first) if isinstance(small, SmallRecipe) else small
            planned.append(_unless_as_before(whole, planned) if isinstance(whole, SmallRecipe) else whole)
    if not planned:
        raise InvalidInputError(
            f"--recipes {path}: there is no `vllm serve` in it, in a script with {only!r} in its name"
        )
    return planned


def _made_small(name: str, text: str) -> SmallRecipe | RecipeRow:
    try:
        return make_small(name, read_script(text))
    except InvalidInputError as error:
        return RecipeRow(recipe=name, runs_as="–", left_out=(), not_run=str(error))


def _with_prefill_node(small: SmallRecipe, others: Sequence[SmallRecipe | RecipeRow]) -> SmallRecipe | RecipeRow:
    """A decode node gets the first prefill node of its file among `others`."""
    if small.kv_role is None:
        return small
    if small.kv_role == PRODUCER:
        return _not_run(small, "it is run beside the decode nodes of its file")
    for other in others:
        if (
            isinstance(other, SmallRecipe)
            and other.kv_role == PRODUCER
            and _file_of(other.name) == _file_of(small.name)
        ):
            return joined(other, small)
    return _not_run(small, "no prefill node of its file can be made small")


def _unless_as_before(small: SmallRecipe, before: Sequence[SmallRecipe | RecipeRow]) -> SmallRecipe | RecipeRow:
    same = [other for other in before if isinstance(other, SmallRecipe) and other.same_as(small)]
    return _not_run(small, f"as {same[0].name}") if same else small


def _not_run(small: SmallRecipe, why: str) -> RecipeRow:
    return RecipeRow(recipe=small.name, runs_as=str(small), left_out=small.left_out, not_run=why)


def _file_of(name: str) -> str:
    """The Markdown file that a script's name begins with; empty for a script in a file of its own."""
    file, _, number = name.rpartition(" ")
    return file if number.isdecimal() else ""


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
        for node in filter(None, (recipe.prefill, recipe)):
            folder = self._session.folder / node.model.family
            if not folder.exists():
                write_tiny_model(node.model, folder, quantised="W8A8" if node.int8 else None)
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
        """Start the recipe's servers and generate. Returns the strategies of the last step too. Raises EngineFailedError."""
        show, prompts = self._session.show, demo_prompts()
        with ExitStack() as servers:
            nodes = [
                servers.enter_context(self._server(node, moe_comm))
                for node in (recipe.prefill, recipe)
                if node is not None
            ]
            with show(f"{recipe.name}: starting {recipe} with moe_comm={moe_comm}"):
                for number, node in enumerate(nodes):
                    node.wait_until_ready(beside=nodes[number + 1 :])
            *prefill_node, server = nodes
            with show(f"{recipe.name}: generating with moe_comm={moe_comm}"):
                transfers = prefill_node[0].prefill(prompts) if prefill_node else None
                served = server.generate(prompts, recipe.max_tokens, kv_transfers=transfers)
                counters = server.take_counters() if moe_comm != OFF else []
        return served, tuple(sorted({str(worker["strategy"]) for worker in counters}))

    def _server(self, node: SmallRecipe, moe_comm: str) -> AbstractContextManager[HttpEngine]:
        # With torch_npu's queue, vllm-ascend alone may put tensors of a second stream outside of a graph (docs/ascend.md).
        queue = {"TASK_QUEUE_ENABLE": "0"} if moe_comm == OFF else {}
        return emulated_server(
            self._session,
            f"{node.name} {moe_comm}",
            node.model,
            node.parallelism,
            *(("--quantization", "ascend") if node.int8 else ()),
            *(("--kv-transfer-config", json.dumps(node.kv_transfer)) if node.kv_transfer else ()),
            *node.options,
            chip=CHIP,
            environment={**node.variables, **queue},
            moe_comm=moe_comm,
            additional_config=node.additional_config,
            dtype="bfloat16" if node.int8 else "float16",
            graph_mode=node.graph_mode,
        )
