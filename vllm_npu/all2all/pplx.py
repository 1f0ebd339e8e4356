"""PPLX (github.com/perplexityai/pplx-kernels): tokens go to slots of their experts. vLLM no longer ships this manager.

The kernels return [experts, slots, hidden_size] and the number of filled slots of each expert. dispatch() returns each slot
as a row with one id, for vLLM's gathering experts. An empty slot has the id of another rank's expert. On the way back the
kernels apply the weights and add up.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from vllm_npu.all2all.base import All2AllManager, HandleCache, RowsOfRanks, Taken
from vllm_npu.core.topology import ExpertPlacement
from vllm_npu.errors import HandleMismatchError, InvalidInputError, UnsupportedConfigError
from vllm_npu.strategies.dispatch.rows_with_ids import RowsWithIds
from vllm_npu.transport.base import Groups

logger = logging.getLogger("vllm.npu.all2all.pplx")  # vLLM shows the messages of loggers below "vllm"

ROW_ALIGNMENT = 16  # bytes that the kernels copy at once


@dataclass(frozen=True, slots=True, kw_only=True)
class PPLXSizes:
    """The size arguments of pplx_kernels.AllToAll. Equal on all ranks."""

    max_num_tokens: int  # most tokens of one rank in any step
    num_experts: int
    experts_per_token: int
    hidden_dim: int
    hidden_dim_bytes: int
    hidden_dim_scale_bytes: int

    @classmethod
    def of(
        cls, *, max_num_tokens: int, num_experts: int, top_k: int, hidden_size: int, element_size: int
    ) -> "PPLXSizes":
        """Return the sizes for unquantised rows. Raises UnsupportedConfigError for rows that the kernels cannot copy."""
        row_bytes = hidden_size * element_size
        if row_bytes % ROW_ALIGNMENT:
            raise UnsupportedConfigError(
                f"PPLX's kernels copy rows of a multiple of {ROW_ALIGNMENT} bytes, not {row_bytes} (hidden_size={hidden_size})"
            )
        return cls(
            max_num_tokens=max_num_tokens,
            num_experts=num_experts,
            experts_per_token=top_k,
            hidden_dim=hidden_size,
            hidden_dim_bytes=row_bytes,
            hidden_dim_scale_bytes=0,
        )

    def slots_per_expert(self, world_size: int) -> int:
        """Slots of one local expert: enough for all tokens of all ranks, which may all choose the same expert."""
        return self.max_num_tokens * world_size


@dataclass(frozen=True, slots=True)
class _InFlight:
    all_to_all: Any
    sizes: PPLXSizes
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    num_tokens: int
    micro_batch: int


class PPLXAll2AllManager(All2AllManager):
    """Exchange through PPLX's kernels. Host sync: no. Graph capture: yes.

    One exchange may be in flight at a time, since the kernels have one set of buffers. Ranks of one host need peer access.
    Ranks of several hosts need NVSHMEM, which the constructor starts: the constructor is COLLECTIVE then.
    """

    name = "pplx"

    def __init__(
        self,
        groups: Groups,
        rows_of_ranks: RowsOfRanks,
        cpu_group: dist.ProcessGroup,
        *,
        num_experts: int,
        max_tokens_per_rank: int,  # most rows that a rank brings to a step
        internode: bool = False,  # whether the ranks are on several hosts
        micro_batch: Callable[[], int] = lambda: 0,  # number of the micro-batch that the calling thread works on
    ) -> None:
        super().__init__(groups, rows_of_ranks, cpu_group)
        self.placement = ExpertPlacement(num_experts, self.world_size)
        self.max_tokens_per_rank = max_tokens_per_rank
        self.internode = internode
        self._micro_batch = micro_batch
        self._handles: HandleCache[Any] = HandleCache()
        self._in_flight: _InFlight | None = None
        self._group_of_handles = cpu_group
        if internode:
            self._start_nvshmem(cpu_group)

    def get_handle(self, kwargs: dict[str, Any]) -> Any:
        """Return the pplx_kernels.AllToAll for the fields of PPLXSizes. COLLECTIVE in the first call with these sizes."""
        pplx = _library()
        arguments = {**kwargs, "rank": self.rank, "world_size": self.world_size, "dp_size": 1}
        if self.internode:
            return self._handles.get_or_create(arguments, pplx.AllToAll.internode)
        arguments["group_name"] = self._group_of_handles.group_name
        return self._handles.get_or_create(arguments, pplx.AllToAll.intranode)

    def _dispatch(self, tokens: RowsWithIds, is_sequence_parallel: bool) -> RowsWithIds:
        """Return rows [local experts * slots, hidden_size], each with the weight 1 and one id."""
        hidden_states, topk_weights, topk_ids, extra_tensors = tokens
        if extra_tensors:
            raise UnsupportedConfigError("all2all pplx sends unquantised rows only; choose naive or agrs")
        if not is_sequence_parallel and self.dp_world_size != self.world_size:
            raise UnsupportedConfigError(
                "all2all pplx needs tokens that no two ranks share; run the model sequence parallel, or with "
                "--tensor-parallel-size 1"
            )
        micro_batch = self._micro_batch()
        if self._in_flight is not None:
            if self._in_flight.micro_batch != micro_batch:
                raise HandleMismatchError(
                    f"PPLXAll2AllManager.dispatch in micro-batch {micro_batch} before the combine of micro-batch "
                    f"{self._in_flight.micro_batch}; start vLLM without --enable-dbo"
                )
            logger.warning("An exchange of micro-batch %d had no combine, its buffers are free again", micro_batch)
            self._in_flight = None
        num_tokens, hidden_size = hidden_states.shape
        if num_tokens > self.max_tokens_per_rank:
            raise InvalidInputError(
                f"{num_tokens} rows on rank {self.rank}, PPLX's buffers take {self.max_tokens_per_rank}"
            )
        sizes = PPLXSizes.of(
            max_num_tokens=self.max_tokens_per_rank,
            num_experts=self.placement.num_experts,
            top_k=topk_ids.shape[1],
            hidden_size=hidden_size,
            element_size=hidden_states.element_size(),
        )
        all_to_all = self.get_handle({name: getattr(sizes, name) for name in PPLXSizes.__dataclass_fields__})
        local, slots = self.placement.experts_per_rank, sizes.slots_per_expert(self.world_size)
        counts = torch.empty(local, dtype=torch.int32, device=hidden_states.device)
        rows = hidden_states.new_empty((local, slots, hidden_size))
        indices = topk_ids.to(torch.int32).view(torch.uint32)
        all_to_all.dispatch(
            out_expert_num_tokens=counts,
            out_expert_x=rows,
            out_expert_x_scale=None,
            dp_x=hidden_states.contiguous(),
            dp_x_scale=None,
            indices=indices,
            bound_m=None,
        )
        self._note(Taken(self.name, self.name), captured=True)  # a graph can take it as well
        self._in_flight = _InFlight(all_to_all, sizes, topk_weights.float(), indices, num_tokens, micro_batch)
        ids = ids_of_slots(counts, slots, rank=self.rank, world_size=self.world_size)
        return RowsWithIds(rows.view(local * slots, hidden_size), torch.ones_like(ids, dtype=torch.float32), ids)

    def combine(self, hidden_states: torch.Tensor, is_sequence_parallel: bool = False) -> torch.Tensor:
        """Return the weighted sum of each token's experts. The kernels apply the weights."""
        sent = self._in_flight
        if sent is None:
            raise HandleMismatchError("PPLXAll2AllManager.combine without a dispatch")
        self._in_flight = None
        slots = sent.sizes.slots_per_expert(self.world_size)
        output = hidden_states.new_empty((sent.num_tokens, hidden_states.shape[1]))
        sent.all_to_all.combine(
            out_tokens=output,
            indices=sent.topk_ids,
            weights=sent.topk_weights,
            expert_y=hidden_states.view(self.placement.experts_per_rank, slots, hidden_states.shape[1]),
            bound_m=None,
        )
        return output

    def destroy(self) -> None:
        """Release the kernels' buffers, and end NVSHMEM where the constructor started it. COLLECTIVE between hosts."""
        self._handles.clear(lambda handle: handle.destroy())
        if self.internode:
            self.internode = False
            _nvshmem().nvshmem_finalize()

    def _start_nvshmem(self, cpu_group: dist.ProcessGroup) -> None:
        nvshmem = _nvshmem()
        unique_id = nvshmem.nvshmem_get_unique_id() if self.rank == 0 else nvshmem.nvshmem_alloc_empty_unique_id()
        dist.broadcast(unique_id, group_src=0, group=cpu_group)
        nvshmem.nvshmem_init(unique_id, self.rank, self.world_size)


def ids_of_slots(
    counts: torch.Tensor,  # [local experts] int32: filled slots of each expert
    slots: int,
    *,
    rank: int,
    world_size: int,
) -> torch.Tensor:  # [local experts * slots, 1] int32
    """Return the global expert id of each slot. No host sync.

    An empty slot has the id of the next rank's first expert, so that this rank's experts leave the slot out.
    """
    local = counts.shape[0]
    experts = torch.arange(rank * local, (rank + 1) * local, dtype=torch.int32, device=counts.device)[:, None]
    filled = torch.arange(slots, device=counts.device)[None, :] < counts[:, None]
    return torch.where(filled, experts, (rank + 1) % world_size * local).view(local * slots, 1)


def _library() -> ModuleType:
    import pplx_kernels

    return pplx_kernels


def _nvshmem() -> ModuleType:
    import pplx_kernels.nvshmem

    return pplx_kernels.nvshmem
