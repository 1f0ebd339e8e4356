"""A rank's place in the tensor-, data- and expert-parallel groups, and the rank of each expert."""

from dataclasses import dataclass

from vllm_npu.errors import UnsupportedConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelTopology:
    """One rank's place in a dp_size x tp_size grid. Ranks are numbered DP-major, as in vLLM.

    The `ep` group spans the whole grid. With `expert_parallel`, each of its ranks owns whole experts. Without it,
    every rank owns a shard of every expert, and the sum over the grid is the layer's output.
    """

    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    expert_parallel: bool

    def __post_init__(self) -> None:
        for name, rank, size in (("tp", self.tp_rank, self.tp_size), ("dp", self.dp_rank, self.dp_size)):
            if size < 1 or not 0 <= rank < size:
                raise UnsupportedConfigError(f"{name}_rank={rank} of {name}_size={size}: not a rank of such a group")

    @classmethod
    def of_rank(cls, rank: int, *, tp_size: int, dp_size: int, expert_parallel: bool = True) -> "ParallelTopology":
        """The place of rank `rank` in the dp_size x tp_size grid."""
        return cls(
            tp_rank=rank % tp_size,
            tp_size=tp_size,
            dp_rank=rank // tp_size,
            dp_size=dp_size,
            expert_parallel=expert_parallel,
        )

    @property
    def world_size(self) -> int:
        """Number of ranks in the grid."""
        return self.tp_size * self.dp_size

    @property
    def rank(self) -> int:
        """This rank's number in the grid, DP-major. It is also its rank in the `ep` group."""
        return self.dp_rank * self.tp_size + self.tp_rank

    @property
    def ep_size(self) -> int:
        """Number of ranks over which whole experts are spread. 1 without expert parallelism."""
        return self.world_size if self.expert_parallel else 1

    @property
    def ep_rank(self) -> int:
        """This rank's number among the ep_size ranks that own experts. 0 without expert parallelism."""
        return self.rank if self.expert_parallel else 0

    @property
    def tp_group(self) -> tuple[int, ...]:
        """Grid ranks of this rank's tensor-parallel group, in rank order."""
        return tuple(range(self.dp_rank * self.tp_size, (self.dp_rank + 1) * self.tp_size))

    @property
    def dp_group(self) -> tuple[int, ...]:
        """Grid ranks of this rank's data-parallel group, in rank order."""
        return tuple(range(self.tp_rank, self.world_size, self.tp_size))

    def __str__(self) -> str:
        return f"TP{self.tp_size}xDP{self.dp_size}{'xEP' if self.expert_parallel else ''}"


def places_of_experts(num_experts: int, ep_size: int) -> int:
    """The number of places for experts on all ranks together: each rank has as many as the fullest rank has experts."""
    return -(-num_experts // ep_size) * ep_size


def expert_places(num_experts: int, ep_size: int) -> list[int]:
    """The place of each expert. vLLM gives the first num_experts % ep_size ranks one expert more than the others
    (determine_expert_map, linear). So the last place of the other ranks is empty, and no token goes there.

    With places in the role of experts, every strategy finds equally many on each rank.
    """
    fewest, fuller = divmod(num_experts, ep_size)
    sizes = [fewest + (rank < fuller) for rank in range(ep_size)]
    most = max(sizes)
    return [rank * most + number for rank, size in enumerate(sizes) for number in range(size)]


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """Linear placement: expert e lives on EP rank e // experts_per_rank (vLLM's default expert_placement_strategy).

    Raises UnsupportedConfigError if the experts do not divide evenly over the ranks.
    """

    num_experts: int
    ep_size: int

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise UnsupportedConfigError(f"num_experts={self.num_experts}: a layer has 1 or more")
        if self.num_experts % self.ep_size:
            raise UnsupportedConfigError(
                f"{self.num_experts} experts do not divide over ep_size={self.ep_size}; choose tp_size * dp_size = "
                f"{self._sizes_that_divide()}, or add {-self.num_experts % self.ep_size} redundant experts"
            )

    def _sizes_that_divide(self) -> str:
        """Text with the next smaller and the next larger ep_size over which the experts divide."""
        divisors = [size for size in range(1, self.num_experts + 1) if self.num_experts % size == 0]
        smaller = [size for size in divisors if size < self.ep_size]
        larger = [size for size in divisors if size > self.ep_size]
        return " or ".join(map(str, [*smaller[-1:], *larger[:1]]))

    @property
    def experts_per_rank(self) -> int:
        """Number of experts on each EP rank."""
        return self.num_experts // self.ep_size

    def first_expert(self, ep_rank: int) -> int:
        """Global id of the first expert on `ep_rank`."""
        return ep_rank * self.experts_per_rank

    def experts_of(self, ep_rank: int) -> range:
        """Global ids of the experts on `ep_rank`."""
        first = self.first_expert(ep_rank)
        return range(first, first + self.experts_per_rank)
