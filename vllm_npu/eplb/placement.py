"""Where experts are, where they shall be, and which messages lie between: pure arithmetic, the same on every rank."""

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

    Raises InvalidInputError, naming expert and rank, for ids outside of 0..num_experts - 1 (EMPTY excepted), an expert that
    no rank has, rows of different length, and, unless allowed, an expert on two slots of one rank.
    """

    slots: tuple[tuple[int, ...], ...]  # [rank][slot]
    num_experts: int
    allow_same_rank: bool = False

    def __post_init__(self) -> None:
        if not self.slots or len({len(row) for row in self.slots}) != 1:
            raise InvalidInputError(
                f"placement: ranks have {[len(row) for row in self.slots]} slots; every rank must have as many"
            )
        for rank, row in enumerate(self.slots):
            for slot, expert in enumerate(row):
                if expert != EMPTY and not 0 <= expert < self.num_experts:
                    raise InvalidInputError(
                        f"placement: slot {slot} of rank {rank} has expert {expert}; with {self.num_experts} experts ids are "
                        f"0..{self.num_experts - 1}, and {EMPTY} an empty slot"
                    )
                if expert != EMPTY and expert in row[:slot] and not self.allow_same_rank:
                    raise InvalidInputError(
                        f"placement: expert {expert} is on slots {row.index(expert)} and {slot} of rank {rank}; a second copy "
                        "there serves nobody, put it on another rank"
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
        """From a table [num_ranks, slots_per_rank] of logical experts. A tensor is read on the host."""
        if isinstance(slots, torch.Tensor) and slots.dim() != 2:
            raise InvalidInputError(f"placement: the table is {list(slots.shape)}; it must be [ranks, slots of a rank]")
        rows = slots.tolist() if isinstance(slots, torch.Tensor) else slots
        return cls(tuple(tuple(map(int, row)) for row in rows), num_experts, allow_same_rank)

    @property
    def num_ranks(self) -> int:
        """Ranks with slots."""
        return len(self.slots)

    @property
    def slots_per_rank(self) -> int:
        """Slots of each rank, empty ones too."""
        return len(self.slots[0])

    def ranks_of(self, expert: int) -> list[int]:
        """Those that have it, ascending."""
        return [rank for rank, row in enumerate(self.slots) if expert in row]

    def eplb_table(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """[num_experts, 1 + most replicas] int32, as npu_moe_update_expert takes it: replica count, physical ids, -1."""
        physical: list[list[int]] = [[] for _ in range(self.num_experts)]
        for rank, row in enumerate(self.slots):
            for slot, expert in enumerate(row):
                if expert != EMPTY:
                    physical[expert].append(rank * self.slots_per_rank + slot)
        width = max(map(len, physical))
        rows = [[len(ids), *ids, *[EMPTY] * (width - len(ids))] for ids in physical]
        return torch.tensor(rows, dtype=torch.int32, device=device)


def mapping_rank(topology: ParallelTopology, sharding: TokenSharding) -> int:
    """The local_rank_id with which a rank maps its tokens' logical experts (BalanceMode.BY_RANK).

    TP ranks that bring the same tokens map them alike, as the first of them: where ranks gather tokens, each computes the
    choices of its own experts, and a token mapped in two ways would be computed twice, or not at all.
    """
    return topology.tp_group[0] if sharding is TokenSharding.REPLICATED else topology.rank


@dataclass(frozen=True, slots=True)
class Transfer:
    """One expert from a slot of a rank to a slot of another, or of the same."""

    expert: int
    source_rank: int
    source_slot: int
    rank: int
    slot: int


@dataclass(frozen=True, slots=True)
class RankTransfers:
    """What one rank does. Sends and receives between two ranks stand in the same order on both."""

    sends: tuple[Transfer, ...]
    receives: tuple[Transfer, ...]
    copies: tuple[Transfer, ...]  # from a slot of the rank itself, as it was before
    duplicates: tuple[Transfer, ...]  # from another slot of the rank, as received


def plan_transfers(
    old: ReplicaPlacement, new: ReplicaPlacement, *, ranks_per_node: int | None = None
) -> tuple[Transfer, ...]:
    """One transfer for each slot whose expert changes, ordered by rank and slot. Raises InvalidInputError where the two do not
    have the same ranks, slots and experts.

    A rank that has the expert copies it from itself, and fetches one for two slots once. Others fetch it from a rank of
    their node that has it, else from any; of these, from the one that sends least so far, then the lowest. Experts with the
    fewest holders are given out first, so that others can make way for them.
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
    """What `rank` does of a plan."""
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
