"""vllm-ascend's worker. After it has loaded the model, the MoE layers communicate by our strategies."""

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm_ascend.worker.worker import NPUWorker

from vllm_npu.plugin import compat
from vllm_npu.plugin.ascend.balancer_watch import end_balancer, watch_balancer
from vllm_npu.plugin.ascend.comm_method import PipelineCommMethod
from vllm_npu.plugin.ascend.output_comparison import OutputComparison
from vllm_npu.plugin.forward_context import running_step
from vllm_npu.plugin.groups import model_groups
from vllm_npu.plugin.options import Mode
from vllm_npu.plugin.step_planner import planner_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.npu.plugin.ascend.worker")


class AscendMoEWorker(NPUWorker):
    """Calls take_over between the loading of the model and its first run, and ends what EPLB would leave."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, make the DP ranks pad alike, watch the EPLB process, and call take_over. Raises its errors."""
        super().load_model(*args, **kwargs)
        compat.current().agree_on_padding(self.model_runner)
        watch_balancer(self.model_runner)
        take_over(self.vllm_config)

    def shutdown(self) -> None:
        """End vllm-ascend's worker, and the processes of its EPLB."""
        super().shutdown()
        end_balancer(getattr(self, "model_runner", None))


def take_over(vllm_config: "VllmConfig") -> OutputComparison | None:
    """Make the built MoE layers communicate by our strategies. Call it once in a process. LOCAL.

    With moe_comm=compare, make them communicate both ways, and return the comparison. Raises the errors of
    start_checks.check_start, UnknownGroupError, and UnsupportedConfigError for layers that check_layers refuses.
    """
    planner = planner_of(vllm_config)
    if planner is None:
        return None
    release = compat.current()
    release.check_layers(vllm_config)
    if planner.may_take("mc2") or planner.may_take("fused_mc2"):
        _ = model_groups(expert_parallel=True).ep.name_for_ops  # raises UnknownGroupError here, not in the first step
    if planner.counts_bound is None:
        release.agree_on_counts()
    logger.info_once("vllm_npu moves the tokens around vllm-ascend's experts: %s", planner.describe())
    if planner.options.mode is Mode.COMPARE:
        comparison = OutputComparison()
        comparison.attach(vllm_config)
        planner.more_counters["comparison"] = comparison.take
        return comparison
    release.replace_comm_methods(PipelineCommMethod)
    release.replace_choice(_strategy_of_step)
    release.join_captures()
    return None


def _strategy_of_step() -> str | None:
    """The strategy of the running step. None if the step was not planned."""
    step = running_step()
    return None if step is None else step.strategy
