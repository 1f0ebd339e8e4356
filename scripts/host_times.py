#!/usr/bin/env python3
"""Measures the host's time of prepare + finalize on the emulated Ascend device, and prints a table.

Usage: host_times.py [--ranks N] [--rounds N] [--layers N]
with the python of `scripts/setup.sh --emulator`, on an idle machine

Three ways in one run, taking turns: the call sequence of vllm-ascend's PrepareAndFinalize classes (written here from its
documented behaviour: it is not vllm-ascend's code), this package through torch.distributed, and this package through its C++
operators. Streams run on threads of their own, so a call returns before the collective has run, as on a device; what is
measured is the processor time of the calling thread, for each of --layers layers in a row. Every number is of the emulated
device: it says what the host does for each layer, nothing about an NPU. An op that computes (F.pad, torch.cat; of the three
ways only vllm-ascend's calls have them) runs on the calling thread there and waits for the stream first: with --layers 1 that
wait is short.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles

import torch
import torch.distributed as dist
import torch.nn.functional as F

from vllm_npu.emulator import launcher
from vllm_npu.prepare_finalize.base import PrepareAndFinalize
from vllm_npu.step_plan import StepPlan, TokenSharding
from vllm_npu.strategies import build
from vllm_npu.transport.base import Groups
from vllm_npu.transport.launch import ProcessRankPool, Rank
from vllm_npu.transport.recording import CollectiveCounter, record

HIDDEN, EXPERTS, TOP_K = 2048, 64, 8
WARM_UP = 5
FAMILY = "A3"
WAYS = ("vllm-ascend's calls", "torch.distributed", "C++ operators")
# strategy: tokens of each rank of its group, for N ranks
WORKLOADS: dict[str, Callable[[int], list[tuple[int, ...]]]] = {
    "allgather": lambda n: [(8,) * n, (8,) + (5,) * (n - 1), (64,) * n],  # over DP
    "all2all": lambda n: [(4 * n,), (32 * n,)],  # over TP: of all its ranks together
}


class AscendAllGather:
    """Pad to the most tokens, gather hidden states and logits; reduce-scatter, slice."""

    def __init__(self, group: dist.ProcessGroup, most: int) -> None:
        self.group, self.most, self.size = group, most, dist.get_world_size(group)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        gathered = torch.empty((x.shape[0] * self.size, *x.shape[1:]), dtype=x.dtype, device=x.device)
        dist.all_gather_into_tensor(gathered, x, group=self.group)
        gathered = gathered.reshape((self.size, *x.shape)).movedim(0, 0)
        return gathered.reshape((self.size * x.shape[0], *x.shape[1:]))

    def run(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.shape[0]
        if self.most > tokens:
            hidden_states = F.pad(hidden_states, (0, 0, 0, self.most - tokens))
            logits = F.pad(logits, (0, 0, 0, self.most - tokens))
        hidden_states, logits = self.all_gather(hidden_states), self.all_gather(logits)
        whole = hidden_states.movedim(0, 0).contiguous()
        own = torch.empty((whole.shape[0] // self.size, *whole.shape[1:]), dtype=whole.dtype, device=whole.device)
        dist.reduce_scatter_tensor(own, whole, group=self.group)
        return own.movedim(0, 0).contiguous()[:tokens]

    def cost(self) -> tuple[int, int]:
        """Collectives, and bytes that a rank sends."""
        return 3, (self.size - 1) * self.most * (2 * 2 * HIDDEN + 2 * EXPERTS)


class AscendAll2All:
    """Pad to one token a rank, split hidden states and logits over TP; gather the slices, concatenate, slice."""

    def __init__(self, group: dist.ProcessGroup, tokens: int) -> None:
        self.group, self.tokens, self.size = group, tokens, dist.get_world_size(group)

    def run(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        tokens, rank = hidden_states.shape[0], dist.get_rank(self.group)
        if self.size > tokens:
            hidden_states = F.pad(hidden_states, (0, 0, 0, self.size - tokens))
            logits = F.pad(logits, (0, 0, 0, self.size - tokens))
        slices = torch.tensor_split(hidden_states, self.size)
        own, _ = slices[rank], torch.tensor_split(logits, self.size)[rank]
        dist.all_gather(list(slices), own, group=self.group)
        return torch.cat(slices)[:tokens]

    def cost(self) -> tuple[int, int]:
        """Collectives, and bytes that a rank sends."""
        return 1, (self.size - 1) * self.tokens // self.size * 2 * HIDDEN


def transports_of(groups: Groups, with_ops: bool, counter: CollectiveCounter | None) -> Groups:
    """The same groups with the operators, or as they are where a rank lacks these; counted where there is a counter."""
    found = []
    for each in (groups.tp, groups.dp, groups.ep):
        transport = type(each)(each.process_group, each.group)
        if not with_ops:
            transport._has_ops = lambda: False
        found.append(record(transport, counter))
    return Groups(groups.topology, *found)


def measure(
    rank: Rank, strategy: str, counts: tuple[int, ...], rounds: int, layers: int
) -> list[tuple[list[float], int, int]]:
    """For each way: microseconds of each round, collectives and bytes sent by this rank."""
    over_dp = strategy == "allgather"
    groups = rank.groups(tp_size=1 if over_dp else rank.num_ranks, dp_size=rank.num_ranks if over_dp else 1)
    step = StepPlan(num_tokens_across_dp=counts, sharding=TokenSharding.REPLICATED)
    tokens = counts[groups.topology.dp_rank]
    with rank.device:
        hidden_states = torch.randn(tokens, HIDDEN, device="cpu").bfloat16().to(rank.device)
        logits = torch.randn(tokens, EXPERTS, device="cpu").bfloat16().to(rank.device)
        weights, ids = torch.rand(tokens, TOP_K), torch.zeros(tokens, TOP_K, dtype=torch.int32)

    group = (groups.dp if over_dp else groups.tp).process_group
    ascend = AscendAllGather(group, max(counts)) if over_dp else AscendAll2All(group, tokens)
    runs: list[tuple[Callable[[], object], int, int]] = [(lambda: ascend.run(hidden_states, logits), *ascend.cost())]
    for with_ops in (False, True):

        def there_and_back(stages: PrepareAndFinalize) -> torch.Tensor:
            prepared = stages.prepare(hidden_states, (weights, ids), step)
            return stages.finalize(prepared.hidden_states, prepared.handle).hidden_states

        counter = CollectiveCounter()
        counted, bare = (
            build(strategy, transports_of(groups, with_ops, each), EXPERTS).prepare_finalize for each in (counter, None)
        )
        there_and_back(counted)
        runs.append((partial(there_and_back, bare), counter.calls.total(), counter.bytes_sent.total()))
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(WARM_UP + rounds):
        for (function, _, _), taken in zip(runs, times, strict=True):
            torch.accelerator.synchronize()
            groups.ep.barrier()
            torch.accelerator.synchronize()
            start = time.thread_time()
            results = [function() for _ in range(layers)]
            end = time.thread_time()
            torch.accelerator.synchronize()
            del results
            if turn >= WARM_UP:
                taken.append((end - start) * 1e6 / layers)
    return [(taken, calls, sent) for taken, (_, calls, sent) in zip(times, runs, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    os.environ.setdefault("VLLM_NPU_EMULATOR_SOC", FAMILY)
    os.environ.setdefault("VLLM_NPU_EMULATOR_ASYNC", "1")
    print(f"Load before: {os.getloadavg()[0]:.2f}. {len(os.sched_getaffinity(0))} cores, {options.ranks} ranks, hidden size "
          f"{HIDDEN} in bfloat16, {EXPERTS} experts, top-{TOP_K}, "
          f"{options.rounds} rounds of {options.layers} layers.\n")  # fmt: skip
    print("| emulated | tokens | by | host µs (median) | p10 | p90 | of vllm-ascend's | collectives | bytes sent |")
    print("|---|---|---|---|---|---|---|---|---|")
    with launcher.emulated_devices(options.ranks), ProcessRankPool(options.ranks, transport="hccl") as pool:
        for strategy, workloads in WORKLOADS.items():
            for counts in workloads(options.ranks):
                by_rank = pool.run(measure, strategy, counts, options.rounds, options.layers)
                base = 0.0
                for i, way in enumerate(WAYS):
                    taken = [max(each) for each in zip(*(ways[i][0] for ways in by_rank), strict=True)]
                    tenths = quantiles(taken, n=10)
                    base = base or median(taken)
                    calls, sent = by_rank[0][i][1], sum(ways[i][2] for ways in by_rank)
                    print(f"| {strategy} | {'/'.join(map(str, counts))} | {way} | {median(taken):,.0f} | {tenths[0]:,.0f} "
                          f"| {tenths[8]:,.0f} | {median(taken) / base:.2f} | {calls} | {sent:,} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
