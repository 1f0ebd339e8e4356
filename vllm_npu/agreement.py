"""A vote on the plan before any tensor moves: ranks that disagree all get an error that names them, never a hang."""

import hashlib

import torch

from vllm_npu.errors import PlanDisagreementError
from vllm_npu.transport.base import Transport, gather_texts

MAX_PLAN_BYTES = 1024
DIFFERENT_STEPS = "ranks planned different steps; start all of them with the same versions, model and vllm_npu options"


def agree(
    plan: str,  # this rank's plan, as text: what must be equal on all ranks
    transport: Transport,  # a CPU group
    proposal: int = 0,  # a number that may differ
    difference: str = DIFFERENT_STEPS,  # first line of the error
) -> list[int]:
    """Check that all ranks have the same plan; returns every rank's proposal, in rank order.

    COLLECTIVE over the transport's group: one all-gather of 16 bytes. Host sync: the tensors are on the CPU. Graph
    capture: no. Raises PlanDisagreementError on every rank where plans differ, after a second all-gather of the plans.
    """
    digest = int.from_bytes(hashlib.blake2b(plan.encode(), digest_size=8).digest(), "big", signed=True)
    votes = transport.all_gather(torch.tensor([[digest, proposal]], device="cpu")).tolist()
    if any(vote[0] != digest for vote in votes):
        raise PlanDisagreementError(
            _difference(difference, gather_texts(transport, plan, MAX_PLAN_BYTES), [vote[0] for vote in votes])
        )
    return [vote[1] for vote in votes]


def _difference(difference: str, plans: list[str], digests: list[int]) -> str:
    ranks_with: dict[int, list[int]] = {}
    for rank, digest in enumerate(digests):
        ranks_with.setdefault(digest, []).append(rank)
    lines = [f"  ranks {ranks}: {plans[ranks[0]]}" for ranks in ranks_with.values()]
    return "\n".join([f"{difference}:", *lines])
