"""The plan of a step inside vLLM's forward context. Only this file writes it there and reads it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.forward_context import get_forward_context, is_forward_context_available

from vllm_npu.core.step_plan import StepPlan
from vllm_npu.errors import InvalidInputError
from vllm_npu.transport.base import Groups

KEY = "vllm_npu_step"


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """What all MoE layers of a step share."""

    plan: StepPlan
    strategy: str
    groups: Groups  # of the model's MoE layers
    confirm: Callable[[], None]
    """Waits for the end of the vote on the plan. Raises PlanDisagreementError if the ranks' plans differ."""


def as_additional_context(step: PlannedStep) -> dict[str, Any]:
    """Wrap the step as Platform.set_additional_forward_context must return it."""
    return {KEY: step}


def running_step() -> PlannedStep | None:
    """The step that is running. None outside of a step, and in a step that was not planned.

    vLLM's runners keep the step in the context's additional_kwargs. vllm-ascend's runners may keep it in an attribute.
    """
    context = get_forward_context() if is_forward_context_available() else None
    step = None if context is None else context.additional_kwargs.get(KEY, getattr(context, KEY, None))
    return step if isinstance(step, PlannedStep) else None


def current_step() -> PlannedStep:
    """The step that is running, after the end of its vote: the first call in a step waits for it.

    Raises PlanDisagreementError if the ranks' plans differ, and InvalidInputError if no planned step is running.
    """
    step = running_step()
    if step is None:
        where = (
            "in a step that has no token count" if is_forward_context_available() else "outside of a forward context"
        )
        raise InvalidInputError(
            f"an MoE layer of vllm_npu ran {where}; wrap the call in vLLM's set_forward_context(..., num_tokens=n), and make "
            "vllm_npu the active platform"
        )
    step.confirm()
    return step
