"""Run on each rank to test a gathering all2all manager, on any transport."""

import torch

from vllm_npu.all2all import manager_class
from vllm_npu.tools.launch import Rank

COUNTS = {2: ((3, 1), (0, 4), (5, 5), (400, 300)), 4: ((3, 1, 0, 2), (4, 4, 4, 4), (0, 0, 0, 1), (301, 7, 64, 128))}
WIDTH, TOP_K, EXPERTS = 2048, 2, 8


def exchanges(rank: Rank, name: str) -> list[str]:
    """Return the faults of all steps: with data parallelism alone, and with sequence parallelism over TP2."""
    faults = []
    for counts in COUNTS[rank.num_ranks]:
        for tp_size in (1, 2):
            faults += [
                f"{name} {counts} tp{tp_size} rank {rank.rank}: {fault}"
                for fault in _exchange(rank, name, counts, tp_size)
            ]
    return faults


def _exchange(rank: Rank, name: str, counts: tuple[int, ...], tp_size: int) -> list[str]:
    groups = rank.groups(tp_size=tp_size, dp_size=rank.num_ranks // tp_size)
    manager = manager_class(name)(groups, lambda: counts)
    sequence_parallel = tp_size > 1  # then the exchange is over EP, which has all ranks
    generator = torch.Generator().manual_seed(sum(counts))
    whole = [
        torch.randint(-3, 4, (sum(counts), WIDTH), generator=generator).to(torch.bfloat16),
        torch.rand(sum(counts), TOP_K, generator=generator),
        torch.randint(EXPERTS, (sum(counts), TOP_K), generator=generator).to(torch.int32),
        torch.rand(sum(counts), generator=generator),  # an extra tensor, as scales are
    ]
    whole = [x.to(rank.device) for x in whole]
    start = sum(counts[: rank.rank])
    own = [x[start : start + counts[rank.rank]].clone() for x in whole]
    before = [x.clone() for x in own]
    hidden, weights, ids, (extra,) = manager.dispatch(*own[:3], sequence_parallel, [own[3]])
    faults = [
        what
        for what, got, expected in zip(
            ("rows", "weights", "ids", "extra"), (hidden, weights, ids, extra), whole, strict=True
        )
        if got.dtype != expected.dtype or not torch.equal(got, expected)
    ]
    plain = manager.dispatch(*own[:3], sequence_parallel)
    if len(plain) != 3 or not torch.equal(plain[0], whole[0]):
        faults.append("dispatch without extra tensors")
    routed = manager.dispatch_router_logits(own[0], own[1], sequence_parallel)
    if len(routed) != 2 or not torch.equal(routed[1], whole[1]):
        faults.append("dispatch_router_logits")
    combined = manager.combine(hidden * (rank.rank + 1), sequence_parallel)
    if not torch.equal(combined, own[0] * sum(range(1, rank.num_ranks + 1))):
        faults.append("combine")
    faults += ["an input was written to" for a, b in zip(own, before, strict=True) if not torch.equal(a, b)]
    manager.destroy()
    return faults
