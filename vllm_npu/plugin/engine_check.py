"""Checks an engine before it starts: whether the device's limits allow its model, topology and steps."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger

from vllm_npu.core.expert_limits import ExpertsWanted
from vllm_npu.core.limits import DeviceLimits, MoELayer, QuantMode
from vllm_npu.core.model_facts import QUANTISATION, ModelFacts
from vllm_npu.core.topology import ExpertPlacement
from vllm_npu.envs import HCCL_BUFFSIZE
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin.options import Mode, Options, topology_of
from vllm_npu.strategies.start_checks import PlannedShape, check_choice, check_experts, check_start

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.npu.plugin.engine_check")


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedExperts:
    """Experts of a layer beside the routed ones that config.json counts."""

    shared: int = 0  # placed as routed ones: every token goes to each of them
    redundant: int = 0


def check_engine(
    vllm_config: "VllmConfig",
    options: Options,
    device: DeviceLimits,
    added: AddedExperts | None = None,  # None: the redundant experts of vLLM's own EPLB
) -> None:
    """Raise UnsupportedConfigError, and the errors of start_checks.check_start, for an engine that cannot work. Runs before any
    process starts.

    `vllm-npu plan` and `doctor --model` call the same checks. What config.json leaves open is checked on the built layers.
    """
    topology = topology_of(vllm_config.parallel_config)
    model_config = vllm_config.model_config
    if options.mode is Mode.OFF or model_config is None or not model_config.is_moe:
        return
    facts = model_facts(vllm_config)
    check_choice(facts.top_k, facts.num_experts)
    if topology.world_size == 1:
        return
    check_experts(ExpertsWanted(model=facts, lora=adapters_on_experts(vllm_config)), topology, device)
    added = AddedExperts(redundant=redundant_experts(vllm_config)) if added is None else added
    layer = configured_layer(vllm_config, facts, added)
    if layer is None:
        num_experts = int(model_config.get_num_experts()) + added.shared + added.redundant
        ExpertPlacement(device.places(num_experts, topology.ep_size), topology.ep_size)
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


def check_routing(vllm_config: "VllmConfig") -> None:
    """Raise UnsupportedConfigError for tokens that choose more experts than the model has. Runs before any process starts."""
    model_config = vllm_config.model_config
    if model_config is not None and model_config.is_moe:
        facts = model_facts(vllm_config)
        check_choice(facts.top_k, facts.num_experts)


def model_facts(vllm_config: "VllmConfig") -> ModelFacts:
    """The facts of vLLM's own reading of config.json, with the method that --quantization names.

    --quantization-config may leave experts out, so its method is no fact.
    """
    model_config = vllm_config.model_config
    detailed = getattr(model_config, "quantization_config", None) is not None  # vLLM 0.23 does not have it
    whole = model_config.hf_config.to_dict()
    config = model_config.hf_text_config.to_dict()
    config |= {key: whole[key] for key in QUANTISATION if whole.get(key) is not None}
    try:
        facts = ModelFacts.of_config(config, {} if detailed else {"quant_method": model_config.quantization})
    except UnsupportedConfigError as error:
        logger.info("The config.json of %s is not understood: %s", model_config.model, error)
        return ModelFacts(num_experts=int(model_config.get_num_experts()))
    return replace(facts, num_experts=int(model_config.get_num_experts()))


def configured_layer(vllm_config: "VllmConfig", facts: ModelFacts, added: AddedExperts) -> MoELayer | None:
    """An MoE layer of the model, the added experts included. None if config.json does not describe it."""
    if facts.num_experts is None or facts.top_k is None or facts.hidden_size is None:
        return None
    dtype: torch.dtype = vllm_config.model_config.dtype
    return MoELayer(
        num_experts=facts.num_experts + added.shared + added.redundant,
        top_k=facts.top_k + added.shared,
        hidden_size=facts.hidden_size,
        dtype=dtype,
        # vllm-ascend's own quantisation. Which layers have it, and whether it is W8A8, the built layers say.
        quant_mode=QuantMode.INT8_PER_TOKEN if vllm_config.model_config.quantization == "ascend" else QuantMode.NONE,
    )


def redundant_experts(vllm_config: "VllmConfig") -> int:
    """The redundant experts of a layer that vLLM's own EPLB adds."""
    parallel_config = vllm_config.parallel_config
    return int(parallel_config.eplb_config.num_redundant_experts) if parallel_config.enable_eplb else 0


def adapters_on_experts(vllm_config: "VllmConfig") -> bool:
    """Whether vLLM makes room for LoRA adapters in the experts. --lora-target-modules may keep them to other layers."""
    lora_config = vllm_config.lora_config
    targets = None if lora_config is None else lora_config.target_modules
    return lora_config is not None and (targets is None or any("experts" in target for target in targets))


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
