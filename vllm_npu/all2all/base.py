"""The contract of vLLM's All2AllManagerBase (0.23 to 0.32), as far as vLLM calls it: what a manager brings to the experts
of this rank and takes back. vLLM passes no handle from dispatch to combine: what combine needs is kept in the manager.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from math import prod
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from vllm_npu.core.token_layout import pack, share_messages
from vllm_npu.errors import InvalidInputError, UnsupportedConfigError
from vllm_npu.transport.base import Groups, Transport

RowsOfRanks = Callable[[], Sequence[int]]
"""Rows that each rank of the group brings to the running step, padding of sequence parallelism included."""

HandleT = TypeVar("HandleT")


class All2AllManager(ABC):
    """One EP group's exchange. All methods but get_handle are COLLECTIVE; which group, says is_sequence_parallel: EP where
    tokens are sliced over TP, else DP.

    cpu_group is the EP group's gloo group, which libraries bootstrap from.
    """

    def __init__(self, groups: Groups, rows_of_ranks: RowsOfRanks, cpu_group: dist.ProcessGroup | None = None) -> None:
        self.groups = groups
        self.cpu_group = cpu_group
        self.rank, self.world_size = groups.ep.rank, groups.ep.size
        self.dp_rank, self.dp_world_size = groups.dp.rank, groups.dp.size
        self._rows_of_ranks = rows_of_ranks

    @abstractmethod
    def dispatch(
        self,
        hidden_states: torch.Tensor,  # [num_tokens, hidden_size]
        topk_weights: torch.Tensor,  # [num_tokens, top_k] float32
        topk_ids: torch.Tensor,  # [num_tokens, top_k] int32 or int64, global expert ids
        is_sequence_parallel: bool = False,
        extra_tensors: list[torch.Tensor] | None = None,  # each [num_tokens, ...]: scales, for one
    ) -> tuple[Any, ...]:
        """(rows, weights, ids[, extra_tensors]): the rows that this rank's experts compute on. Ids are global: the experts
        leave out those of other ranks."""

    def dispatch_router_logits(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,  # [num_tokens, num_experts]
        is_sequence_parallel: bool = False,
        extra_tensors: list[torch.Tensor] | None = None,
    ) -> tuple[Any, ...]:
        """(rows, router_logits[, extra_tensors]), for experts that route themselves."""
        raise UnsupportedConfigError(
            f"{type(self).__name__} sends tokens by their experts, and this model's experts choose them after the exchange; "
            "choose all2all naive or agrs"
        )

    @abstractmethod
    def combine(self, hidden_states: torch.Tensor, is_sequence_parallel: bool = False) -> torch.Tensor:
        """[num_tokens, hidden_size] of this rank: the sum of what the ranks' experts made of its tokens. hidden_states has a
        row for each that dispatch returned, weighted."""

    def get_handle(self, kwargs: dict[str, Any]) -> Any:
        """The library's object for these sizes; the manager itself where there is none. LOCAL, but for the first call."""
        return self

    def set_num_sms(self, num_sms: int) -> None:  # noqa: B027 - vLLM asks all managers
        """Bound the GPU's multiprocessors that an exchange takes, where it can be bound. LOCAL."""

    def max_sms_used(self) -> int | None:
        """Multiprocessors that an exchange takes; None: maybe all."""
        return None

    def destroy(self) -> None:  # noqa: B027 - most hold nothing
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


class GatheringManager(All2AllManager):
    """Managers that bring all tokens to all ranks, so that experts see what other ranks brought, in rank order."""

    def dispatch(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: list[torch.Tensor] | None = None,
    ) -> tuple[Any, ...]:
        """All ranks' rows, weights, ids and extra tensors."""
        return self._gather_all([hidden_states, topk_weights, topk_ids], is_sequence_parallel, extra_tensors)

    def dispatch_router_logits(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: list[torch.Tensor] | None = None,
    ) -> tuple[Any, ...]:
        """All ranks' rows, router logits and extra tensors."""
        return self._gather_all([hidden_states, router_logits], is_sequence_parallel, extra_tensors)

    @abstractmethod
    def _gather(self, x: torch.Tensor, rows: Sequence[int], transport: Transport) -> torch.Tensor:
        """[rows[rank], width] of this rank -> [sum(rows), width]."""

    def _gather_all(
        self, tensors: list[torch.Tensor], is_sequence_parallel: bool, extra_tensors: list[torch.Tensor] | None
    ) -> tuple[Any, ...]:
        transport = self._group(is_sequence_parallel)
        rows = self._rows(transport, tensors[0].shape[0])
        every = [*tensors, *(extra_tensors or [])]
        flat = [x.reshape(x.shape[0], prod(x.shape[1:])) for x in every]
        moved: list[torch.Tensor] = []
        for together in share_messages(flat, max(rows)):
            message, unpack = pack(together)
            moved += unpack(self._gather(message, rows, transport))
        gathered = [whole.contiguous().view(sum(rows), *x.shape[1:]) for whole, x in zip(moved, every, strict=True)]
        whole = tuple(gathered[: len(tensors)])
        return whole if extra_tensors is None else (*whole, gathered[len(tensors) :])


class HandleCache(Generic[HandleT]):
    """A library's objects by the arguments they were made with: layers of the same sizes share one. Objects live until
    clear(): a layer may ask anew after the one that asked first is gone."""

    def __init__(self) -> None:
        self._handles: dict[tuple[tuple[str, Hashable], ...], HandleT] = {}
        self._lock = threading.RLock()  # micro-batches ask from threads of their own

    def get_or_create(self, kwargs: dict[str, Any], create: Callable[..., HandleT]) -> HandleT:
        """The object for kwargs, made by create(**kwargs) when first asked for."""
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
