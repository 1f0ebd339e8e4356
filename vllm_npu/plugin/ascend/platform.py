"""vllm-ascend's platform, with a worker of ours and a plan for every step."""

from typing import TYPE_CHECKING, Any

from vllm_ascend.platform import NPUPlatform
from vllm_ascend.utils import get_ascend_device_type

from vllm_npu.core.limits import DEVICES
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin import options
from vllm_npu.plugin.engine_check import check_engine
from vllm_npu.plugin.options import Mode, Options

if TYPE_CHECKING:
    from vllm.config import VllmConfig

THEIR_WORKER = "vllm_ascend.worker.worker.NPUWorker"
OUR_WORKER = "vllm_npu.plugin.ascend.worker.MoECommWorker"


class AscendMoEPlatform(NPUPlatform):
    """Everything is vllm-ascend's but the worker's class and the step's plan. With moe_comm=off, these too."""

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Our checks, then vllm-ascend's. Raises UnsupportedConfigError."""
        options.check_config(vllm_config, beside_vllm_ascend=True)
        super().check_and_update_config(vllm_config)
        check_engine(vllm_config, DEVICES[get_ascend_device_type().name.strip("_")])
        parallel_config = vllm_config.parallel_config
        if Options.of(vllm_config).mode is Mode.OFF or parallel_config.worker_cls == OUR_WORKER:
            return
        if vllm_config.model_config is None or not vllm_config.model_config.is_moe:
            return
        if parallel_config.worker_cls != THEIR_WORKER:
            raise UnsupportedConfigError(
                f"vllm_npu takes over {THEIR_WORKER} only, and this engine has worker_cls={parallel_config.worker_cls}; "
                'leave vllm-ascend alone: --additional-config \'{"vllm_npu": {"moe_comm": "off"}}\''
            )
        parallel_config.worker_cls = OUR_WORKER
        if not parallel_config.worker_extension_cls:
            parallel_config.worker_extension_cls = "vllm_npu.plugin.worker_extension.MoECommWorkerExtension"

    @classmethod
    def set_additional_forward_context(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """vLLM calls it once a step: plan the step for our MoE layers. COLLECTIVE where the model has some."""
        planned: dict[str, Any] = {}
        if Options.of(kwargs["vllm_config"]).mode is not Mode.OFF:
            from vllm_npu.plugin.step_planner import plan_step

            planned = plan_step(**kwargs)
        return {**super().set_additional_forward_context(*args, **kwargs), **planned}
