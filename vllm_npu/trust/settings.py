"""Preparations that must succeed on every rank or on none: the settings of the ranks, and what is made from them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from vllm_npu import envs
from vllm_npu.errors import PlanDisagreementError, UnsupportedConfigError, VllmNpuError
from vllm_npu.transport.base import Transport
from vllm_npu.trust.agreement import agree
from vllm_npu.trust.recording import CollectiveCounter, open_ring
from vllm_npu.trust.trace import TraceRing

Prepared = TypeVar("Prepared")

NOTHING = "nothing"
DIFFERENT_SETTINGS = "ranks start with different settings; set each of these variables alike, to a value that it takes"
NOT_ALL_PREPARED = "not every rank can start; mend what each rank refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What one rank makes of its environment variables for its groups. Read once, when the groups are made."""

    counter: CollectiveCounter | None  # None: VLLM_NPU_COUNT_COLLECTIVES and VLLM_NPU_METRICS are both 0
    ring: TraceRing | None  # None: VLLM_NPU_RECORD is empty
    deadline: float  # seconds that a collective of gloo may take

    @classmethod
    def read(cls, rank: int, num_ranks: int) -> "Settings":
        """Check all variables, and open this rank's trace. LOCAL. `rank` and `num_ranks` are numbers in the whole run.

        Raises UnsupportedConfigError, which names the variable and its value.
        """
        envs.check_variables()
        counted = envs.COUNT_COLLECTIVES.read_flag() or envs.METRICS.read_flag()
        return cls(
            counter=CollectiveCounter() if counted else None,
            ring=open_ring(rank, num_ranks),
            deadline=envs.COLLECTIVE_DEADLINE.read_seconds(),
        )


def agree_on_settings(
    transport: Transport,  # a CPU group of all ranks that will exchange tokens
    rank: int,  # in the whole run
    num_ranks: int,  # of the whole run
) -> Settings:
    """Read this rank's settings, and compare those that must be equal. Call it before any other collective of the groups.

    COLLECTIVE over the transport's group, as agree(). Raises UnsupportedConfigError on every rank if a variable has a value
    that it does not take, on any rank, or if a variable of EQUAL_ON_ALL_RANKS differs. It names the ranks, the variables and
    the values.
    """
    equal = {variable.name: _as_compared(variable) for variable in envs.EQUAL_ON_ALL_RANKS}
    return prepare_together(
        lambda: Settings.read(rank, num_ranks), transport, equal=equal, difference=DIFFERENT_SETTINGS
    )


def prepare_together(
    prepare: Callable[[], Prepared],  # LOCAL
    transport: Transport,  # a CPU group
    *,
    equal: Mapping[str, object] | None = None,  # further fields that all ranks must have alike
    difference: str = NOT_ALL_PREPARED,  # first line of the error
) -> Prepared:
    """Return prepare(), once all ranks have prepared. COLLECTIVE over the transport's group, as agree().

    So no rank enters the next collective while another rank cannot. If `prepare` raises a VllmNpuError on some ranks, or if
    `equal` differs, every rank raises UnsupportedConfigError with the ranks and what each of them refused. If every rank
    refuses the same, each raises its own error.
    """
    prepared: Prepared
    refusal: VllmNpuError | None = None
    try:
        prepared = prepare()
    except VllmNpuError as error:
        refusal = error
    refused = NOTHING if refusal is None else " ".join(str(refusal).split())
    try:
        agree({**(equal or {}), "refused": refused}, transport, difference=difference)
    except PlanDisagreementError as error:
        raise UnsupportedConfigError(str(error)) from refusal
    if refusal is not None:
        raise refusal
    return prepared


def _as_compared(variable: envs.Variable) -> str:
    """The value, so that 60 and 60.0 are equal. Another text as it stands: Settings.read refuses it."""
    try:
        return str(variable.value())
    except UnsupportedConfigError:
        return repr(variable.read())
