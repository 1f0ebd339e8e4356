"""Settings of vllm-ascend: those that were never run with our strategies, and those that add experts to a layer.

All are known before any process starts.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from vllm import __version__ as vllm_version
from vllm import envs
from vllm_ascend import ascend_config as ascend_options
from vllm_ascend.ascend_config import get_ascend_config

from vllm_npu.core.ascend_recipes import (
    COMBINE_QUANT_MODE,
    FUSED_MC2,
    FUSED_MC2_VALUES,
    HIERARCHY_COMM,
    MAX_FUSED_ROWS,
    MC2_ALGORITHM,
    RANDOM_EPLB_POLICY,
    RANDOM_EPLB_RANKS,
    FusedMC2Asked,
    MC2Asked,
    fused_mc2_asked,
    mc2_asked,
)
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin.engine_check import AddedExperts, adapters_on_experts, planned_shape, redundant_experts
from vllm_npu.plugin.options import Mode, Options, topology_of
from vllm_npu.plugin.release_lines import release_line

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def check_settings(vllm_config: "VllmConfig", options: Options) -> None:
    """Raise UnsupportedConfigError that names every refused setting. vllm-ascend must have read its options."""
    ascend_config = get_ascend_config()
    refused = {
        f"additional_config {FUSED_MC2}, which is none of {FUSED_MC2_VALUES}": ascend_config.enable_fused_mc2
        not in FUSED_MC2_VALUES,
        # vllm-ascend 0.30 runs it for 2 where its package is installed, and the operators of 1 elsewhere.
        f"additional_config {FUSED_MC2}: 2 with CANN's MegaMoe (the Python package cann_ops_transformer), never run here; use "
        "1": _runs_mega_moe(),
        "the compiler pass for sequence parallelism": bool(ascend_config.enable_sp_by_pass),
        # It asks for the communication method of a step before the step is planned.
        "model runner V2 (VLLM_USE_V2_MODEL_RUNNER)": bool(envs.VLLM_USE_V2_MODEL_RUNNER),
        # In vllm-ascend 0.23, only layers with W8A8 send tokens to shared experts among the routed ones. 0.30 alone ends while
        # it builds DeepSeek-V3 with the option: its AscendGateLinear has no allow_cublas_router_gemm.
        f"mix_placement with quantization={vllm_config.model_config.quantization} (it needs vllm-ascend 0.23 and W8A8)": bool(
            getattr(ascend_config, "mix_placement", False)
        )
        and (release_line(vllm_version) != "0.23" or vllm_config.model_config.quantization != "ascend"),
        f"eplb_policy_type {RANDOM_EPLB_POLICY}, which exchanges experts of ranks 1 and 3, on fewer ranks": bool(
            ascend_config.eplb_config.dynamic_eplb
            and ascend_config.eplb_config.eplb_policy_type == RANDOM_EPLB_POLICY
            and topology_of(vllm_config.parallel_config).ep_size < RANDOM_EPLB_RANKS
        ),
        # vLLM's router computes them itself and gives their ids the weight 0. Both lines of vllm-ascend replace this router by
        # one that sends tokens to them by ids behind those of the experts.
        "zero experts (zero_expert_num), which vllm-ascend alone routes to as to experts with weights": bool(
            getattr(vllm_config.model_config.hf_text_config, "zero_expert_num", 0)
        ),
        # Each data-parallel rank numbers its adapters itself, and vllm-ascend's experts would take another rank's number for
        # their own.
        "LoRA adapters on experts with data parallelism (--lora-target-modules may keep them to other layers)": bool(
            adapters_on_experts(vllm_config) and topology_of(vllm_config.parallel_config).dp_size > 1
        ),
        # Neither their exchange nor ours fits a graph: the adapters of rows depend on counts that the host reads.
        "LoRA adapters on experts in graphs; it needs --enforce-eager": bool(
            adapters_on_experts(vllm_config) and planned_shape(vllm_config).graph_tokens
        ),
        "moe_comm=compare in graphs, which cannot hold its reads on the host; it needs --enforce-eager": bool(
            options.mode is Mode.COMPARE and planned_shape(vllm_config).graph_tokens
        ),
    }
    refuse([reason for reason, applies in refused.items() if applies])


def _runs_mega_moe() -> bool:
    """Whether vllm-ascend 0.30 runs CANN's MegaMoe. It must have read its options. 0.23 does not know it."""
    is_supported = getattr(ascend_options, "is_mega_moe_supported", None)
    return is_supported is not None and bool(is_supported())


def asked_fused_mc2() -> FusedMC2Asked | None:
    """The fused operator that vllm-ascend was asked for. None: it prepares no weights for one.

    vllm-ascend must have read its options. It also reads an environment variable on 0.23. On 0.30 it keeps 1 for 2, and turns
    the option off for some models.
    """
    ascend_config = get_ascend_config()
    options = {name: getattr(ascend_config, name) for name in (FUSED_MC2, MAX_FUSED_ROWS)}
    return fused_mc2_asked(options, release_line(vllm_version))


def asked_mc2() -> MC2Asked:
    """What vllm-ascend was asked of MC2's ops. It must have read its options."""
    ascend_config = get_ascend_config()
    options = {name: getattr(ascend_config, name, None) for name in (MC2_ALGORITHM, HIERARCHY_COMM, COMBINE_QUANT_MODE)}
    return mc2_asked(options, release_line(vllm_version))


def added_experts(vllm_config: "VllmConfig") -> AddedExperts:
    """The experts that vllm-ascend adds to each layer, as its init_eplb_config counts them.

    Raises UnsupportedConfigError for an expert map without a placement of the first layer.
    """
    ascend_config, model_config = get_ascend_config(), vllm_config.model_config
    eplb_config, ep_size = ascend_config.eplb_config, topology_of(vllm_config.parallel_config).ep_size
    of_vllm = redundant_experts(vllm_config)
    if model_config is None or ep_size == 1:
        return AddedExperts(redundant=of_vllm)
    mixes = bool(getattr(ascend_config, "mix_placement", False))
    shared = int(getattr(model_config.hf_text_config, "n_shared_experts", 0) or 0) if mixes else 0
    if eplb_config.expert_map_path:
        redundant = _places_in(Path(eplb_config.expert_map_path)) - int(model_config.get_num_experts()) - shared
    elif eplb_config.dynamic_eplb:
        # Each rank then has a shared expert of its own.
        redundant = int(eplb_config.num_redundant_experts) + (ep_size - 1 if mixes else 0)
    else:
        redundant = 0
    # vllm-ascend 0.30 takes the number from vLLM's EPLB, and its own option may say the same.
    return AddedExperts(shared=shared, redundant=max(redundant, of_vllm))


def _places_in(expert_map: Path) -> int:
    """The places for experts on all ranks, in the first layer of vllm-ascend's expert map."""
    try:
        content = json.loads(expert_map.read_text(encoding="utf-8"))
        return sum(len(device["device_expert"]) for device in content["layer_list"][0]["device_list"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UnsupportedConfigError(
            f"additional_config eplb_config expert_map_path: {expert_map} has no layer_list[0].device_list[...].device_expert; "
            "name a map that vllm-ascend has recorded (expert_map_record_path)"
        ) from error


def refuse(reasons: list[str]) -> None:
    """Raise UnsupportedConfigError that names the reasons, if there are any."""
    if reasons:
        raise UnsupportedConfigError(
            f"vllm_npu cannot replace vllm-ascend's MoE communication with: {'; '.join(reasons)}. Change that, or keep "
            'vllm-ascend\'s own communication: --additional-config \'{"vllm_npu": {"moe_comm": "off"}}\''
        )
