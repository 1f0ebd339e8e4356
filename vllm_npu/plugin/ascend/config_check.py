"""Settings of vllm-ascend that were never run with our strategies. All are known before any process starts."""

from typing import TYPE_CHECKING

from vllm import envs
from vllm_ascend.ascend_config import get_ascend_config
from vllm_ascend.utils import enable_sp

from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin.engine_check import planned_shape
from vllm_npu.plugin.options import Mode, Options

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Some of them exist in one release line only.
OPTIONS = (
    "enable_fused_mc2",
    "enable_mc2_hierarchy_comm",
    "mc2_comm_alg",
    "combine_quant_mode",
    "multistream_overlap_gate",
    "mix_placement",
)


def check_settings(vllm_config: "VllmConfig", options: Options) -> None:
    """Raise UnsupportedConfigError that names every refused setting. vllm-ascend must have read its options."""
    ascend_config = get_ascend_config()
    refused = {f"additional_config {option}": bool(getattr(ascend_config, option, False)) for option in OPTIONS}
    refused |= {
        "the compiler pass for sequence parallelism": bool(ascend_config.enable_sp_by_pass),
        # It asks for the communication method of a step before the step is planned.
        "model runner V2 (VLLM_USE_V2_MODEL_RUNNER)": bool(envs.VLLM_USE_V2_MODEL_RUNNER),
        "shared experts under data parallelism without flashcomm1 (enable_shared_expert_dp)": bool(
            ascend_config.enable_shared_expert_dp
        )
        and not enable_sp(vllm_config),
        "LoRA adapters": vllm_config.lora_config is not None,
        "moe_comm=compare in graphs, which cannot hold its reads on the host; it needs --enforce-eager": bool(
            options.mode is Mode.COMPARE and planned_shape(vllm_config).graph_tokens
        ),
    }
    refuse([reason for reason, applies in refused.items() if applies])


def refuse(reasons: list[str]) -> None:
    """Raise UnsupportedConfigError that names the reasons, if there are any."""
    if reasons:
        raise UnsupportedConfigError(
            f"vllm_npu cannot replace vllm-ascend's MoE communication with: {'; '.join(reasons)}. Change that, or keep "
            'vllm-ascend\'s own communication: --additional-config \'{"vllm_npu": {"moe_comm": "off"}}\''
        )
