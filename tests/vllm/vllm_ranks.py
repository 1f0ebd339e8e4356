"""Four processes with vLLM inside, as ranks of any grid, for tests of the plugin that need ranks but no engine.

The processes live for a whole test session. They are forks of multiprocessing's fork server, which imports vLLM once.
A grid of two ranks exists twice, because vLLM makes independent replicas of a grid that is smaller than the world. Both must
give what the test expects.
"""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.time_limits import PATIENCE_SECONDS
from vllm_npu import envs
from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.core.token_layout import TokenSlice
from vllm_npu.envs import SOCKET_FOLDER
from vllm_npu.plugin.groups import model_groups
from vllm_npu.tools.engines.engine_processes import folder_for_sockets
from vllm_npu.tools.engines.process_tree import SHARED_MEMORY_FOLDER
from vllm_npu.tools.launch import ProcessRankPool, Rank

if TYPE_CHECKING:
    from vllm.config import VllmConfig

NUM_RANKS = 4
IMPORTED_ONCE = (
    "vllm.config",
    "vllm.distributed",
    "vllm.model_executor.layers.fused_moe",
    "vllm.model_executor.models.deepseek_v2",
)
NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 8, 2, 32, 128  # vLLM's CPU experts want multiples of 32 on each rank


@dataclass(frozen=True)
class Grid:
    """The sizes of vLLM's groups, and the place of one rank in them."""

    tp: int
    dp: int
    ep: bool = True
    rank: int = 0

    @property
    def size(self) -> int:
        return self.tp * self.dp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp

    def on(self, process: int) -> "Grid":
        """The grid with the rank of this process. Processes past `size` form the next replica."""
        return Grid(self.tp, self.dp, self.ep, process % self.size)

    def __str__(self) -> str:
        return f"TP{self.tp}xDP{self.dp}{'xEP' if self.ep else ''}"


TP2, DP2, TP2_DP2, TP4, DP4 = Grid(2, 1), Grid(1, 2), Grid(2, 2), Grid(4, 1), Grid(1, 4)


class VllmRanks:
    """The processes, started by the first run. A run that fails ends them, because collectives may be half done."""

    def __init__(self) -> None:
        self._pool = ProcessRankPool(NUM_RANKS, timeout=PATIENCE_SECONDS, start_method="forkserver")
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # exists while the processes do

    def run(self, function: Callable[..., Any], grid: Grid, *args: Any) -> list[Any]:
        """Run function(grid, *args) on every process; `grid` has the process's rank. Returns the results in process order."""
        return self.run_on_pool(_run_in_grid, function, grid, args)

    def run_on_pool(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run function(rank, *args) on every process, in whatever groups vLLM has there. Returns as RankPool.run does."""
        try:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="vllm-npu-", dir=folder_for_sockets())
                self._pool.run(_take_environment, self._environment())
            return self._pool.run(function, *args)
        except BaseException:
            self.close()
            raise

    def _environment(self) -> dict[str, str]:
        """This process's environment now, which may differ from the fork server's, and the names of vLLM's own files."""
        assert self._folder is not None
        folder = self._folder.name
        return dict(os.environ) | {SOCKET_FOLDER: folder, "VLLM_DIST_IDENT": Path(folder).name}

    def close(self) -> None:
        """End the processes. Remove the sockets and the shared memory that vLLM leaves."""
        self._pool.close()
        if self._folder is not None:
            for file in SHARED_MEMORY_FOLDER.glob(f"{Path(self._folder.name).name}-*"):
                file.unlink()
            self._folder.cleanup()
            self._folder = None


_RANKS = pytest.StashKey[VllmRanks]()


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> VllmRanks:
    """All modules that import this fixture share the same processes."""
    stash = request.config.stash
    if _RANKS not in stash:
        multiprocessing.set_forkserver_preload([*IMPORTED_ONCE])
        stash[_RANKS] = VllmRanks()
        request.config.add_cleanup(stash[_RANKS].close)
    return stash[_RANKS]


# ------------------------------------------------------------------------------------------ in a rank's process

_open_grid: Grid | None = None


def _take_environment(rank: Rank, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def _run_in_grid(rank: Rank, function: Callable[..., Any], grid: Grid, args: tuple[Any, ...]) -> Any:
    try:
        _open(grid, rank.rank)
        before = _own_variables()
        result = function(grid.on(rank.rank), *args)
        assert _own_variables() == before, f"{function.__name__} leaves variables to the tests after it"
        return result
    except Exception as error:
        error.add_note(f"in process {rank.rank} of {grid}:\n{traceback.format_exc()}")
        raise


def _own_variables() -> dict[str, str]:
    """The environment variables that this package reads, but for those that vLLM's configuration sets for this process."""
    names = {variable.name for variable in envs.VARIABLES} | {envs.PROMETHEUS_FOLDER, SOCKET_FOLDER}
    return {name: value for name, value in os.environ.items() if name in names}


def _open(grid: Grid, process: int) -> None:
    """Let vLLM make its groups for `grid`, unless the run before had the same grid."""
    global _open_grid
    if grid == _open_grid:
        return
    os.environ["VLLM_NPU_COUNT_COLLECTIVES"] = "1"
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    parallel_state.destroy_model_parallel()
    ranks_per_engine = NUM_RANKS // grid.dp
    with set_current_vllm_config(make_config(grid.on(process))):
        parallel_state.init_distributed_environment(
            ranks_per_engine, process % ranks_per_engine, local_rank=process, backend="gloo"
        )
        parallel_state.initialize_model_parallel(grid.tp, backend="gloo")
    _open_grid = grid


def make_config(grid: Grid, *, redundant_experts: int = 0, **options: str) -> "VllmConfig":
    """vLLM's configuration of this rank, without a model. `options` are the plugin's. Redundant experts turn EPLB on."""
    from vllm.config import CompilationConfig, CompilationMode, ParallelConfig, VllmConfig
    from vllm.config.parallel import EPLBConfig

    return VllmConfig(
        parallel_config=ParallelConfig(
            tensor_parallel_size=grid.tp,
            data_parallel_size=grid.dp,
            data_parallel_rank=grid.dp_rank,
            enable_expert_parallel=grid.ep,
            enable_eplb=redundant_experts > 0,
            eplb_config=EPLBConfig(num_redundant_experts=redundant_experts, use_async=False),
        ),
        compilation_config=CompilationConfig(mode=CompilationMode.NONE),
        additional_config={"vllm_npu": options},
    )


@dataclass(frozen=True)
class Weights:
    """A layer's whole weights, as a checkpoint holds them and as the dense computation uses them."""

    gate: torch.Tensor  # [num_experts, intermediate, hidden]
    up: torch.Tensor  # [num_experts, intermediate, hidden]
    down: torch.Tensor  # [num_experts, hidden, intermediate]
    shared_gate: torch.Tensor  # [intermediate, hidden]
    shared_up: torch.Tensor
    shared_down: torch.Tensor  # [hidden, intermediate]

    @classmethod
    def random(cls, dtype: torch.dtype, num_experts: int = NUM_EXPERTS) -> "Weights":
        """The same on all ranks. A unit input gives about a unit output."""
        generator = torch.Generator().manual_seed(11)

        def draw(*shape: int) -> torch.Tensor:
            return (torch.randn(shape, generator=generator) * 1.5 * shape[-1] ** -0.5).to(dtype)

        wide, narrow = (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
        return cls(
            draw(num_experts, *wide),
            draw(num_experts, *wide),
            draw(num_experts, *narrow),
            draw(*wide),
            draw(*wide),
            draw(*narrow),
        )


def build_layer(
    grid: Grid,
    config: "VllmConfig",
    *,
    dtype: torch.dtype = torch.float32,
    shared: bool = False,
    num_experts: int = NUM_EXPERTS,
    sequence_parallel: bool = False,
    **options: Any,
) -> Any:
    """An MoE layer as vLLM's models build it, loaded from Weights.random by vLLM's own loaders. LOCAL."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory
    from vllm.model_executor.models.deepseek_v2 import DeepseekV2MLP
    from vllm.utils.torch_utils import set_default_torch_dtype

    weights = Weights.random(dtype, num_experts)
    shared_experts = None
    with set_current_vllm_config(config), set_default_torch_dtype(dtype):
        if shared:
            shared_experts = DeepseekV2MLP(
                HIDDEN,
                INTERMEDIATE,
                "silu",
                reduce_results=False,
                is_sequence_parallel=sequence_parallel,
                prefix="model.layers.0.mlp.shared_experts",
            )
        layer = FusedMoEFactory(
            **{
                "num_experts": num_experts,
                "top_k": TOP_K,
                "hidden_size": HIDDEN,
                "intermediate_size": INTERMEDIATE,
                "params_dtype": dtype,
                "prefix": "model.layers.0.mlp.experts",
                "is_sequence_parallel": sequence_parallel,
                "shared_experts": shared_experts,
                **options,
            }
        )
    for parameter in layer.parameters():
        parameter.data.fill_(float("nan"))
    loaded = layer.load_weights(
        (f"{expert}.{name}_proj.weight", getattr(weights, name)[expert])
        for expert in range(num_experts)
        for name in ("gate", "up", "down")
    )
    assert set(loaded) == {"routed_experts.w13_weight", "routed_experts.w2_weight"}
    if shared_experts is not None:
        gate_up, down = shared_experts.gate_up_proj.weight, shared_experts.down_proj.weight
        gate_up.weight_loader(gate_up, weights.shared_gate, 0)
        gate_up.weight_loader(gate_up, weights.shared_up, 1)
        down.weight_loader(down, weights.shared_down)
    for module in layer.modules():
        if (method := getattr(module, "quant_method", None)) is not None:
            method.process_weights_after_loading(module)
    return layer


@contextmanager
def vllm_step(grid: Grid, config: "VllmConfig", counts: Sequence[int]) -> Iterator[None]:
    """Open a step as vLLM's runner does. Our platform plans it if the configuration has MoE layers. COLLECTIVE."""
    from vllm.forward_context import set_forward_context

    across_dp = torch.tensor(counts, dtype=torch.int32)
    with set_forward_context(None, config, num_tokens=counts[grid.dp_rank], num_tokens_across_dp=across_dp):
        yield


@contextmanager
def counted_steps(folder: str) -> Iterator[Callable[[], dict[tuple[str, ...], float]]]:
    """Have the steps inside counted, as VLLM_NPU_METRICS=1 does. Yields a function that tells what each series gained.

    The series belong to the process, so steps of earlier tests are in them.
    """
    from prometheus_client import REGISTRY

    def totals() -> dict[tuple[str, ...], float]:
        return {
            (sample.name.removeprefix("vllm_npu:moe_"), *(sample.labels[key] for key in sorted(sample.labels))): sample.value
            for family in REGISTRY.collect()
            for sample in family.samples
            if sample.name.startswith("vllm_npu:") and sample.name.endswith("_total")
        }  # fmt: skip

    before = totals()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VLLM_NPU_METRICS", "1")
        patched.setenv("PROMETHEUS_MULTIPROC_DIR", folder)
        yield lambda: {name: gained for name, total in totals().items() if (gained := total - before.get(name, 0))}


@contextmanager
def planned_step(
    config: "VllmConfig", counts: Sequence[int], sharding: TokenSharding, strategy: str = "allgather"
) -> Iterator[None]:
    """Open a step that is planned by hand, for code outside of MoE layers. LOCAL."""
    from vllm.forward_context import create_forward_context, override_forward_context

    from vllm_npu.plugin.forward_context import PlannedStep, as_additional_context

    groups = model_groups(expert_parallel=bool(config.parallel_config.enable_expert_parallel))
    plan = StepPlan(num_tokens_across_dp=tuple(counts), sharding=sharding)
    step = PlannedStep(plan, strategy, groups, confirm=lambda: None)
    with override_forward_context(create_forward_context(None, config, additional_kwargs=as_additional_context(step))):
        yield


def own_slice(grid: Grid, tokens: torch.Tensor, padding: float = float("nan")) -> torch.Tensor:
    """This TP rank's slice of its DP rank's tokens [n, ...] under sequence parallelism.

    Rows past the last token hold `padding`, which must not reach any output.
    """
    rows = -(-tokens.shape[0] // grid.tp)
    own = TokenSlice.chunk(tokens.shape[0], rank=grid.tp_rank, size=grid.tp).take(tokens)
    return torch.cat([own, tokens.new_full((rows - own.shape[0], *tokens.shape[1:]), padding)])


def integers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Integers from -8 to 8: sums of some of them are exact in any floating-point type."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tokens_across_dp(seed: int, counts: Sequence[int], width: int) -> list[torch.Tensor]:
    """[count, width] integers for each DP rank. One seed makes them all, so every rank has the same."""
    return list(integers(seed, sum(counts), width).split(list(counts)))


def seconds_until_error(call: Callable[[], Any]) -> tuple[float, Exception]:
    """Seconds until `call` raised, and its error."""
    started = time.monotonic()
    try:
        call()
    except Exception as error:  # noqa: BLE001 - the test looks at it
        return time.monotonic() - started, error
    raise AssertionError(f"{call} did not raise")
