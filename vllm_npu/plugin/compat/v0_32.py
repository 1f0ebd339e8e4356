"""vLLM 0.32, which vllm_npu supports on CPUs."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import VllmConfig, parallel
from vllm.distributed.eplb import eplb_state
from vllm.distributed.parallel_state import GroupCoordinator, get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.runner.moe_runner_interface import MoERunnerInterface
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.models.interfaces import get_mixture_of_experts_model
from vllm.utils import cpu_resource_utils
from vllm.v1.worker.ubatching import dbo_current_ubatch_id

from vllm_npu.core.limits import PORTABLE, DeviceLimits
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin.cpu.tensor_parallel import TensorParallelTransport
from vllm_npu.plugin.eplb_communicators import create_eplb_communicator
from vllm_npu.plugin.layer_facts import LayerFacts, exchanges_tokens
from vllm_npu.transport.base import Transport
from vllm_npu.transport.gloo import GlooTransport

logger = init_logger("vllm.npu.plugin.compat.v0_32")


def moe_layers(vllm_config: VllmConfig) -> tuple[list[LayerFacts], list[str]]:
    """The MoE layers that this process has built, in order of construction.

    Returns the facts of the layers whose tokens vllm_npu moves, and the class names of the layers that are not vllm_npu's.
    Raises UnsupportedConfigError for a layer of another class that holds our experts: only our runner can use them.
    """
    from vllm_npu.plugin.cpu.experts import CpuUnquantizedFusedMoEMethod
    from vllm_npu.plugin.cpu.moe_runner import CpuMoERunner

    static = vllm_config.compilation_config.static_forward_context
    layers = [layer for layer in static.values() if isinstance(layer, MoERunnerInterface)]
    ours = [layer.facts for layer in layers if isinstance(layer, CpuMoERunner) and layer.exchanges_tokens]
    foreign = [layer for layer in layers if not isinstance(layer, CpuMoERunner)]
    for layer in foreign:
        method = layer._quant_method
        if isinstance(method, CpuUnquantizedFusedMoEMethod) and exchanges_tokens(method.moe):
            raise UnsupportedConfigError(
                f"{layer.layer_name}: this model brings its own MoE layer, {type(layer).__qualname__} of "
                f"{type(layer).__module__}, which vllm_npu cannot replace; run it without expert and data parallelism"
            )
    return ours, [type(layer).__name__ for layer in foreign]


def transports(
    tp: GroupCoordinator, dp: GroupCoordinator, ep: GroupCoordinator
) -> tuple[Transport, Transport, Transport]:
    """vLLM's three groups as transports over gloo. vLLM's shared memory adds up within TP."""
    return TensorParallelTransport(tp), GlooTransport(dp.device_group, "dp"), GlooTransport(ep.device_group, "ep")


def device_limits(
    vllm_config: VllmConfig, layers: list[LayerFacts], topology: ParallelTopology, moe_comm: str
) -> DeviceLimits:
    """The limits of a CPU, which no layer changes."""
    return PORTABLE


def unagreed_tokens(vllm_config: VllmConfig) -> None:
    """None: data-parallel ranks agree on the token counts of each step."""


def cpus_of_nodes() -> dict[int, list[int]]:
    """The CPUs of each NUMA node that this process may use, as vLLM's automatic thread binding finds them."""
    nodes: dict[int, list[int]] = {node: [] for node in cpu_resource_utils.get_visible_memory_node()}
    allowed = cpu_resource_utils.get_allowed_cpu_list()
    for cpu in allowed:
        if cpu.numa_node in nodes:
            nodes[cpu.numa_node].append(cpu.id)
    nodes = {node: cpus for node, cpus in nodes.items() if cpus}
    if nodes:
        return nodes
    # The kernel names no node for these CPUs. vLLM's worker then takes the first node that it sees.
    first = min(cpu_resource_utils.get_visible_memory_node(), default=0)
    return {first: [cpu.id for cpu in allowed] or sorted(os.sched_getaffinity(0))}


def one_memory_limit(nodes: set[int]) -> bool:
    """Whether a limit of the container lies below the memory of these nodes together. vLLM compares it with each node alone."""
    limit = cpu_resource_utils.get_cgroup_memory_limit()
    if limit is None:
        return False
    return limit < sum(cpu_resource_utils.get_memory_node_info(node).total_memory for node in nodes)


def micro_batch() -> int:
    """Index of the micro-batch that the calling thread works on."""
    index: int = dbo_current_ubatch_id()
    return index


WORKER = "vllm_npu.plugin.cpu.worker.CpuMoEWorker"
DEFAULT_WORKERS = ("auto", "vllm.v1.worker.cpu_worker.CPUWorker", WORKER)


def set_worker(vllm_config: VllmConfig, *, retries: bool) -> None:
    """Choose the worker class that starts EPLB, calls keep_rows_whole, makes room for pipeline stages and survives a failed
    step, if the engine needs one of them.

    Raises UnsupportedConfigError if EPLB or fault_tolerance=retry is on and the user chose another class. Without them, the
    user's class stays, and sequence parallelism is off.
    """
    parallel_config = vllm_config.parallel_config
    has_stages = parallel_config.pipeline_parallel_size > 1
    needed = parallel_config.enable_eplb or parallel_config.use_sequence_parallel_moe or has_stages or retries
    if not needed:
        return
    if parallel_config.worker_cls in DEFAULT_WORKERS:
        parallel_config.worker_cls = WORKER
        return
    if parallel_config.enable_eplb:
        raise UnsupportedConfigError(
            f"EPLB on a CPU is started by {WORKER}, and --worker-cls names {parallel_config.worker_cls}; leave it out"
        )
    if retries:
        raise UnsupportedConfigError(
            f"fault_tolerance=retry runs in {WORKER}, and --worker-cls names {parallel_config.worker_cls}; leave it out"
        )
    if not parallel_config.use_sequence_parallel_moe:
        return
    logger.warning(
        "Sequence parallelism is off: %s makes it right for every model, and --worker-cls names %s.",
        WORKER,
        parallel_config.worker_cls,
    )
    # vLLM derives sequence parallelism from the name of its all2all backend. The backend itself runs nothing here. vLLM's CPU
    # communicator knows the name "naive", and that name does not turn sequence parallelism on.
    parallel_config.all2all_backend = "naive"


# COMPAT(vllm 0.32): DeepseekV2DecoderLayer compares row counts to find out whether its input is a TP rank's slice or the whole
# step. In a step of one token both have one row, so the ranks after the first continue with their padding row. CAN REMOVE when
# the layer knows its layout.
def keep_rows_whole(model_runner: Any) -> None:  # CPUModelRunner, its model loaded
    """Make layers that guess the layout of their input always get and return the whole step. LOCAL.

    The MoE block inside such a layer still slices its tokens over TP, as vLLM itself does it with pipeline parallelism.
    """
    from vllm.model_executor.models.deepseek_v2 import (
        DeepseekV2DecoderLayer,  # not at the top: slow, and for workers only
    )

    drafter = getattr(model_runner, "drafter", None) or getattr(model_runner, "speculator", None)
    changed = 0
    for model in (model_runner.model, getattr(drafter, "model", None)):
        for layer in model.modules() if isinstance(model, torch.nn.Module) else ():
            if isinstance(layer, DeepseekV2DecoderLayer) and layer.use_sequence_parallel_moe:
                layer.use_sequence_parallel_moe = False
                layer.self_attn.o_proj.reduce_results = True
                changed += 1
    if changed:
        logger.info(
            "%d decoder layers keep whole rows between them, because they would guess how rows are sliced", changed
        )


# COMPAT(vllm 0.32): a runner makes room for the rows of the pipeline stage before it in its profile run, which a CPU leaves out
# in eager mode. Its first step then ends in a bare AssertionError. CAN REMOVE when the runner makes room in its first step.
def make_room_for_earlier_stage(model_runner: Any) -> None:  # CPUModelRunner, its model loaded
    """Allocate what this pipeline stage receives in a step: [max_num_batched_tokens, hidden_size] and the residual. LOCAL."""
    if not get_pp_group().is_first_rank and model_runner.intermediate_tensors is None:
        model_runner.intermediate_tensors = model_runner.model.make_empty_intermediate_tensors(
            batch_size=model_runner.max_num_tokens,
            dtype=model_runner.model_config.dtype,
            device=model_runner.device,
        )


def register_out_of_tree(base: Any, replacement: type) -> None:
    """Make vLLM build `replacement` wherever it would build `base`. A second call with the same class does nothing.

    Raises ValueError if another plugin has already replaced `base`.
    """
    registered = op_registry_oot.get(base.__name__)
    if registered is replacement:
        return
    if registered is not None:
        raise ValueError(
            f"{registered.__module__}.{registered.__qualname__} already replaces vLLM's {base.__name__}; load only one of "
            "the two plugins (VLLM_PLUGINS names those to load)"
        )
    base.register_oot(replacement)


# COMPAT(vllm 0.32): the kernel of rotary embeddings for CPUs takes the stride of heads for that of tokens if heads have a
# dimension of their own. Only latent attention without scaling calls it so. It then turns other numbers, and tokens depend on
# the other requests of a step. CAN REMOVE when tests/vllm/test_rotary.py says so.
def mend_rotary_embeddings() -> None:
    """Hand vLLM's kernel rows [num_tokens, num_heads * head_size]. A second call changes nothing."""
    RotaryEmbedding.forward_cpu = rotate


vllms_rotation = RotaryEmbedding.forward_cpu


def rotate(
    self: RotaryEmbedding, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """RotaryEmbedding.forward_cpu, for [num_tokens, num_heads, head_size] too. LOCAL. Host sync: no."""
    turned_query, turned_key = vllms_rotation(
        self, positions, _with_heads_joined(query), None if key is None else _with_heads_joined(key)
    )
    return turned_query.view(query.shape), None if key is None else turned_key.view(key.shape)


def _with_heads_joined(rows: torch.Tensor) -> torch.Tensor:
    return rows.flatten(1) if rows.dim() == 3 else rows


# --- EPLB ---
#
# COMPAT(vllm 0.32): vLLM balances experts on CUDA, ROCm and XPU only. Four things are in the way on a CPU, and all are changed
# below: ParallelConfig refuses EPLB, the communicators lack CPUs, CPUModelRunner does not set EPLB up, and a rearrangement is
# timed with events of the device. CAN REMOVE when vLLM asks the platform for each of them.


def open_eplb() -> None:
    """Make vLLM accept --enable-eplb on this platform, and use our communicators. A second call changes nothing."""
    if not isinstance(parallel.current_platform, _BalancesExperts):
        parallel.current_platform = _BalancesExperts(parallel.current_platform)
    eplb_state.create_eplb_communicator = create_eplb_communicator


class _BalancesExperts:
    """The platform as vLLM's ParallelConfig sees it. ParallelConfig calls is_cuda_alike() only to check for EPLB."""

    def __init__(self, platform: Any) -> None:
        self._platform = platform

    def is_cuda_alike(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)


@contextmanager
def unmovable_experts_explained() -> Iterator[None]:
    """Add the remedy to vLLM's error about a quantisation whose weights cannot move. Use it around building the model."""
    try:
        yield
    except NotImplementedError as error:
        if "EPLB" not in str(error):
            raise
        raise UnsupportedConfigError(
            f"{error} Weights in that format cannot move from rank to rank; serve an unquantised checkpoint, or leave out "
            "--enable-eplb and --eplb-config"
        ) from error


def start_eplb(model_runner: Any) -> None:  # CPUModelRunner, its model loaded
    """Give the runner the EPLB state that GPUModelRunner.load_model creates. LOCAL. vLLM's runner takes the EPLB steps itself.

    Raises UnsupportedConfigError for models whose experts vLLM cannot balance.
    """
    model = get_mixture_of_experts_model(model_runner.model)
    if model is None:
        raise UnsupportedConfigError(
            f"{type(model_runner.model).__name__} is no MixtureOfExperts of vLLM, so its experts cannot be balanced; leave out "
            "--enable-eplb and --eplb-config"
        )
    if get_mixture_of_experts_model(getattr(getattr(model_runner, "drafter", None), "model", None)) is not None:
        raise UnsupportedConfigError(
            "EPLB on a CPU does not balance a draft model with experts; leave out --enable-eplb, or choose another draft model"
        )
    model_runner.eplb_state = HostEplbState(model_runner.parallel_config, model_runner.device)
    model_runner.eplb_state.add_model(model, model_runner.model_config)
    model_runner._moe_model = model


class HostEplbState(eplb_state.EplbState):
    """Counts its rearrangements, times them by the host's clock, and renumbers the load counted before each of them."""

    rearrangements = 0

    def rearrange(self, is_profile: bool = False, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Rearrange the experts as vLLM does. COLLECTIVE over ep."""
        before = [state.physical_to_logical_map.clone() for state in self.model_states.values()]
        with _events_of_the_host():
            result: torch.Tensor | None = super().rearrange(is_profile, *args, **kwargs)
        self.rearrangements += not is_profile
        for state, placement in zip(self.model_states.values(), before, strict=True):
            _renumber_load(state, placement)
        return result


# COMPAT(vllm 0.32): the window counts the load of physical experts, and rearrange() reads all of it by the present placement.
# So steps from before the last move count for the wrong experts. Such steps exist on a rank that was idle since, or if the
# window is longer than the interval. CAN REMOVE when vLLM's window counts logical experts, or is emptied by a move.
def _renumber_load(
    state: Any,
    before: torch.Tensor,  # [layers, physical experts], the logical expert in each place before the move
) -> None:
    """Move each logical expert's load to the place of its first replica."""
    window = state.expert_load_window  # [steps, layers, physical experts]
    logical = window.new_zeros(*window.shape[:2], state.logical_replica_count.shape[1])
    logical.scatter_add_(2, before.expand_as(window), window)
    first_replica = state.logical_to_physical_map[None, :, :, 0].expand_as(logical)
    window.zero_().scatter_(2, first_replica, logical)


@contextmanager
def _events_of_the_host() -> Iterator[None]:
    theirs = torch.Event
    torch.Event = _HostEvent  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        torch.Event = theirs  # type: ignore[misc]


class _HostEvent:
    """Replaces torch.Event, which a CPU does not have, by the host's clock."""

    def __init__(self, **_: Any) -> None:
        self._seconds = 0.0

    def record(self) -> None:
        self._seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "_HostEvent") -> float:
        """Milliseconds from this event to `end`."""
        return 1e3 * (end._seconds - self._seconds)


def eplb_report(model_runner: Any) -> dict[str, int] | None:
    """Rearrangements since the last call, and experts that this rank received in them. None if EPLB is off."""
    state = model_runner.eplb_state
    if state is None:
        return None
    communicators = [each.communicator for each in state.model_states.values()]
    report = {
        "rearrangements": state.rearrangements,
        "experts_received": sum(communicator.experts_received for communicator in communicators),
    }
    state.rearrangements = 0
    for communicator in communicators:
        communicator.experts_received = 0
    return report
