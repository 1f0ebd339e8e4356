"""vllm-ascend's worker, whose model's MoE layers communicate by our strategies once it is loaded."""

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm_ascend.worker.worker import NPUWorker

from vllm_npu.plugin import compat
from vllm_npu.plugin.ascend.comm_method import PipelineCommMethod
from vllm_npu.plugin.ascend.comparison import Comparison
from vllm_npu.plugin.groups import model_groups
from vllm_npu.plugin.options import Mode, Options
from vllm_npu.plugin.step_planner import planned_step, planner_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.npu.worker")


class MoECommWorker(NPUWorker):
    """Adds one moment to vllm-ascend's worker: after the model is built and before it runs for the first time."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load, then take over as `take_over` does."""
        super().load_model(*args, **kwargs)
        take_over(self.vllm_config)


def take_over(vllm_config: "VllmConfig") -> Comparison | None:
    """Have the MoE layers that were built communicate by our strategies, or by both ways, as moe_comm says.

    Once a process. LOCAL. Raises the errors of start_checks.check_start, UnknownGroupError, and UnsupportedConfigError for
    layers whose features were not tried with our strategies.
    """
    planner = planner_of(vllm_config)
    if planner is None:
        return None
    release = compat.current()
    release.check_supported(vllm_config)
    if planner.may_take("mc2"):
        _ = model_groups(expert_parallel=True).ep.name_for_ops  # an error now rather than in the first step
    logger.info_once("vllm_npu moves the tokens around vllm-ascend's experts: %s", planner.describe())
    if Options.of(vllm_config).mode is Mode.COMPARE:
        planner.comparison = Comparison()
        planner.comparison.attach(vllm_config)
        return planner.comparison
    release.replace_comm_methods(PipelineCommMethod)
    release.replace_choice(planned_step)
    return None
