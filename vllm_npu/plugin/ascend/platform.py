"""vllm-ascend's platform with our worker, and with a plan for each step."""

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_ascend.platform import NPUPlatform
from vllm_ascend.utils import get_ascend_device_type

from vllm_npu.core.limits import DEVICES
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin.ascend.config_check import added_experts, asked_fused_mc2, asked_mc2, check_settings
from vllm_npu.plugin.compat.ascend_options import hide_our_section
from vllm_npu.plugin.engine_check import check_engine
from vllm_npu.plugin.options import Mode, check_config, topology_of
from vllm_npu.strategies.start_checks import check_chip

if TYPE_CHECKING:
    from vllm.config import VllmConfig

THEIR_EXECUTOR = "vllm_ascend.patch.platform.patch_multiproc_executor"  # they import it for dynamic EPLB alone
THEIR_WORKER = "vllm_ascend.worker.worker.NPUWorker"
OUR_WORKER = "vllm_npu.plugin.ascend.worker.AscendMoEWorker"

hide_our_section()  # every process of vLLM imports this file before vllm-ascend reads its options


class AscendMoEPlatform(NPUPlatform):
    """Changes two things in vllm-ascend's platform: the class of the worker, and the plan of each step. With dynamic EPLB, also
    the end of the workers.

    With moe_comm=off it changes nothing.
    """

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Run our checks and vllm-ascend's, and choose the worker. Raises UnsupportedConfigError, and the errors of
        start_checks.check_start."""
        if getattr(vllm_config.device_config, "device_type", cls.device_type) != cls.device_type:
            super().check_and_update_config(
                vllm_config
            )  # no engine on NPUs; vllm-ascend 0.30 then reads none of its options
            return
        options = check_config(vllm_config, beside_vllm_ascend=True)
        super().check_and_update_config(vllm_config)
        if vllm_config.model_config is None:  # no engine; vllm-ascend 0.30 then reads none of its options
            return
        parallel_config = vllm_config.parallel_config
        topology = topology_of(parallel_config)
        device = replace(DEVICES[get_ascend_device_type().name.strip("_")], fused_mc2_asked=asked_fused_mc2())
        if options.mode is not Mode.OFF and vllm_config.model_config.is_moe:
            check_chip(topology, device)
            device = device.with_mc2(asked_mc2()) if topology.ep_size > 1 else device
        check_engine(vllm_config, options, device, added_experts(vllm_config))
        if options.mode is Mode.OFF or parallel_config.worker_cls == OUR_WORKER:
            return
        if not vllm_config.model_config.is_moe:
            return
        if topology.ep_size > 1 or topology.dp_size > 1:
            check_settings(vllm_config, options)
        elif parallel_config.worker_cls != THEIR_WORKER:
            return  # no token leaves its rank: there is nothing to move, whatever the worker is
        if parallel_config.worker_cls != THEIR_WORKER:
            raise UnsupportedConfigError(
                f"vllm_npu replaces only {THEIR_WORKER}, and this engine has worker_cls={parallel_config.worker_cls}; keep "
                'vllm-ascend\'s own communication: --additional-config \'{"vllm_npu": {"moe_comm": "off"}}\''
            )
        if THEIR_EXECUTOR in sys.modules:
            from vllm_npu.plugin.compat.ascend_executor import end_workers_with_the_engine

            end_workers_with_the_engine()
        parallel_config.worker_cls = OUR_WORKER
        if not parallel_config.worker_extension_cls:
            parallel_config.worker_extension_cls = "vllm_npu.plugin.worker_extension.MoECommWorkerExtension"

    @classmethod
    def set_additional_forward_context(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Plan the step for our MoE layers. vLLM calls this once a step. COLLECTIVE if the model has MoE layers of ours."""
        from vllm_npu.plugin.step_planner import plan_step

        return {**super().set_additional_forward_context(*args, **kwargs), **plan_step(**kwargs)}
