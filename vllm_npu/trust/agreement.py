"""A vote on the plan before any tensor moves. If ranks disagree, every rank gets an error that names them, and none hangs."""

import hashlib
from collections.abc import Callable, Mapping

import torch

from vllm_npu.core.handles import Pending
from vllm_npu.errors import PlanDisagreementError, PreparationError, VllmNpuError
from vllm_npu.transport.base import Transport, gather_texts

MAX_PLAN_BYTES = 2048
MAX_VALUE_CHARACTERS = 200
VOTE_BYTES = 32  # of one message of a vote
DIFFERENT_STEPS = "ranks planned different steps; start all of them with the same versions, model and vllm_npu options"


def agree(
    plan: str | Mapping[str, object],  # this rank's plan, as text or fields; must be equal on all ranks
    transport: Transport,  # a CPU group
    proposal: int = 0,  # a number that may differ
    difference: str = DIFFERENT_STEPS,  # first line of the error
) -> int | None:
    """Check that all ranks have the same plan. Returns the proposal if it is the same on all ranks, else None.

    COLLECTIVE over the transport's group: one Transport.maximum_start of VOTE_BYTES. Host sync: the tensors are on the CPU.
    Graph capture: no. If plans differ, every rank knows it, and the ranks gather all plans. Then every rank raises
    PlanDisagreementError. It names the ranks with each plan. For plans of fields, it names the fields that differ, and the
    ranks with each value.
    """
    return agree_start(plan, transport, proposal, difference).finish()


def agree_start(
    plan: str | Mapping[str, object], transport: Transport, proposal: int = 0, difference: str = DIFFERENT_STEPS
) -> Pending[int | None]:
    """Start an agree() that continues while the caller computes. Its finish waits, and raises."""
    text = plan if isinstance(plan, str) else _as_text(plan)
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)
    # ~x is -x - 1, which every int64 has. So one maximum gives the highest and the lowest value.
    pending = transport.maximum_start([digest, ~digest, proposal, ~proposal])

    def complete() -> int | None:
        highest, not_lowest, highest_proposal, not_lowest_proposal = pending.finish()
        if highest != ~not_lowest:
            plans = gather_texts(transport, text, MAX_PLAN_BYTES)
            lines = [] if isinstance(plan, str) else _different_fields(plans)
            if not lines:
                digests = transport.all_gather(torch.tensor([digest], device="cpu")).tolist()
                lines = _different_plans(plans, digests)
            raise PlanDisagreementError("\n".join([f"{difference}:", *lines]))
        return highest_proposal if highest_proposal == ~not_lowest_proposal else None

    return Pending(stage="agree", complete=complete)


def prepare_on_all(prepare: Callable[[], str], transport: Transport, difference: str) -> None:
    """Run `prepare` on this rank, and return if it succeeded on all ranks with the same text. COLLECTIVE as agree().

    It stands before a collective whose preparation can fail on one rank, for want of memory or for wrong input: without it,
    the other ranks would wait for that rank in the collective. If a rank fails or has another text, every rank raises
    PlanDisagreementError, which names the error or the text of each rank. If all ranks fail with the same text, they raise
    their own error.
    """
    fault: VllmNpuError | None = None
    try:
        text = prepare()
    except VllmNpuError as error:
        fault, text = error, str(error)
    except (MemoryError, RuntimeError) as error:  # torch's allocators raise RuntimeError, Python's raises MemoryError
        fault = PreparationError(f"rank {transport.rank} cannot prepare: {str(error) or type(error).__name__}")
        fault.__cause__ = error
        text = str(fault)
    agree(text, transport, difference=difference)
    if fault is not None:
        raise fault


def _as_text(fields: Mapping[str, object]) -> str:
    """One line for each field. A long value is cut and gets a digest, so that all fields fit in MAX_PLAN_BYTES."""
    return "\n".join([f"{name}: {_short(str(value))}" for name, value in fields.items()])


def _short(text: str) -> str:
    if len(text) <= MAX_VALUE_CHARACTERS:
        return text
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    return f"{text[:MAX_VALUE_CHARACTERS]}... (digest {digest})"


def _different_plans(plans: list[str], digests: list[int]) -> list[str]:
    ranks_with: dict[int, list[int]] = {}
    for rank, digest in enumerate(digests):
        ranks_with.setdefault(digest, []).append(rank)
    return [f"  ranks {ranks}: {plans[ranks[0]]}" for ranks in ranks_with.values()]


def _different_fields(plans: list[str]) -> list[str]:
    """One line for each field that differs, with the ranks of each value."""
    by_rank = [dict(line.partition(": ")[::2] for line in plan.splitlines()) for plan in plans]
    lines = []
    for name in dict.fromkeys(name for fields in by_rank for name in fields):
        ranks_with: dict[str, list[int]] = {}
        for rank, fields in enumerate(by_rank):
            ranks_with.setdefault(fields.get(name, "(absent)"), []).append(rank)
        if len(ranks_with) > 1:
            lines.append(f"  {name}: " + "; ".join(f"ranks {ranks}: {value}" for value, ranks in ranks_with.items()))
    return lines
