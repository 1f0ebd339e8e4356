"""Moving a layer's experts from one placement to another: the move changes the weights on all ranks, or on none."""

import hashlib
from collections.abc import Sequence

import torch

from vllm_npu.eplb.communicator import EplbCommunicator
from vllm_npu.eplb.placement import RankTransfers, ReplicaPlacement, plan_transfers, transfers_of
from vllm_npu.errors import InvalidInputError, PlanDisagreementError, TransportError, VllmNpuError
from vllm_npu.transport.base import Transport
from vllm_npu.trust.agreement import agree, prepare_on_all

NOT_READY = "ranks want to move experts differently, or some cannot; no weight was changed"
FAILED = "experts did not arrive on all ranks; no weight was changed"
Placement = ReplicaPlacement | torch.Tensor | Sequence[Sequence[int]]


def move_experts(
    weights: Sequence[torch.Tensor],  # each [slots_per_rank, ...]: this rank's experts
    old: Placement,  # [num_ranks, slots_per_rank], logical experts
    new: Placement,
    num_experts: int,
    communicator: EplbCommunicator,  # its queue empty
    voters: Transport,  # over CPU tensors, of the same ranks
    *,
    allow_same_rank: bool = False,
    ranks_per_node: int | None = None,
) -> int:
    """Give each slot the weights of its new expert. Returns the number of experts that this rank received.

    Three steps: every rank plans and allocates all that it needs, and all agree that all are ready; the weights arrive in fresh
    buffers; all agree that they arrived, and each rank copies them into its slots, which allocates nothing. An error in the
    first two steps leaves the weights of every rank unchanged, so that the next step may run on the old placement. After a
    TransportError restart the ranks: a rank that ends during the last agreement may leave the others on either placement.
    Slots that become empty keep their weights.

    COLLECTIVE over the ranks: two agree(), and the communicator's messages. Host sync: yes. Graph capture: no. All ranks raise
    the same kind of error: InvalidInputError where all were given the same invalid placement (see ReplicaPlacement),
    PlanDisagreementError where the ranks were given different placements, or where one has no memory, and TransportError where
    moving failed on one rank. PlanDisagreementError names the error or the plan of each rank.
    """
    weights = [w.detach() for w in weights]
    plan = RankTransfers((), (), (), ())
    buffers: dict[int, list[torch.Tensor]] = {}  # by slot

    def prepare() -> str:
        nonlocal plan
        plan, facts = _plan(weights, old, new, num_experts, voters, allow_same_rank, ranks_per_node)
        for each in plan.receives + plan.copies:
            buffers[each.slot] = [torch.empty_like(w[each.slot]) for w in weights]
        for each in plan.sends:
            communicator.add_send([w[each.source_slot] for w in weights], each.rank, each.expert)
        for each in plan.receives:
            communicator.add_recv(buffers[each.slot], each.source_rank, each.expert)
        communicator.prepare()
        return facts

    try:
        prepare_on_all(prepare, voters, NOT_READY)
    except VllmNpuError:
        communicator.clear()
        raise
    failure: Exception | None = None
    try:
        communicator.execute()
        for each in plan.copies:
            for buffer, w in zip(buffers[each.slot], weights, strict=True):
                buffer.copy_(w[each.source_slot])
        _wait(weights)
    except (VllmNpuError, RuntimeError, MemoryError) as error:
        communicator.clear()
        failure = error
    try:
        agree("moved" if failure is None else f"failed: {failure}", voters, difference=FAILED)
    except PlanDisagreementError as error:
        raise failure or TransportError("move_experts", voters.group, voters.rank, str(error)) from error
    if failure is not None:
        raise failure
    for each in plan.duplicates:
        first = next(other for other in plan.receives if other.expert == each.expert)
        buffers[each.slot] = buffers[first.slot]
    for slot, tensors in buffers.items():
        for w, tensor in zip(weights, tensors, strict=True):
            w[slot].copy_(tensor)
    return len(plan.receives)


def _plan(
    weights: Sequence[torch.Tensor],
    old: Placement,
    new: Placement,
    num_experts: int,
    voters: Transport,
    allow_same_rank: bool,
    ranks_per_node: int | None,
) -> tuple[RankTransfers, str]:
    """Return this rank's transfers, and a text that is equal on all ranks only where their plans are equal."""
    before, after = (
        each
        if isinstance(each, ReplicaPlacement)
        else ReplicaPlacement.of(each, num_experts, allow_same_rank=allow_same_rank)
        for each in (old, new)
    )
    if before.num_ranks != voters.size:
        raise InvalidInputError(
            f"placement: the table has {before.num_ranks} ranks, group '{voters.group}' has {voters.size}; give one row a rank"
        )
    if not weights or any(w.dim() < 1 or w.shape[0] != before.slots_per_rank for w in weights):
        raise InvalidInputError(
            f"move_experts: weights are {[tuple(w.shape) for w in weights]}; each needs {before.slots_per_rank} experts, the "
            f"slots of rank {voters.rank}"
        )
    transfers = plan_transfers(before, after, ranks_per_node=ranks_per_node)
    kinds = "; ".join(f"{w.dtype} {list(w.shape[1:])}" for w in weights)
    digest = hashlib.blake2b(repr((before, after, transfers)).encode(), digest_size=8).hexdigest()
    facts = f"{len(transfers)} transfers of {kinds}, placements {digest}"
    return transfers_of(transfers, voters.rank), facts


def _wait(weights: Sequence[torch.Tensor]) -> None:
    if weights[0].device.type != "cpu":
        torch.accelerator.synchronize(weights[0].device)
