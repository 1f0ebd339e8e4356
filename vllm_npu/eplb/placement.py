"""Placements of experts on ranks, and the transfers from one placement to another. Pure arithmetic, equal on every rank."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from vllm_npu.core.step_plan import TokenSharding
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.errors import InvalidInputError

EMPTY = -1  # a slot without an expert


@dataclass(frozen=True, slots=True)
class ReplicaPlacement:
    """Logical expert of each slot of each rank. Physical expert p is slot p % slots_per_rank of rank p // slots_per_rank.

    Raises InvalidInputError for an id outside 0..num_experts - 1 that is not EMPTY, for an expert that no rank has, and for
    rows of different lengths. Without allow_same_rank it also raises for an expert on two slots of one rank. The message names
    the expert and the rank.
    """

    slots: tuple[tuple[int, ...], ...]  # [rank][slot]
    num_experts: int
    allow_same_rank: bool = False

    def __post_init__(self) -> None:
        if not self.slots or len({len(row) for row in self.slots}) != 1:
            raise InvalidInputError(
                f"placement: ranks have {[len(row) for row in self.slots]} slots; every rank must have the same number"
            )
        for rank, row in enumerate(self.slots):
            for slot, expert in enumerate(row):
                if expert != EMPTY and not 0 <= expert < self.num_experts:
                    raise InvalidInputError(
                        f"placement: slot {slot} of rank {rank} has expert {expert}; with {self.num_experts} experts ids are "
                        f"0..{self.num_experts - 1}, and {EMPTY} for an empty slot"
                    )
                if expert != EMPTY and expert in row[:slot] and not self.allow_same_rank:
                    raise InvalidInputError(
                        f"placement: expert {expert} is on slots {row.index(expert)} and {slot} of rank {rank}; a second copy "
                        "on one rank has no use, put it on another rank"
                    )
        missing = sorted(set(range(self.num_experts)) - {expert for row in self.slots for expert in row})
        if missing:
            raise InvalidInputError(
                f"placement: no rank of 0..{len(self.slots) - 1} has expert {', '.join(map(str, missing))}; every expert needs "
                "a slot"
            )

    @classmethod
    def of(
        cls, slots: torch.Tensor | Sequence[Sequence[int]], num_experts: int, *, allow_same_rank: bool = False
    ) -> "ReplicaPlacement":
        """Make a placement from a table [num_ranks, slots_per_rank] of logical experts. A tensor is read on the host."""
        if isinstance(slots, torch.Tensor) and slots.dim() != 2:
            raise InvalidInputError(f"placement: the table is {list(slots.shape)}; it must be [ranks, slots of a rank]")
        rows = slots.tolist() if isinstance(slots, torch.Tensor) else slots
        return cls(tuple(tuple(map(int, row)) for row in rows), num_experts, allow_same_rank)

    @property
    def num_ranks(self) -> int:
        """Number of ranks."""
        return len(self.slots)

    @property
    def slots_per_rank(self) -> int:
        """Number of slots of each rank, empty slots included."""
        return len(self.slots[0])

    def ranks_of(self, expert: int) -> list[int]:
        """Return the ranks that have the expert, ascending."""
        return [rank for rank, row in enumerate(self.slots) if expert in row]

    def eplb_table(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the table that npu_moe_update_expert takes: [num_experts, 1 + most replicas] int32.

        A row is the number of replicas of the expert, their physical ids, and -1 in the remaining columns.
        """
        physical: list[list[int]] = [[] for _ in range(self.num_experts)]
        for rank, row in enumerate(self.slots):
            for slot, expert in enumerate(row):
                if expert != EMPTY:
                    physical[expert].append(rank * self.slots_per_rank + slot)
        width = max(map(len, physical))
        rows = [[len(ids), *ids, *[EMPTY] * (width - len(ids))] for ids in physical]
        return torch.tensor(rows, dtype=torch.int32, device=device)


def mapping_rank(topology: ParallelTopology, sharding: TokenSharding) -> int:
    """Return the local_rank_id with which a rank maps the logical experts of its tokens (BalanceMode.BY_RANK).

    TP ranks that hold the same tokens use the id of the first of these ranks, so that they map a token in one way. Where ranks
    gather tokens, a token mapped in two ways would be computed twice, or not at all.
    """
    return topology.tp_group[0] if sharding is TokenSharding.REPLICATED else topology.rank


@dataclass(frozen=True, slots=True)
class Transfer:
    """Moves one expert from a slot of source_rank to a slot of rank. The two ranks may be the same."""

    expert: int
    source_rank: int
    source_slot: int
    rank: int
    slot: int


@dataclass(frozen=True, slots=True)
class RankTransfers:
    """The transfers of one rank. Sends and receives between two ranks have the same order on both ranks."""

    sends: tuple[Transfer, ...]
    receives: tuple[Transfer, ...]
    copies: tuple[Transfer, ...]  # from a slot of the rank itself, with the weights before the move
    duplicates: tuple[Transfer, ...]  # from a slot of the rank itself that receives the same expert


def plan_transfers(
    old: ReplicaPlacement, new: ReplicaPlacement, *, ranks_per_node: int | None = None
) -> tuple[Transfer, ...]:
    """Return one transfer for each slot whose expert changes, ordered by rank and slot.

    A rank that already has the expert copies it. Another rank receives it once, also for two slots. The source is a rank of the
    same node where one has the expert, else any rank that has it. Among these it is the rank that sends the fewest experts so
    far, then the lowest rank. Experts on the fewest ranks are planned first, since they have the least choice of a source.
    Raises InvalidInputError where the two placements differ in ranks, slots or experts.
    """
    sizes = [(each.num_ranks, each.slots_per_rank, each.num_experts) for each in (old, new)]
    if sizes[0] != sizes[1]:
        raise InvalidInputError(
            "placement: the old one has {} ranks, {} slots a rank and {} experts, the new one {}, {} and {}; all must be "
            "equal".format(*sizes[0], *sizes[1])
        )
    node = ranks_per_node or new.num_ranks
    holders = {expert: old.ranks_of(expert) for expert in range(old.num_experts)}
    load = [0] * old.num_ranks
    planned: dict[tuple[int, int], Transfer] = {}
    wanted = [
        (len(holders[expert]), expert, rank, slot)
        for rank, row in enumerate(new.slots)
        for slot, expert in enumerate(row)
        if expert not in (EMPTY, old.slots[rank][slot])
    ]
    for _, expert, rank, slot in sorted(wanted):
        fetched = next((each for each in planned.values() if (each.expert, each.rank) == (expert, rank)), None)
        if rank in holders[expert]:
            source, source_slot = rank, old.slots[rank].index(expert)
        elif fetched is not None:
            source, source_slot = fetched.source_rank, fetched.source_slot
        else:
            source = min(holders[expert], key=lambda each: (each // node != rank // node, load[each], each))
            source_slot = old.slots[source].index(expert)
            load[source] += 1
        planned[rank, slot] = Transfer(expert, source, source_slot, rank, slot)
    return tuple(planned[place] for place in sorted(planned))


def transfers_of(transfers: Iterable[Transfer], rank: int) -> RankTransfers:
    """Return the transfers of a plan in which `rank` takes part."""
    sends: list[Transfer] = []
    receives: list[Transfer] = []
    copies: list[Transfer] = []
    duplicates: list[Transfer] = []
    seen: set[tuple[int, int]] = set()
    for each in transfers:
        first = (each.expert, each.rank) not in seen
        seen.add((each.expert, each.rank))
        if each.source_rank == each.rank == rank:
            copies.append(each)
        elif each.source_rank == rank and first:
            sends.append(each)
        elif each.rank == rank and each.source_rank != rank:
            (receives if first else duplicates).append(each)
    return RankTransfers(tuple(sends), tuple(receives), tuple(copies), tuple(duplicates))
