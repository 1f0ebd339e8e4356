"""The plan of a step as vLLM's forward context carries it: one place that writes it, one that reads it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.forward_context import get_forward_context, is_forward_context_available

from vllm_npu.core.step_plan import StepPlan
from vllm_npu.errors import InvalidInputError

KEY = "vllm_npu_step"


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """What all MoE layers of a step share."""

    plan: StepPlan
    strategy: str
    confirm: Callable[[], None]
    """Waits for the vote on the plan. Raises PlanDisagreementError where ranks' plans differ."""


def as_additional_context(step: PlannedStep) -> dict[str, Any]:
    """The step as Platform.set_additional_forward_context returns it."""
    return {KEY: step}


def running_step() -> PlannedStep | None:
    """The step that is running, or None outside of a step and where it was not planned.

    Reads the context's additional_kwargs, and its attributes: vLLM's runners use the one, vllm-ascend's also the other.
    """
    context = get_forward_context() if is_forward_context_available() else None
    step = None if context is None else context.additional_kwargs.get(KEY, getattr(context, KEY, None))
    return step if isinstance(step, PlannedStep) else None


def current_step() -> PlannedStep:
    """The step that is running, on which all ranks agree: its first call waits for the vote. Raises PlanDisagreementError,
    and InvalidInputError where there is no step."""
    step = running_step()
    if step is None:
        where = (
            "in a step that has no token count" if is_forward_context_available() else "outside of a forward context"
        )
        raise InvalidInputError(
            f"an MoE layer of vllm_npu ran {where}; wrap the call in vLLM's set_forward_context(..., num_tokens=n), and let "
            "vllm_npu be the active platform"
        )
    step.confirm()
    return step
