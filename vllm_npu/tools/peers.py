"""Exchanges of other projects: the peers of the strategies in `vllm-npu bench`.

Each peer over c10d's collectives sends every rank's tokens and their routing to all ranks, and adds the ranks' outputs up. Each
rank holds [n, H] hidden states before and after. Ranks with fewer rows than others add padding. FlashInfer's peer sends a token
to the ranks of its experts.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist

from vllm_npu.core.token_layout import offsets, pad_rows
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.transport.base import Transport
from vllm_npu.transport.torch_dist import TorchDistTransport, all_gather_single, reduce_scatter_single

logger = logging.getLogger("vllm.npu.tools.peers")

FLASHINFER_TIMEOUT_SECONDS = 20  # of its kernels that wait for other ranks


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of one rank and their routing."""

    hidden_states: torch.Tensor  # [counts[rank], H]
    router_logits: torch.Tensor  # [counts[rank], E] float32
    topk_weights: torch.Tensor  # [counts[rank], K] float32
    topk_ids: torch.Tensor  # [counts[rank], K] int32
    counts: tuple[int, ...]  # tokens of every rank


@dataclass(frozen=True, slots=True)
class Peer:
    """One exchange, which may run many times."""

    run: Callable[[], torch.Tensor]
    collectives: int
    bytes_sent: int  # by one rank, counted like in RecordingTransport


class PeerExchanges:
    """The peers on one group. Each one is COLLECTIVE over the group."""

    def __init__(self, transport: Transport, tokens: Tokens) -> None:
        inner = transport.innermost
        if not isinstance(inner, TorchDistTransport):
            raise UnsupportedConfigError(
                f"peers run over c10d, not over {type(inner).__name__}; use gloo, nccl or hccl"
            )
        self._group = inner.process_group
        self._device = tokens.hidden_states.device
        self._rank, self._size = inner.rank, inner.size
        self._tokens = tokens
        self._rows = max(tokens.counts)

    def all(self) -> dict[str, Peer]:
        """Every peer by name. Ratios refer to the first one."""
        tokens = self._tokens
        x, logits = tokens.hidden_states, tokens.router_logits
        routing = (tokens.topk_weights, tokens.topk_ids)
        row, gathered = x.shape[1] * x.element_size(), self._rows * (self._size - 1)
        routing_row = sum(each.shape[1] * each.element_size() for each in routing)
        logits_row = logits.shape[1] * logits.element_size()
        own_rows, all_rows = x.shape[0], sum(tokens.counts)
        multicast = own_rows * (self._size - 1) * (row + logits_row)
        multicast += 2 * (self._size - 1) * all_rows * row // self._size
        return {
            "AgRs": Peer(self._agrs, 4, gathered * (2 * row + routing_row)),
            "original allgather": Peer(self._original_allgather, 3, gathered * (2 * row + logits_row)),
            "original multicast": Peer(self._original_multicast, 2 * self._size + 1, multicast),
            "raw all-gather": Peer(lambda: self._gather(x), 1, gathered * row),
            "raw reduce-scatter": Peer(lambda: self._scatter(self._padded_sum()), 1, gathered * row),
            **self._flashinfer(),
        }

    def _flashinfer(self) -> dict[str, Peer]:
        """FlashInfer's one-sided exchange; experts write into its buffer. Empty where it is not installed or cannot run."""
        tokens = self._tokens
        if self._device.type != "cuda" or not has_flashinfer():
            return {}
        x, weights, ids = tokens.hidden_states, tokens.topk_weights, tokens.topk_ids
        num_experts, top_k = tokens.router_logits.shape[1], ids.shape[1]
        try:
            exchange = open_flashinfer(
                self._rank,
                self._size,
                num_experts,
                top_k=top_k,
                max_tokens=self._rows,
                hidden=x.shape[1],
                dtype=x.dtype,
            )
        except (
            RuntimeError,
            ValueError,
        ) as error:  # all ranks get it: the platform or the sizes do not suit FlashInfer
            if self._rank == 0:
                logger.warning("FlashInfer's one-sided exchange is left out: %s", error)
            return {}

        def run() -> torch.Tensor:
            exchange.dispatch(x, ids, weights, runtime_max_tokens_per_rank=self._rows)
            combined: torch.Tensor = exchange.combine(exchange.get_combine_input_buffer(x.dtype))
            return combined

        exchange.dispatch(x, ids, weights, runtime_max_tokens_per_rank=self._rows)
        exchange.combine(exchange.get_combine_input_buffer(x.dtype).normal_())  # never time what was not written
        owners = ids // (num_experts // self._size)
        others = [rank for rank in range(self._size) if rank != self._rank]
        rows = sum(int((owners == rank).any(1).sum()) for rank in others)
        sent = rows * (2 * x.shape[1] * x.element_size() + top_k * (weights.element_size() + ids.element_size()))
        return {"FlashInfer": Peer(run, 2, sent)}

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        padded = pad_rows(x, self._rows)
        gathered = padded.new_empty((self._size * self._rows, x.shape[1]))
        all_gather_single(gathered, padded, group=self._group)
        return gathered

    def _scatter(self, x: torch.Tensor) -> torch.Tensor:
        own = x.new_empty((self._rows, x.shape[1]))
        reduce_scatter_single(own, x, group=self._group)
        return own[: self._tokens.hidden_states.shape[0]]

    def _padded_sum(self) -> torch.Tensor:
        x = self._tokens.hidden_states
        return x.new_empty((self._size * self._rows, x.shape[1]))

    def _coalesced(self) -> AbstractContextManager[object]:
        if self._device.type == "cuda":
            return dist._coalescing_manager(group=self._group, device=self._device)
        return nullcontext()

    def _agrs(self) -> torch.Tensor:
        """vLLM's AgRs: all-gather of hidden states, weights and ids (one NCCL launch on GPUs), reduce-scatter of outputs."""
        tokens = self._tokens
        with self._coalesced():
            gathered = self._gather(tokens.hidden_states)
            self._gather(tokens.topk_weights)
            self._gather(tokens.topk_ids)
        return self._scatter(gathered)

    def _original_allgather(self) -> torch.Tensor:
        """The original design's AllGather: all-gather of hidden states and logits, reduce-scatter of outputs."""
        gathered = self._gather(self._tokens.hidden_states)
        self._gather(self._tokens.router_logits)
        return self._scatter(gathered)

    def _original_multicast(self) -> torch.Tensor:
        """The original design's naive multicast: a broadcast by each rank for each tensor, all-reduce of outputs."""
        starts = offsets(self._tokens.counts)
        own = slice(starts[self._rank], starts[self._rank + 1])
        whole = []
        for x in (self._tokens.hidden_states, self._tokens.router_logits):
            gathered = x.new_empty((starts[-1], x.shape[1]))
            gathered[own] = x
            for rank in range(self._size):
                dist.broadcast(gathered[starts[rank] : starts[rank + 1]], group_src=rank, group=self._group)
            whole.append(gathered)
        dist.all_reduce(whole[0], group=self._group)
        return whole[0][own]


def has_flashinfer() -> bool:
    """Whether a FlashInfer with `flashinfer.moe_ep` is installed."""
    return find_spec("flashinfer") is not None and find_spec("flashinfer.moe_ep") is not None


def open_flashinfer(
    rank: int,
    num_ranks: int,
    num_experts: int,
    *,
    top_k: int,
    max_tokens: int,  # the most of any rank
    hidden: int,
    dtype: torch.dtype,
) -> Any:
    """FlashInfer's NVLinkOneSidedAlltoAll over all ranks and the current GPU. COLLECTIVE.

    Its dispatch, get_combine_input_buffer and combine make an exchange. Raises RuntimeError or ValueError where it cannot run.
    """
    one_sided = "flashinfer.moe_ep.backends.split.comm.nvlink_one_sided"
    sizes = import_module("flashinfer.moe_ep.core.comm.communication").MoEEpCommParams(
        num_experts=num_experts, top_k=top_k, max_tokens_per_rank=max_tokens, hidden_size=hidden, dtype=dtype
    )
    where = import_module("flashinfer.moe_ep.config").BootstrapConfig(
        world_size=num_ranks, rank=rank, device=torch.cuda.current_device()
    )
    config = import_module(f"{one_sided}.config").NVLinkOneSidedConfig(timeout_sec=FLASHINFER_TIMEOUT_SECONDS)
    return import_module(f"{one_sided}.communication").NVLinkOneSidedAlltoAll(where, sizes, config)
