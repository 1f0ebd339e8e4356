"""`vllm-npu demo --ascend-emulated`: every strategy over HTTP beside real vllm-ascend, on two emulated NPUs.

The reference is vllm-ascend's own MoE communication (moe_comm=off). Collectives and bytes are counted in the groups of this
package, on the workers of the first data-parallel rank. After allgather and naive, vllm-ascend adds the outputs over tp itself.
These collectives are not counted.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import entry_points, version
from typing import Any

from vllm_npu import envs
from vllm_npu.child_processes import changed_environment
from vllm_npu.emulator.launcher import emulated_devices
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin import entry_points as plugins
from vllm_npu.tools.demo.session import DemoSession, count_identical
from vllm_npu.tools.engines.engine_processes import Parallelism
from vllm_npu.tools.engines.http_engine import HttpEngine, Served
from vllm_npu.tools.engines.tiny_models import DEEPSEEK_V3, QWEN3_MOE, TinyModel, demo_prompts, write_tiny_model

OFF = "off"
AUTO = "auto"
HIDDEN_SIZE = 1024  # the least that MC2 takes on A3

TP2_EP = Parallelism(tensor_parallel_size=2, expert_parallel=True)
DP2_EP = Parallelism(data_parallel_size=2, expert_parallel=True)


def for_ascend(model: TinyModel, seed: int, name: str | None = None, **config: Any) -> TinyModel:
    """The family with a hidden size that MC2 takes. scripts/tiny_model_seeds.py finds seeds whose tokens survive rounding."""
    wide = {**model.config, "hidden_size": HIDDEN_SIZE, **config}
    return replace(model, family=name or model.family, seed=seed, config=wide)


# routed_scaling_factor is 1: in float16 vLLM applies it in its own layer, and vllm-ascend's layer would apply it again.
MODELS = (
    for_ascend(QWEN3_MOE, seed=7327),
    for_ascend(DEEPSEEK_V3, seed=1089, routed_scaling_factor=1.0),
)
# 26 experts for each rank on two A2, where MC2 takes 24 at most.
MANY_EXPERTS = for_ascend(QWEN3_MOE, 359, "qwen3-moe-52", num_experts=52, moe_intermediate_size=32)
QWEN3_MOE_INT8 = for_ascend(QWEN3_MOE, 5113, "qwen3-moe-w8a8", num_hidden_layers=2)
# Models with int4 experts, by write_tiny_model's name of the format. tests/ascend runs them; their seeds hold for FEWER_TOKENS.
INT4_EXPERTS = {
    "W4A8": for_ascend(QWEN3_MOE, 125, "qwen3-moe-w4a8", num_hidden_layers=2),
    "W4A16": for_ascend(QWEN3_MOE, 39, "qwen3-moe-w4a16", num_hidden_layers=2),
}
# 48 tokens. The chosen seeds hold for them: each token leads by 0.03 nats or more, and stays the same if each layer's output is
# wrong by 0.0015 of a row. Batches over HTTP differ from run to run, so that more tokens would come too near to a tie.
MAX_TOKENS = (10, 4, 8, 5, 6, 3, 8, 4)
# 24 tokens, with the same property. For the W8A8 model, the output of an MLP may be wrong by 0.003 of a row.
FEWER_TOKENS = (5, 2, 4, 3, 3, 2, 3, 2)
SAFE_MARGIN = 0.015  # nats; a smaller margin of the reference is a problem


def in_words(chip: str, model: str, topology: str, graph_mode: str | None) -> str:
    """What runs where, for people."""
    return f"{chip} {model} {topology}{'' if graph_mode is None else f' {graph_mode}'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedServers:
    """One model on one pair of chips: one server with moe_comm=off, and one that runs the strategies."""

    chip: str
    model: TinyModel
    parallelism: Parallelism
    int8: bool = False  # W8A8 with a scale for each token: vllm-ascend's quantization="ascend"
    graph_mode: str | None = None  # vLLM's cudagraph_mode, with a server for each strategy; None: eager
    max_tokens: Sequence[int] = MAX_TOKENS  # one for each prompt

    @property
    def dtype(self) -> str:
        """dtype of hidden states. MC2's ops do not take float32, and int8 matrix products do not take float16 scales."""
        return "bfloat16" if self.int8 else "float16"

    def __str__(self) -> str:
        return in_words(self.chip, self.model.family, str(self.parallelism), self.graph_mode)


DECODE_GRAPHS, ALL_GRAPHS = "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"
IN_GRAPHS = {"all2all": "allgather"}  # what a captured step takes in place of a strategy: strategies.select
QUICK_PLAN = (
    *(PlannedServers(chip="A3", model=MODELS[0], parallelism=each) for each in (TP2_EP, DP2_EP)),
    PlannedServers(chip="A3", model=MODELS[0], parallelism=DP2_EP, graph_mode=DECODE_GRAPHS),
)
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
    *(
        PlannedServers(chip=chip, model=model, parallelism=parallelism, graph_mode=mode)
        for chip, model, parallelism, mode in (
            ("A3", MODELS[0], DP2_EP, DECODE_GRAPHS),
            ("A3", MODELS[0], TP2_EP, ALL_GRAPHS),
            ("A3", MODELS[1], DP2_EP, DECODE_GRAPHS),
            ("A2", MODELS[0], TP2_EP, DECODE_GRAPHS),
        )
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedRow:
    """One strategy on one pair of chips, against the reference."""

    chip: str
    model: str
    topology: str
    graph_mode: str | None  # vLLM's cudagraph_mode; None: eager
    strategy: str  # the requested one; "off": vllm-ascend alone, the reference
    not_legal: str | None = None  # why the strategy cannot run here; then nothing ran
    ran: list[str]  # strategies of the last step, which the workers report
    tokens_identical: int
    tokens_total: int
    collectives_per_moe_layer: float | None  # calls of one rank in one MoE layer
    bytes_per_moe_layer: float | None  # sent by one rank in one call of an MoE layer
    smallest_margin: float | None  # nats; measured for the reference only
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether all tokens are those of the eager reference. A strategy that is not legal passes."""
        return self.not_legal is not None or self.tokens_identical == self.tokens_total > 0

    @property
    def is_reference(self) -> bool:
        """Whether this row's tokens are the ones that the others are compared with."""
        return self.strategy == OFF and self.graph_mode is None

    @property
    def problems(self) -> list[str]:
        """One sentence for each fault of this row."""
        where = f"{in_words(self.chip, self.model, self.topology, self.graph_mode)} {self.strategy}"
        found = []
        if not self.passed:
            found.append(f"{where}: {self.tokens_total - self.tokens_identical} of {self.tokens_total} tokens differ")
        if self.is_reference and (self.smallest_margin is None or self.smallest_margin < SAFE_MARGIN):
            found.append(
                f"{where}: the reference came within {self.smallest_margin} of a tie, so its tokens prove little"
            )
        expected = self.strategy if self.graph_mode is None else IN_GRAPHS.get(self.strategy, self.strategy)
        if self.strategy not in (OFF, AUTO) and self.not_legal is None and self.ran != [expected]:
            found.append(f"{where}: the workers ran {self.ran}; their logs (--logs) give the reason")
        return found


def require_vllm_ascend() -> None:
    """Raise UnsupportedConfigError unless vllm-ascend, torch_npu and this project's plugin are installed."""
    if not plugins.vllm_ascend_is_installed() or not entry_points(group=plugins.PLATFORMS, name=plugins.PLUGIN_NAME):
        raise UnsupportedConfigError(
            "vllm-ascend, torch_npu or vllm_npu is not installed here; scripts/demo.sh --ascend-emulated uses an environment "
            "that has all three"
        )


class AscendDemo:
    """The servers of one run of the demo: one after another."""

    def __init__(self, session: DemoSession) -> None:
        self._session = session
        self._references: dict[str, Served] = {}  # by what runs where
        self.rows: list[ServedRow] = []

    def execute(self, plan: Sequence[PlannedServers]) -> None:
        """Run `plan` and fill `rows`, which keep what was found before an error. Raises EngineFailedError, Interrupted."""
        for planned in plan:
            model_folder = self._session.folder / planned.model.family
            if not model_folder.exists():
                write_tiny_model(planned.model, model_folder, quantised="W8A8" if planned.int8 else None)
            reference = self._reference(replace(planned, graph_mode=None))
            if planned.graph_mode is None:
                self._run_strategies(planned, reference)
            else:
                self._run_graphs(planned, reference)

    @property
    def problems(self) -> list[str]:
        """One sentence for each fault."""
        return [problem for row in self.rows for problem in row.problems]

    @property
    def facts(self) -> dict[str, Any]:
        """The results, for --json."""
        return {
            "versions": {name: version(name) for name in ("vllm-ascend", "torch-npu", "torch")},
            "rows": [asdict(row) | {"passed": row.passed} for row in self.rows],
        }

    def _reference(self, eager: PlannedServers) -> Served:
        """What vllm-ascend alone generates eagerly. Servers with graphs share it with those without, so it runs once."""
        if str(eager) not in self._references:
            with self._server(eager, OFF) as server:
                with self._session.show(f"{eager}: starting vllm-ascend alone"):
                    server.wait_until_ready()
                with self._session.show(f"{eager}: generating with moe_comm=off"):
                    reference = server.generate(demo_prompts(), eager.max_tokens, measure_margin=True)
            self.rows.append(_row(eager, OFF, reference, reference, []))
            self._references[str(eager)] = reference
        return self._references[str(eager)]

    def _run_strategies(self, planned: PlannedServers, reference: Served) -> None:
        from vllm_npu.strategies.table import STRATEGIES

        with self._server(planned, AUTO) as server:
            with self._session.show(f"{planned}: starting vllm_npu on vllm-ascend"):
                server.wait_until_ready()
            server.take_counters()
            for strategy in (*STRATEGIES, AUTO):
                if self._is_refused(planned, strategy, reference):
                    continue
                with self._session.show(f"{planned}: generating with {strategy}"):
                    server.set_moe_comm(strategy)
                    server.take_counters()
                    served = server.generate(demo_prompts(), planned.max_tokens)
                    self.rows.append(_row(planned, strategy, served, reference, server.take_counters()))

    def _run_graphs(self, planned: PlannedServers, reference: Served) -> None:
        """A server for each strategy: graphs keep the strategy that they were captured with."""
        from vllm_npu.strategies.table import STRATEGIES

        for strategy in (OFF, *STRATEGIES, AUTO):
            if self._is_refused(planned, strategy, reference):
                continue
            with self._server(planned, strategy) as server:
                with self._session.show(f"{planned}: capturing with moe_comm={strategy}"):
                    server.wait_until_ready()
                with self._session.show(f"{planned}: generating with moe_comm={strategy}"):
                    if strategy != OFF:
                        server.take_counters()
                    served = server.generate(demo_prompts(), planned.max_tokens)
                    counters = server.take_counters() if strategy != OFF else []
            self.rows.append(_row(planned, strategy, served, reference, counters))

    def _is_refused(self, planned: PlannedServers, strategy: str, reference: Served) -> bool:
        """Whether the strategy cannot run here. Its row then has the reason."""
        reason = _why_not(strategy, planned)
        if reason is not None:
            nothing = Served(tokens=[], seconds=0.0, smallest_margin=None)
            self.rows.append(_row(planned, strategy, nothing, reference, [], reason))
        return reason is not None

    @contextmanager
    def _server(self, planned: PlannedServers, moe_comm: str) -> Iterator[HttpEngine]:
        """A server on emulated devices of the planned chip."""
        with emulated_server(
            self._session,
            f"{planned} {moe_comm}",
            planned.model,
            planned.parallelism,
            *(("--quantization", "ascend") if planned.int8 else ()),
            chip=planned.chip,
            moe_comm=moe_comm,
            dtype=planned.dtype,
            graph_mode=planned.graph_mode,
        ) as server:
            yield server


@contextmanager
def emulated_server(
    session: DemoSession,
    name: str,
    model: TinyModel,  # its checkpoint is in the session's folder
    parallelism: Parallelism,
    *options: str,
    chip: str,
    environment: Mapping[str, str] | None = None,
    **engine: Any,  # for HttpEngine
) -> Iterator[HttpEngine]:
    """A server of vllm-ascend on emulated devices, one for each rank."""
    name = name.replace(" ", "-").replace("×", "").lower()
    num_devices = parallelism.tensor_parallel_size * parallelism.data_parallel_size
    with changed_environment({envs.EMULATOR_SOC.name: chip}), emulated_devices(num_devices):
        server = HttpEngine(
            session.folder / model.family,
            parallelism,
            *options,
            plugins=plugins.without(plugins.ASCEND_PLATFORM).partition("=")[2],
            folder=session.folder / name,
            caches=session.caches,
            stop_signals=session.stop_signals,
            environment={
                **(environment or {}),
                "OMP_NUM_THREADS": "1",
                envs.EMULATOR_MEMORY_GB.name: "4",
                # torch 2.13 keeps compiled graphs of its own compiler only; vllm-ascend 0.23 was made for torch 2.10.
                "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
                # vllm-ascend's all-gather multiplies rows of other ranks' experts by 0, and NaN would stay NaN.
                envs.EMULATOR_UNDEFINED.name: "zero",
            },
            **engine,
        )
        with session.logs_kept(name), server:
            yield server


def _why_not(strategy: str, planned: PlannedServers) -> str | None:
    """Why the strategy cannot run this model on this chip; None: it can. The engine decides by the same function."""
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
    return None if strategy in (OFF, AUTO) else why_not(strategy, topology, layer, DEVICES[planned.chip])


def _row(
    planned: PlannedServers,
    strategy: str,
    served: Served,
    reference: Served,
    counters: list[dict[str, Any]],
    not_legal: str | None = None,
) -> ServedRow:
    layer_calls = sum(worker["moe_layer_calls"] for worker in counters)
    calls = sum(sum(worker["calls"].values()) for worker in counters)
    return ServedRow(
        chip=planned.chip,
        model=planned.model.family,
        topology=str(planned.parallelism),
        graph_mode=planned.graph_mode,
        strategy=strategy,
        not_legal=not_legal,
        ran=sorted({str(worker["strategy"]) for worker in counters}),
        tokens_identical=count_identical(served.tokens, reference.tokens),
        tokens_total=sum(map(len, reference.tokens)),
        collectives_per_moe_layer=calls / layer_calls if layer_calls else None,
        bytes_per_moe_layer=sum(worker["bytes_sent"] for worker in counters) / layer_calls if layer_calls else None,
        smallest_margin=served.smallest_margin,
        seconds=served.seconds,
    )
