"""vllm-ascend's worker, whose model's MoE layers communicate by our strategies once it is loaded."""

from typing import Any

from vllm.logger import init_logger
from vllm_ascend.worker.worker import NPUWorker

from vllm_npu.plugin import compat
from vllm_npu.plugin.ascend.comm_method import PipelineCommMethod
from vllm_npu.plugin.ascend.comparison import Comparison
from vllm_npu.plugin.groups import model_groups
from vllm_npu.plugin.options import Mode, Options
from vllm_npu.plugin.step_planner import planned_step, planner_of

logger = init_logger("vllm.npu.worker")


class MoECommWorker(NPUWorker):
    """Adds one moment to vllm-ascend's worker: after the model is built and before it runs for the first time."""

    comparison: Comparison | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load, then check and take over. Raises the errors of start_checks and of what cannot be taken over."""
        super().load_model(*args, **kwargs)
        planner = planner_of(self.vllm_config)
        if planner is None:
            return
        release = compat.current()
        release.check_supported(self.vllm_config)
        if planner.may_take("mc2"):
            _ = model_groups(expert_parallel=True).ep.name_for_ops  # an error now rather than in the first step
        if Options.of(self.vllm_config).mode is Mode.COMPARE:
            self.comparison = Comparison()
            self.comparison.attach(self.vllm_config)
        else:
            release.replace_comm_methods(PipelineCommMethod)
            release.replace_choice(planned_step)
        logger.info_once("vllm_npu moves tokens around vllm-ascend's experts: %s", planner.describe())
