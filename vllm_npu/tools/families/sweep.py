"""Runs one family after another: transformers, vanilla vLLM on one rank, then every strategy on several ranks."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_npu.plugin.entry_points import PLUGIN_NAME
from vllm_npu.tools.demo.session import DemoSession, count_identical
from vllm_npu.tools.demo.vanilla_demo import DP2_EP, DP3_EP, TP2_DP2_EP, TP2_EP
from vllm_npu.tools.engines.engine_processes import EngineFailedError, Parallelism
from vllm_npu.tools.engines.engine_set import EngineSet, Generation
from vllm_npu.tools.engines.tiny_models import DEMO_MAX_TOKENS, demo_prompts
from vllm_npu.tools.families.checkpoints import Checkpoint, write_checkpoint
from vllm_npu.tools.families.registry import Family

DP2 = Parallelism(data_parallel_size=2)
QUICK_TOPOLOGIES = (DP2_EP,)
FULL_TOPOLOGIES = (DP2_EP, DP2, TP2_EP, TP2_DP2_EP, DP3_EP)

EQUAL, AS_TRANSFORMERS, AS_VANILLA = "equal", "as transformers", "as vanilla"
REFUSED, NOT_IN_VANILLA, NO_CHECKPOINT = "refused", "vanilla vLLM fails", "no checkpoint"
VANILLA_VARIES, AS_ONE_RANK = "vanilla vLLM varies", "as one rank"
WRONG, CRASHED = "wrong", "crashed"
FAULTS = (WRONG, CRASHED)
# vLLM's engine writes this line when it has a configuration and starts processes.
STARTED = "Initializing a V1 LLM engine"


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyRow:
    """What happened to one family in one topology."""

    family: str
    architecture: str
    topology: str  # "" if no engine of this package was started
    verdict: str
    reason: str = ""  # of a refusal, a failure or a difference
    identical: dict[str, int] = field(default_factory=dict)  # tokens as the reference, by strategy
    tokens_total: int = 0
    vanilla_identical: int | None = None  # of vanilla vLLM on one rank, as transformers; None: it did not run
    smallest_margin: float | None = None  # nats, of transformers

    @property
    def is_fault(self) -> bool:
        """Whether this row is a fault of this package."""
        return self.verdict in FAULTS


class Sweep:
    """One run of `vllm-npu families`."""

    def __init__(self, session: DemoSession, json_path: Path | None = None) -> None:
        self._session = session
        self._json_path = json_path
        self.rows: list[FamilyRow] = []

    def execute(self, families: Sequence[Family], topologies: Sequence[Parallelism]) -> None:
        """Run the families, and fill `rows`. After each family, the rows are in the JSON file. Raises Interrupted."""
        for family in families:
            self.rows += self._rows_of(family, topologies)
            if self._json_path is not None:
                self._json_path.write_text(json.dumps([asdict(row) for row in self.rows], indent=1) + "\n")

    def _rows_of(self, family: Family, topologies: Sequence[Parallelism]) -> list[FamilyRow]:
        if family.model_type is None:
            return [_row(family, NO_CHECKPOINT, reason="transformers has no configuration of it")]
        try:
            with self._session.show(f"{family.name}: writing a checkpoint, generating with transformers"):
                checkpoint = write_checkpoint(family.model_type, self._session.folder / family.name)
        except Exception as error:  # noqa: BLE001 - any error of a model's own code; the other families are still to be run
            return [_row(family, NO_CHECKPOINT, reason=f"{type(error).__name__}: {_one_line(str(error))}")]
        vanilla: list[list[int]] | str
        try:
            vanilla = self._generate(family, checkpoint, Parallelism(), [None])[0].tokens
        except EngineFailedError as error:
            vanilla = cause_of(str(error))
        return [self._row_of(family, checkpoint, vanilla, topology) for topology in topologies]

    def _row_of(
        self,
        family: Family,
        checkpoint: Checkpoint,
        vanilla: list[list[int]] | str,  # its tokens, or why it failed
        topology: Parallelism,
    ) -> FamilyRow:
        from vllm_npu.strategies.table import STRATEGIES

        facts: dict[str, Any] = {
            "topology": str(topology),
            "tokens_total": sum(DEMO_MAX_TOKENS),
            "vanilla_identical": None if isinstance(vanilla, str) else count_identical(vanilla, checkpoint.tokens),
            "smallest_margin": checkpoint.smallest_margin,
        }
        try:
            generations = self._generate(family, checkpoint, topology, list(STRATEGIES))
        except EngineFailedError as error:
            if "UnsupportedConfigError" in str(error) and not self._has_started(family, topology):
                return _row(family, REFUSED, reason=cause_of(str(error)), **facts)
            if isinstance(vanilla, str):
                return _row(family, NOT_IN_VANILLA, reason=vanilla, **facts)
            return _row(family, CRASHED, reason=cause_of(str(error)), **facts)
        verdict, reason, identical = judge(generations, vanilla, checkpoint.tokens)
        if verdict == WRONG and isinstance(vanilla, str):
            # The plugin on one rank moves no tokens. It is vanilla vLLM but for the choice of experts.
            one_rank = self._generate(
                family, checkpoint, Parallelism(), [None], environment={"VLLM_PLUGINS": PLUGIN_NAME}
            )[0].tokens
            if all(each.tokens == one_rank for each in generations):
                verdict, reason = (
                    AS_ONE_RANK,
                    f"{reason}; this package on one rank gives these tokens, transformers others",
                )
                identical = dict.fromkeys(identical, facts["tokens_total"])
        elif verdict == WRONG and not isinstance(vanilla, str):
            alone = self._generate(family, checkpoint, Parallelism(), [None], {"max_num_seqs": 1})[0].tokens
            if alone != vanilla:
                verdict = VANILLA_VARIES
                reason = f"{count_identical(alone, vanilla)} of its tokens stay the same if each request runs alone"
        return _row(family, verdict, reason, identical, **facts)

    def _folder_of(self, family: Family, topology: Parallelism) -> str:
        return f"{family.name}-{topology}".replace("×", "").replace("+", "-").lower()

    def _has_started(self, family: Family, topology: Parallelism) -> bool:
        """Whether an engine of this family and topology had a configuration, and started processes."""
        logs = (self._session.folder / self._folder_of(family, topology)).glob("*.log")
        return any(STARTED in log.read_text(errors="replace") for log in logs)

    def _generate(
        self,
        family: Family,
        checkpoint: Checkpoint,
        topology: Parallelism,
        strategies: Sequence[str | None],
        engine_args: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> list[Generation]:
        """The tokens of each strategy. Raises EngineFailedError."""
        name = self._folder_of(family, topology)
        engines = EngineSet(
            checkpoint.folder,
            topology,
            strategies=list(strategies),
            prompts=demo_prompts(),
            max_tokens=DEMO_MAX_TOKENS,
            folder=self._session.folder / name,
            caches=self._session.caches,
            stop_signals=self._session.stop_signals,
            engine_args=engine_args,
            environment=environment,
        )
        who = "vanilla vLLM" if None in strategies else f"{topology}, {len(strategies)} strategies"
        who = f"{who} with {environment or engine_args}" if environment or engine_args else who
        with self._session.show(f"{family.name}: {who}"), self._session.logs_kept(name), engines:
            engines.wait_until_ready()
            return [engines.generate() for _ in strategies]


def judge(
    generations: Sequence[Generation], vanilla: list[list[int]] | str, transformers: list[list[int]]
) -> tuple[str, str, dict[str, int]]:
    """The verdict, its reason, and the identical tokens by strategy.

    They are counted against transformers, if all strategies follow it, else against vanilla vLLM. `vanilla` has its tokens, or
    the reason why it failed.
    """
    follows = {str(each.strategy): count_identical(each.tokens, transformers) for each in generations}
    total = sum(map(len, transformers))
    others = [f"{each.strategy} ran as {ran}" for each in generations if (ran := _ran(each)) != {str(each.strategy)}]
    if others:
        return WRONG, "; ".join(others), follows
    is_right = set(follows.values()) == {total}
    if isinstance(vanilla, str):
        return (AS_TRANSFORMERS if is_right else WRONG), f"vanilla vLLM fails: {vanilla}", follows
    if is_right:
        same = vanilla == transformers
        return (
            (EQUAL, "", follows) if same else (AS_TRANSFORMERS, "vanilla vLLM on one rank gives other tokens", follows)
        )
    as_vanilla = {str(each.strategy): count_identical(each.tokens, vanilla) for each in generations}
    if set(as_vanilla.values()) == {total}:
        return AS_VANILLA, "vanilla vLLM on one rank gives these tokens too, transformers others", as_vanilla
    return WRONG, "other tokens than vanilla vLLM, and than transformers", as_vanilla


def cause_of(error: str) -> str:
    """The line of an engine's log that names the error: the first one of this package, else the last one of all."""
    named = [line for line in error.splitlines() if re.search(r"\w(Error|Exception)(: |\s*$)", line)]
    lines = [_one_line(line) for line in named if " WARNING " not in line]
    ours = [line for line in lines if "UnsupportedConfigError" in line]
    causes = [
        line
        for line in lines
        if not re.search(r"Engine core init|EngineDeadError|EngineFailedError|Worker failed with error", line)
    ]
    return (ours or causes[-1:] or lines[-1:] or [_one_line(error.splitlines()[0])])[0]


def _one_line(text: str) -> str:
    """The text without line ends and prefixes of a log, not longer than a table bears."""
    return re.sub(r"^(\(\w+[^)]*\) )?((ERROR|INFO|WARNING) \S+ \S+ \[[^]]*\] )?", "", " ".join(text.split()))[:300]


def _ran(generation: Generation) -> set[str]:
    return {str(worker["strategy"]) for worker in generation.counters}


def _row(
    family: Family, verdict: str, reason: str = "", identical: dict[str, int] | None = None, **facts: Any
) -> FamilyRow:
    return FamilyRow(
        family=family.name,
        architecture=family.architecture,
        verdict=verdict,
        reason=reason,
        identical=identical or {},
        **({"topology": ""} | facts),
    )
