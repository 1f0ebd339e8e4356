"""What a device's experts can compute where tokens travel between ranks. Checked before any process of an engine starts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vllm_npu.core.model_facts import ModelFacts

ELSE = "run without expert and data parallelism"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsWanted:
    """What config.json and the options of an engine ask of its experts."""

    model: ModelFacts
    lora: bool = False  # whether adapters may change the experts


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLimits:
    """What the experts of a device compute."""

    place: str  # for messages
    activations: Mapping[str, float | None]  # vLLM's names, each with the limit that its kernel clamps to

    def why_not_activation(self, activation: str | None, limit: float | None) -> str | None:
        """Why the experts cannot compute this activation, and what to do. None: they can, or no activation is known."""
        # Without a limit in its layer, a kernel that clamps has its own.
        known = activation is None or activation in self.activations
        if known and limit in (None, self.activations.get(activation or "")):
            return None
        supported = ", ".join(
            name if clamped is None else f"{name} with limit {clamped:g}" for name, clamped in self.activations.items()
        )
        return (
            f"the experts' activation {activation!r}{'' if limit is None else f' with limit {limit:g}'} is not supported with "
            f"expert or data parallelism on {self.place} (supported: {supported}); {ELSE}"
        )

    def why_not(self, wanted: ExpertsWanted) -> str | None:
        """The first reason of EXPERT_CHECKS against these experts, and what to do. None: no known fact is against them."""
        reasons = (check(self, wanted) for check in EXPERT_CHECKS)
        return next((reason for reason in reasons if reason is not None), None)


def no_quantised_experts(limits: ExpertLimits, wanted: ExpertsWanted) -> str | None:
    """Quantised experts of vLLM exchange tokens themselves, and would do so a second time inside a strategy."""
    method = wanted.model.quantised_experts
    return method and (
        f"experts quantised by {method} are not supported with expert or data parallelism on {limits.place}; serve an "
        f"unquantised checkpoint, or {ELSE}"
    )


def no_other_activation(limits: ExpertLimits, wanted: ExpertsWanted) -> str | None:
    """The experts have a table of activations."""
    return limits.why_not_activation(wanted.model.activation, wanted.model.swiglu_limit)


def no_adapters(limits: ExpertLimits, wanted: ExpertsWanted) -> str | None:
    """vLLM's LoRA layer replaces the experts by kernels that a CPU does not have."""
    return (
        f"LoRA adapters on experts are not supported on {limits.place}; leave out --enable-lora, or name other layers with "
        "--lora-target-modules"
        if wanted.lora
        else None
    )


def no_other_routing(limits: ExpertLimits, wanted: ExpertsWanted) -> str | None:
    """The CPU's router has a table of scores. The reason says what to do."""
    return wanted.model.unroutable


EXPERT_CHECKS: tuple[Callable[[ExpertLimits, ExpertsWanted], str | None], ...] = (
    no_quantised_experts,
    no_other_activation,
    no_adapters,
    no_other_routing,
)
