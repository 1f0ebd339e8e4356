"""`vllm-npu demo --ascend-emulated`: every strategy over HTTP beside real vllm-ascend, on two emulated NPUs, token by token
against vllm-ascend's own MoE communication.

Collectives and bytes are those of our groups, on the first data-parallel rank's workers: after allgather and naive vllm-ascend
adds over tp itself, which is not counted."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from vllm_npu import envs
from vllm_npu.emulator.launcher import emulated_devices
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin import entry_points as plugins
from vllm_npu.tools.engines.engine_processes import Parallelism
from vllm_npu.tools.engines.http_engine import HttpEngine, Served
from vllm_npu.tools.engines.stop_signals import StopSignals
from vllm_npu.tools.engines.tiny_models import DEEPSEEK_V3, QWEN3_MOE, TinyModel, demo_prompts, write_tiny_model

if TYPE_CHECKING:
    from vllm_npu.cli.demo import Stage

OFF = "off"
AUTO = "auto"
HIDDEN_SIZE = 1024  # the least that MC2 takes on A3
NUM_DEVICES = 2

TP2_EP = Parallelism(tensor_parallel_size=2, expert_parallel=True)
DP2_EP = Parallelism(data_parallel_size=2, expert_parallel=True)


def for_ascend(model: TinyModel, seed: int, name: str | None = None, **config: Any) -> TinyModel:
    """A family as wide as MC2 asks for. The seed is one of scripts/tiny_model_seeds.py: tokens survive rounding."""
    wide = {**model.config, "hidden_size": HIDDEN_SIZE, **config}
    return replace(model, family=name or model.family, seed=seed, config=wide)


# In float16 vLLM leaves routed_scaling_factor to its own layer, and vllm-ascend's layer applies it again: so 1 here.
MODELS = (
    for_ascend(QWEN3_MOE, seed=7327),
    for_ascend(DEEPSEEK_V3, seed=1089, routed_scaling_factor=1.0),
)
# More experts than MC2 takes on two A2: 26 a rank, and 24 are the most.
MANY_EXPERTS = for_ascend(QWEN3_MOE, 359, "qwen3-moe-52", num_experts=52, moe_intermediate_size=32)
QWEN3_MOE_INT8 = for_ascend(QWEN3_MOE, 5113, "qwen3-moe-w8a8", num_hidden_layers=2)
# 48 tokens, of which none is chosen by less than 0.03 nats over the next one, nor changes where each layer's output is off
# by 0.0015 of a row. Over HTTP batches differ from run to run: with more tokens a tie would be near.
MAX_TOKENS = (10, 4, 8, 5, 6, 3, 8, 4)
# 24 tokens, of which the same holds; the W8A8 model's may have MLPs that are off by 0.003 of a row.
FEWER_TOKENS = (5, 2, 4, 3, 3, 2, 3, 2)
SAFE_MARGIN = 0.015  # nats; the reference must not come closer to a tie


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedServers:
    """One model on one pair of chips: a server with moe_comm=off, and one that goes through the strategies."""

    chip: str
    model: TinyModel
    parallelism: Parallelism
    int8: bool = False  # W8A8 with a scale for each token, as vllm-ascend's quantization="ascend" has it
    max_tokens: Sequence[int] = MAX_TOKENS  # of each prompt

    @property
    def dtype(self) -> str:
        """MC2's ops take no float32, and matmuls of int8 no float16 scales."""
        return "bfloat16" if self.int8 else "float16"

    def __str__(self) -> str:
        return f"{self.chip} {self.model.family} {self.parallelism}"


QUICK_PLAN = tuple(PlannedServers(chip="A3", model=MODELS[0], parallelism=each) for each in (TP2_EP, DP2_EP))
FULL_PLAN = (
    *(
        PlannedServers(chip=chip, model=model, parallelism=parallelism)
        for chip in ("A3", "A2")
        for model in MODELS
        for parallelism in (TP2_EP, DP2_EP)
    ),
    *(
        PlannedServers(chip=chip, model=QWEN3_MOE_INT8, parallelism=parallelism, int8=True, max_tokens=FEWER_TOKENS)
        for chip, parallelism in (("A3", TP2_EP), ("A3", DP2_EP), ("A2", DP2_EP))
    ),
    PlannedServers(chip="A2", model=MANY_EXPERTS, parallelism=DP2_EP, max_tokens=FEWER_TOKENS),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One strategy on one pair of chips."""

    chip: str
    model: str
    topology: str
    strategy: str  # as asked; "off": vllm-ascend alone, the reference
    not_legal: str | None = None  # why it cannot run there; then nothing ran
    ran: list[str]  # strategies of the last step, as the workers say
    tokens_identical: int
    tokens_total: int
    collectives_per_moe_layer: float | None  # calls of one rank in one MoE layer
    bytes_per_moe_layer: float | None  # sent by one rank in one call of an MoE layer
    smallest_margin: float | None
    seconds: float

    @property
    def passed(self) -> bool:
        """The reference, a strategy that is not legal, or one whose every token is the reference's."""
        return self.strategy == OFF or self.not_legal is not None or self.tokens_identical == self.tokens_total > 0


def require_vllm_ascend() -> None:
    """Raise UnsupportedConfigError unless vllm-ascend, torch_npu and this project's plugin are installed."""
    if not plugins.vllm_ascend_is_installed() or not entry_points(group=plugins.PLATFORMS, name=plugins.PLUGIN_NAME):
        raise UnsupportedConfigError(
            "vllm-ascend, torch_npu or vllm_npu is not installed here; scripts/demo.sh --ascend-emulated uses an environment "
            "that has all three"
        )


class AscendDemo:
    """The servers of one run of the demo, one after the other."""

    def __init__(self, *, folder: Path, log_folder: Path | None, stage: "Stage", stop_signals: StopSignals) -> None:
        self._folder = folder
        self._log_folder = log_folder
        self._stage = stage
        self._stop_signals = stop_signals

    def execute(self, plan: Sequence[PlannedServers], rows: list[Row]) -> None:
        """Run `plan`, filling `rows`. Raises EngineFailedError, Interrupted."""
        for planned in plan:
            model_folder = self._folder / planned.model.family
            if not model_folder.exists():
                write_tiny_model(planned.model, model_folder, int8=planned.int8)
            with self._server(planned, OFF) as server:
                with self._stage.show(f"{planned}: starting vllm-ascend alone"):
                    server.wait_until_ready()
                with self._stage.show(f"{planned}: generating with moe_comm=off"):
                    reference = server.generate(demo_prompts(), planned.max_tokens, measure_margin=True)
            rows.append(_row(planned, OFF, reference, reference, []))
            self._strategies(planned, reference, rows)

    def _strategies(self, planned: PlannedServers, reference: Served, rows: list[Row]) -> None:
        with self._server(planned, AUTO) as server:
            with self._stage.show(f"{planned}: starting vllm_npu on vllm-ascend"):
                server.wait_until_ready()
            server.take_counters()
            for strategy in (*_strategies(), AUTO):
                reason = _why_not(strategy, planned)
                if reason is not None:
                    rows.append(
                        _row(
                            planned,
                            strategy,
                            Served(tokens=[], seconds=0.0, smallest_margin=None),
                            reference,
                            [],
                            reason,
                        )
                    )
                    continue
                with self._stage.show(f"{planned}: generating with {strategy}"):
                    server.set_moe_comm(strategy)
                    server.take_counters()
                    served = server.generate(demo_prompts(), planned.max_tokens)
                    rows.append(_row(planned, strategy, served, reference, server.take_counters()))

    @contextmanager
    def _server(self, planned: PlannedServers, moe_comm: str) -> Iterator[HttpEngine]:
        """A server on emulated devices of the planned chip."""
        name = f"{planned} {moe_comm}".replace(" ", "-").replace("×", "").lower()
        with chip(planned.chip), emulated_devices(NUM_DEVICES):
            server = HttpEngine(
                self._folder / planned.model.family,
                planned.parallelism,
                *(("--quantization", "ascend") if planned.int8 else ()),
                plugins=plugins.without(plugins.ASCEND_PLATFORM).partition("=")[2],
                moe_comm=moe_comm,
                dtype=planned.dtype,
                folder=self._folder / name,
                caches=self._folder / "caches",
                stop_signals=self._stop_signals,
                environment={
                    "OMP_NUM_THREADS": "1",
                    envs.EMULATOR_MEMORY_GB.name: "4",
                    # vllm-ascend's all-gather reads rows of other ranks' experts, times 0.
                    envs.EMULATOR_UNDEFINED.name: "zero",
                },
            )
            try:
                with server:
                    yield server
            finally:
                if self._log_folder is not None:
                    self._log_folder.mkdir(parents=True, exist_ok=True)
                    if server.log.exists():
                        (self._log_folder / f"{name}.log").write_bytes(server.log.read_bytes())


@contextmanager
def chip(name: str) -> Iterator[None]:
    """Emulated devices inside the block pass for this chip."""
    before = os.environ.get(envs.EMULATOR_SOC.name)
    os.environ[envs.EMULATOR_SOC.name] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[envs.EMULATOR_SOC.name]
        else:
            os.environ[envs.EMULATOR_SOC.name] = before


def _strategies() -> tuple[str, ...]:
    from vllm_npu.strategies.table import STRATEGIES

    return tuple(STRATEGIES)


def _why_not(strategy: str, planned: PlannedServers) -> str | None:
    """Why the chip cannot run this model so, from the table that the engine itself checks; None: it can."""
    import torch

    from vllm_npu.core.limits import DEVICES, MoELayer
    from vllm_npu.core.topology import ParallelTopology
    from vllm_npu.strategies.select import why_not

    layer = MoELayer(
        num_experts=planned.model.num_experts,
        top_k=int(planned.model.config["num_experts_per_tok"]),
        hidden_size=HIDDEN_SIZE,
        dtype=getattr(torch, planned.dtype),
    )
    topology = ParallelTopology.of_rank(
        0, tp_size=planned.parallelism.tensor_parallel_size, dp_size=planned.parallelism.data_parallel_size
    )
    return None if strategy == AUTO else why_not(strategy, topology, layer, DEVICES[planned.chip])


def _row(
    planned: PlannedServers,
    strategy: str,
    served: Served,
    reference: Served,
    counters: list[dict[str, Any]],
    not_legal: str | None = None,
) -> Row:
    layer_calls = sum(worker["moe_layer_calls"] for worker in counters)
    calls = sum(sum(worker["calls"].values()) for worker in counters)
    pairs = [
        (got, want)
        for got_tokens, want_tokens in zip(served.tokens, reference.tokens, strict=False)
        for got, want in zip(got_tokens, want_tokens, strict=False)
    ]
    return Row(
        chip=planned.chip,
        model=planned.model.family,
        topology=str(planned.parallelism),
        strategy=strategy,
        not_legal=not_legal,
        ran=sorted({str(worker["strategy"]) for worker in counters}),
        tokens_identical=sum(got == want for got, want in pairs),
        tokens_total=sum(map(len, reference.tokens)),
        collectives_per_moe_layer=calls / layer_calls if layer_calls else None,
        bytes_per_moe_layer=sum(worker["bytes_sent"] for worker in counters) / layer_calls if layer_calls else None,
        smallest_margin=served.smallest_margin,
        seconds=served.seconds,
    )


def results_table(rows: Sequence[Row]) -> Table:
    """One row a strategy, grouped by chip, model and topology."""
    table = Table(
        title="Greedy tokens over HTTP against vllm-ascend's own path, on emulated NPUs", title_justify="left"
    )
    for header in ("chip", "model", "topology", "strategy"):
        table.add_column(header, no_wrap=True)
    for header in ("tokens\nidentical", "collectives\nper MoE layer", "bytes sent\nper MoE layer", "seconds"):
        table.add_column(header, justify="right")
    previous = None
    for row in rows:
        group = row.chip, row.model, row.topology
        if previous not in (None, group):
            table.add_section()
        previous = group
        if row.not_legal is not None:
            table.add_row(*group, row.strategy, f"not legal: {row.not_legal}", "–", "–", "–")
            continue
        identical = "reference" if row.strategy == OFF else f"{row.tokens_identical}/{row.tokens_total}"
        counted = row.collectives_per_moe_layer is not None and row.bytes_per_moe_layer is not None
        table.add_row(
            *group,
            "vllm-ascend (off)" if row.strategy == OFF else row.strategy,
            identical,
            f"{row.collectives_per_moe_layer:.1f}" if counted else "–",
            f"{row.bytes_per_moe_layer:,.0f}" if counted else "–",
            f"{row.seconds:.1f}",
            style=None if row.passed else "red",
        )
    return table


def problems(rows: Sequence[Row]) -> list[str]:
    """What is wrong, in words."""
    found = []
    for row in rows:
        where = f"{row.chip} {row.model} {row.topology} {row.strategy}"
        if not row.passed:
            found.append(f"{where}: {row.tokens_total - row.tokens_identical} of {row.tokens_total} tokens differ")
        if row.strategy == OFF and (row.smallest_margin is None or row.smallest_margin < SAFE_MARGIN):
            found.append(
                f"{where}: the reference came within {row.smallest_margin} of a tie, so its tokens prove little"
            )
        if row.strategy not in (OFF, AUTO) and row.not_legal is None and row.ran != [row.strategy]:
            found.append(f"{where}: the workers ran {row.ran}; their logs (--logs) give the reason")
    return found


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows, for --json."""
    return [asdict(row) | {"passed": row.passed} for row in rows]


def versions() -> dict[str, str]:
    """Of what was run."""
    return {name: version(name) for name in ("vllm-ascend", "torch-npu", "torch")}
