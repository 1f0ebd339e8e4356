"""A vote on the plan before any tensor moves. If ranks disagree, every rank gets an error that names them, and none hangs."""

import hashlib
from collections.abc import Mapping

import torch

from vllm_npu.core.handles import Pending
from vllm_npu.errors import PlanDisagreementError
from vllm_npu.transport.base import Transport, gather_texts

MAX_PLAN_BYTES = 2048
MAX_VALUE_CHARACTERS = 200
DIFFERENT_STEPS = "ranks planned different steps; start all of them with the same versions, model and vllm_npu options"


def agree(
    plan: str | Mapping[str, object],  # this rank's plan, as text or fields; must be equal on all ranks
    transport: Transport,  # a CPU group
    proposal: int = 0,  # a number that may differ
    difference: str = DIFFERENT_STEPS,  # first line of the error
) -> list[int]:
    """Check that all ranks have the same plan, and return every rank's proposal, in rank order.

    COLLECTIVE over the transport's group: one exchange of 16 bytes with each rank. Host sync: the tensors are on the CPU.
    Graph capture: no. If plans differ, the ranks gather all plans, and every rank raises PlanDisagreementError. It names the
    ranks with each plan. For plans of fields, it names the fields that differ, and the ranks with each value.
    """
    return agree_start(plan, transport, proposal, difference).finish()


def agree_start(
    plan: str | Mapping[str, object], transport: Transport, proposal: int = 0, difference: str = DIFFERENT_STEPS
) -> Pending[list[int]]:
    """Start an agree() that continues while the caller computes. Its finish waits, and raises."""
    text = plan if isinstance(plan, str) else _as_text(plan)
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)
    one_each = [1] * transport.size
    vote = torch.tensor([[digest, proposal]] * transport.size, device="cpu")
    pending = transport.all_to_all_start(vote, one_each, one_each)

    def complete() -> list[int]:
        votes = pending.finish().tolist()
        if any(vote[0] != digest for vote in votes):
            plans = gather_texts(transport, text, MAX_PLAN_BYTES)
            digests = [vote[0] for vote in votes]
            lines = _different_plans(plans, digests) if isinstance(plan, str) else _different_fields(plans)
            raise PlanDisagreementError("\n".join([f"{difference}:", *(lines or _different_plans(plans, digests))]))
        return [vote[1] for vote in votes]

    return Pending(stage="agree", complete=complete)


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
