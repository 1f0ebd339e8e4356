"""Checks an engine before it starts: whether the device's limits allow its model, topology and steps."""

from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger

from vllm_npu.core.limits import DeviceLimits, MoELayer
from vllm_npu.envs import HCCL_BUFFSIZE
from vllm_npu.plugin.options import Mode, Options, topology_of
from vllm_npu.strategies.planning import facts_of_config
from vllm_npu.strategies.start_checks import PlannedShape, check_start

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.npu.plugin.engine_check")


def check_engine(vllm_config: "VllmConfig", options: Options, device: DeviceLimits) -> None:
    """Raise the errors of start_checks.check_start for an engine that the limits forbid. Runs before any process starts.

    The facts come from the model's config.json, as in `vllm-npu plan` and `doctor --model`. The same check runs again on the
    built layers, because config.json may lack some facts.
    """
    topology = topology_of(vllm_config.parallel_config)
    model_config = vllm_config.model_config
    if options.mode is Mode.OFF or model_config is None or not model_config.is_moe or topology.world_size == 1:
        return
    layer = configured_layer(vllm_config)
    if layer is None:
        logger.info(
            "The config.json of %s does not describe its MoE layers. They are checked when they are built.",
            model_config.model,
        )
        return
    check_start(
        options.moe_comm,
        topology,
        layer,
        device,
        shape=planned_shape(vllm_config),
        hccl_buffer_mb=HCCL_BUFFSIZE.read_whole_number(),
    )


def configured_layer(vllm_config: "VllmConfig") -> MoELayer | None:
    """An MoE layer of the model, redundant experts included. None if config.json does not describe it."""
    model_config, parallel_config = vllm_config.model_config, vllm_config.parallel_config
    facts = facts_of_config(model_config.hf_text_config.to_dict())
    if facts["topk"] is None or facts["hidden"] is None:
        return None
    redundant = int(parallel_config.eplb_config.num_redundant_experts) if parallel_config.enable_eplb else 0
    dtype: torch.dtype = model_config.dtype
    return MoELayer(
        num_experts=int(model_config.get_num_experts()) + redundant,
        top_k=int(facts["topk"]),
        hidden_size=int(facts["hidden"]),
        dtype=dtype,
    )


def planned_shape(vllm_config: "VllmConfig") -> PlannedShape:
    """The steps that the engine is configured for."""
    from vllm.config import (
        CUDAGraphMode,  # not at the top: vllm.config itself imports the platform, which imports this file
    )

    scheduler, compilation = vllm_config.scheduler_config, vllm_config.compilation_config
    speculative = vllm_config.speculative_config
    tokens_per_sequence = 1 + (speculative.num_speculative_tokens if speculative is not None else 0)
    graphs = compilation.cudagraph_mode not in (None, CUDAGraphMode.NONE)
    return PlannedShape(
        decode_tokens=min(scheduler.max_num_seqs * tokens_per_sequence, scheduler.max_num_batched_tokens),
        graph_tokens=tuple(compilation.cudagraph_capture_sizes or ()) if graphs else (),
    )
