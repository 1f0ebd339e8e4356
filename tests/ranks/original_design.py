"""The original design's prepare/finalize classes as it described them, over our transports: what the fault tests fail on,
and the baseline of the cost table. State lies on self, results are views, and lists of views are gathered into, as there."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from vllm_npu.transport.base import Groups, Transport


def gather_into(outputs: list[torch.Tensor], x: torch.Tensor, transport: Transport) -> None:
    """torch.distributed.all_gather: writes into the given tensors, which must all have x's shape and dtype."""
    if any(output.shape != x.shape or output.dtype != x.dtype for output in outputs):
        raise RuntimeError("invalid tensor size or dtype")
    for output, part in zip(outputs, transport.all_gather(x).chunk(transport.size), strict=True):
        output.copy_(part)


@dataclass
class Original:
    """`context` stands for the forward context, read in the middle of a call."""

    groups: Groups
    context: SimpleNamespace = field(default_factory=SimpleNamespace)


class OriginalSliced(Original):
    """The part that MC2 and All2All share."""

    def target_length(self) -> int:
        raise NotImplementedError

    def prepare(self, hidden_states, router_logits, enable_shared_expert_dp=False, replace_allreduce=False):
        tp = self.groups.tp
        self.skips = enable_shared_expert_dp or replace_allreduce
        if not self.skips:
            self.num_tokens = hidden_states.shape[0]
            pad = self.target_length() - self.num_tokens
            if pad > 0:
                hidden_states = F.pad(hidden_states, (0, 0, 0, pad))
                router_logits = F.pad(router_logits, (0, 0, 0, pad))
            if tp.size > 1:
                self.split_hidden_states = hidden_states.tensor_split(tp.size)
                hidden_states = self.split_hidden_states[tp.rank]
                router_logits = router_logits.tensor_split(tp.size)[tp.rank]
        return hidden_states, router_logits, None

    def finalize(self, hidden_states, reduce_results):
        if not self.skips:
            if self.groups.tp.size > 1:
                gather_into(list(self.split_hidden_states), hidden_states, self.groups.tp)
                hidden_states = torch.cat(self.split_hidden_states)
                del self.split_hidden_states
            if self.num_tokens < hidden_states.shape[0]:
                hidden_states = hidden_states[: self.num_tokens]
        return hidden_states


class OriginalAll2All(OriginalSliced):
    def target_length(self):
        return self.groups.tp.size


class OriginalMC2(OriginalSliced):
    def target_length(self):
        return self.context.padded_num_tokens

    def prepare(self, hidden_states, router_logits, enable_shared_expert_dp=False, replace_allreduce=False):
        mask = self.context.mc2_mask
        if self.groups.tp.size > 1:
            mask = torch.tensor_split(mask, self.groups.tp.size)[self.groups.tp.rank]
        hidden_states, router_logits, _ = super().prepare(
            hidden_states, router_logits, enable_shared_expert_dp, replace_allreduce
        )
        return hidden_states, router_logits, mask


@dataclass
class OriginalAllGather(Original):
    current_dp_group: Transport | None = None  # what get_dp_group() would return at the time of finalize

    def prepare(self, hidden_states, router_logits, enable_shared_expert_dp=False, replace_allreduce=False):
        if self.context.enable_sp:
            return self.groups.ep.all_gather(hidden_states), self.groups.ep.all_gather(router_logits), None
        self.enable_shared_expert_dp = enable_shared_expert_dp
        if self.groups.dp.size > 1:
            self.num_tokens = hidden_states.shape[0]
            pad = self.context.max_tokens_across_dp - self.num_tokens
            if pad > 0:
                hidden_states = F.pad(hidden_states, (0, 0, 0, pad))
                router_logits = F.pad(router_logits, (0, 0, 0, pad))
            hidden_states = self.groups.dp.all_gather(hidden_states)
            router_logits = self.groups.dp.all_gather(router_logits)
        return hidden_states, router_logits, None

    def finalize(self, hidden_states, reduce_results):
        if self.context.enable_sp:
            return self.groups.ep.reduce_scatter(hidden_states)
        if self.groups.dp.size > 1 and not self.enable_shared_expert_dp:
            dp = self.current_dp_group or self.groups.dp
            hidden_states = dp.reduce_scatter(hidden_states)[: self.num_tokens]
        if reduce_results and self.groups.ep.size > 1:
            hidden_states = self.groups.tp.all_reduce(hidden_states)
        return hidden_states


class OriginalNaiveMulticast(Original):
    def multicast(self, x):
        dp = self.groups.dp
        ends = self.cu_tokens
        starts = [0, *ends[:-1]]
        buffer = x.new_empty(ends[-1], x.shape[1])
        buffer[starts[dp.rank] : ends[dp.rank]] = x
        for rank in range(dp.size):
            part = buffer[starts[rank] : ends[rank]]
            part.copy_(dp.broadcast(part, rank))
        return buffer

    def prepare(self, hidden_states, router_logits, enable_shared_expert_dp=False, replace_allreduce=False):
        self.enable_shared_expert_dp = enable_shared_expert_dp
        if self.groups.dp.size > 1:
            self.cu_tokens = self.context.cu_tokens_across_dp
            hidden_states, router_logits = self.multicast(hidden_states), self.multicast(router_logits)
        return hidden_states, router_logits, None

    def finalize(self, hidden_states, reduce_results):
        dp = self.groups.dp
        if dp.size > 1 and not self.enable_shared_expert_dp:
            start = self.cu_tokens[dp.rank - 1] if dp.rank else 0
            hidden_states = dp.all_reduce(hidden_states)[start : self.cu_tokens[dp.rank]]
        if reduce_results and self.groups.ep.size > 1:
            hidden_states = self.groups.tp.all_reduce(hidden_states)
        return hidden_states


def original_all2all_exchange(hidden_states, topk_ids, num_experts, groups: Groups) -> torch.Tensor:
    """The wire of the dispatcher that the original All2All was used with: a row for each (token, expert), there and back,
    after an exchange of counts for each expert. The experts return their input, so the result is top_k times it."""
    ep = groups.ep
    local = num_experts // ep.size
    flat = topk_ids.flatten().long()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts)
    received_counts = ep.all_to_all(counts, [local] * ep.size, [local] * ep.size)
    send = counts.view(ep.size, local).sum(1).tolist()
    receive = received_counts.view(ep.size, local).sum(1).tolist()
    rows = ep.all_to_all(hidden_states[order // topk_ids.shape[1]], send, receive)
    returned = ep.all_to_all(rows, receive, send)
    return torch.zeros_like(hidden_states).index_add_(0, order // topk_ids.shape[1], returned)


def original_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dynamic quantisation in the kernel's order: 127 / 0 is inf, and 0 * inf is NaN. Values before the cast to int8."""
    scale = 127 / x.float().abs().amax(-1, keepdim=True)
    return (x.float() * scale).round(), 1 / scale
