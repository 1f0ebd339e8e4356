"""The methods of vLLM's All2AllManagerBase (0.23 to 0.32) that vLLM calls: dispatch before the experts, combine after them.

vLLM passes no handle from dispatch to combine, so a manager keeps what its combine needs.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist

from vllm_npu.errors import InvalidInputError, UnsupportedConfigError
from vllm_npu.strategies.dispatch.rows_with_ids import RowsWithIds
from vllm_npu.transport.base import Groups, Transport

RowsOfRanks = Callable[[], Sequence[int]]
"""Returns the rows that each rank of the group brings to the running step. Padding of sequence parallelism is included."""

HandleT = TypeVar("HandleT")


class RunningStep(Protocol):
    """What the caller of a manager knows of the step that is running. LOCAL. All but micro_batch are equal on all ranks."""

    def key(self) -> object:
        """Return an object that stays the same within a step, and that no other step has."""

    def num_tokens_across_dp(self) -> tuple[int, ...]:
        """Return the tokens of each DP rank, padding of a graph included."""

    def captured(self) -> bool:
        """Whether a graph is captured from the step, or replayed for it."""

    def micro_batch(self) -> int:
        """Return the number of the micro-batch that the calling thread works on."""


class Taken(NamedTuple):
    """How the tokens of a step travelled."""

    requested: str
    strategy: str


class All2AllManager(ABC):
    """The exchange of tokens over one EP group.

    dispatch, dispatch_router_logits and combine are COLLECTIVE. The group is EP where is_sequence_parallel, since tokens are
    sliced over TP then, and DP otherwise. cpu_group is the EP group's gloo group, with which libraries set up their own links.
    """

    name: ClassVar[str]  # in the table MANAGERS

    def __init__(self, groups: Groups, rows_of_ranks: RowsOfRanks, cpu_group: dist.ProcessGroup | None = None) -> None:
        self.groups = groups
        self.cpu_group = cpu_group
        self.rank, self.world_size = groups.ep.rank, groups.ep.size
        self.dp_rank, self.dp_world_size = groups.dp.rank, groups.dp.size
        self._rows_of_ranks = rows_of_ranks
        self._taken: Taken | None = None  # by the running step
        self._taken_in_graphs: Taken | None = None  # by the step that was captured last

    def dispatch(
        self,
        hidden_states: torch.Tensor,  # [num_tokens, hidden_size]
        topk_weights: torch.Tensor,  # [num_tokens, top_k] float32
        topk_ids: torch.Tensor,  # [num_tokens, top_k] int32 or int64, global expert ids
        is_sequence_parallel: bool = False,
        extra_tensors: list[torch.Tensor] | None = None,  # each [num_tokens, ...], for example scales
    ) -> tuple[Any, ...]:
        """Return (rows, weights, ids), and the list of extra tensors as fourth element where extra_tensors is not None.

        The experts of this rank compute on the rows. Ids are global, and experts leave out ids of other ranks. COLLECTIVE.
        """
        tokens = RowsWithIds(hidden_states, topk_weights, topk_ids, tuple(extra_tensors or ()))
        brought = self._dispatch(tokens, is_sequence_parallel)
        if extra_tensors is None:
            return brought[:3]
        return (*brought[:3], list(brought.extra_tensors))

    @abstractmethod
    def _dispatch(self, tokens: RowsWithIds, is_sequence_parallel: bool) -> RowsWithIds:
        """Send this rank's tokens, and return the rows that this rank's experts compute on."""

    def dispatch_router_logits(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,  # [num_tokens, num_experts]
        is_sequence_parallel: bool = False,
        extra_tensors: list[torch.Tensor] | None = None,
    ) -> tuple[Any, ...]:
        """Return (rows, router_logits), and the list of extra tensors where extra_tensors is not None. For experts that choose
        among themselves after the exchange. Raises UnsupportedConfigError where the manager needs the choice before."""
        raise UnsupportedConfigError(
            f"{type(self).__name__} sends tokens by their experts, and this model's experts choose them after the exchange; "
            "choose all2all naive or agrs"
        )

    @abstractmethod
    def combine(self, hidden_states: torch.Tensor, is_sequence_parallel: bool = False) -> torch.Tensor:
        """Return [num_tokens, hidden_size]: for each token of this rank, the sum of the ranks' experts. COLLECTIVE.

        hidden_states has one row for each row of dispatch, weighted.
        """

    def combine_into(
        self,
        hidden_states: torch.Tensor,
        output: torch.Tensor,  # what combine returns: same shape and dtype
        is_sequence_parallel: bool = False,
    ) -> torch.Tensor:
        """combine, with its result in `output`, which is returned. COLLECTIVE. A copy more if the exchange cannot write it."""
        return output.copy_(self.combine(hidden_states, is_sequence_parallel))

    def allocate_combine_input(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """Memory for the experts' rows, between a dispatch and its combine, which then gets this tensor. LOCAL. None: the
        caller allocates it."""
        return None

    def get_handle(self, kwargs: dict[str, Any]) -> Any:
        """Return the library's object for these sizes, or the manager itself where there is no library. LOCAL, except for the
        first call with these sizes."""
        return self

    def check_failed(self) -> None:  # noqa: B027 - the exchanges of most managers raise their errors themselves
        """Raise TransportError if the exchange of a step gave up waiting for another rank. LOCAL. Host sync: no. The caller
        calls it in each step, since a replayed graph runs no Python."""

    def end_step(self) -> Taken | None:
        """Return how the tokens of the last step travelled. LOCAL. None: no step has run.

        Call it once after each step. A step without a dispatch replayed a graph. It counts as the step that was captured last.
        """
        taken, self._taken = self._taken or self._taken_in_graphs, None
        return taken

    def _note(self, taken: Taken, *, captured: bool) -> None:
        self._taken = taken
        if captured:
            self._taken_in_graphs = taken

    def set_num_sms(self, num_sms: int) -> None:  # noqa: B027 - vLLM calls it on all managers
        """Limit the GPU multiprocessors that an exchange uses, where a limit is possible. LOCAL."""

    def max_sms_used(self) -> int | None:
        """Return the multiprocessors that an exchange uses, or None where it may use all."""
        return None

    def destroy(self) -> None:  # noqa: B027 - most managers open nothing
        """Release what the manager opened itself. Safe to call twice."""

    def _group(self, is_sequence_parallel: bool) -> Transport:
        return self.groups.ep if is_sequence_parallel else self.groups.dp

    def _rows(self, transport: Transport, num_tokens: int) -> list[int]:
        rows = list(self._rows_of_ranks())
        if len(rows) != transport.size or rows[transport.rank] != num_tokens:
            raise InvalidInputError(
                f"{type(self).__name__}: rank {transport.rank} of group '{transport.group}' brings {num_tokens} rows, but the "
                f"step says {rows}, a count for each of {transport.size} ranks"
            )
        return rows


class HandleCache(Generic[HandleT]):
    """Keeps a library's objects by the arguments that made them. Layers with the same arguments share an object.

    Objects live until clear(), since a new layer may ask for an object after the layer that made it is gone.
    """

    def __init__(self) -> None:
        self._handles: dict[tuple[tuple[str, Hashable], ...], HandleT] = {}
        self._lock = threading.RLock()  # each micro-batch has a thread

    def get_or_create(self, kwargs: dict[str, Any], create: Callable[..., HandleT]) -> HandleT:
        """Return the object for kwargs. The first call makes it with create(**kwargs)."""
        key = tuple(sorted(kwargs.items()))
        with self._lock:
            if key not in self._handles:
                self._handles[key] = create(**kwargs)
            return self._handles[key]

    def clear(self, release: Callable[[HandleT], object]) -> None:
        """Release and forget all objects."""
        with self._lock:
            while self._handles:
                release(self._handles.popitem()[1])

    def __len__(self) -> int:
        return len(self._handles)
