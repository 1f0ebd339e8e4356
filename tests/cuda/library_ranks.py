"""Functions that ranks run in tests of the libraries that the generic managers use."""

import torch
import torch.distributed as dist

from vllm_npu.all2all.deepep import low_latency_bytes
from vllm_npu.all2all.flashinfer import ALL_REDUCE_MAX_BYTES, FlashInferAllReduce, one_sided_workspace_bytes
from vllm_npu.all2all.pplx import PPLXAll2AllManager
from vllm_npu.tools.launch import Rank
from vllm_npu.transport.torch_dist import TorchDistTransport


def pplx_round_trip(rank: Rank) -> str | None:
    groups = rank.groups(tp_size=1, dp_size=rank.num_ranks)
    cpu_group = dist.new_group(backend="gloo")
    num_experts, hidden, tokens = 4 * rank.num_ranks, 512, 16
    manager = PPLXAll2AllManager(groups, list, cpu_group, num_experts=num_experts, max_tokens_per_rank=tokens)
    generator = torch.Generator().manual_seed(rank.rank)
    x = torch.randint(-3, 4, (tokens, hidden), generator=generator).to(rank.device, torch.bfloat16)
    ids = (
        torch.stack([torch.randperm(num_experts, generator=generator)[:2] for _ in range(tokens)]).to(rank.device).int()
    )
    weights = torch.ones(tokens, 2, device=rank.device)
    rows, _, row_ids = manager.dispatch(x, weights, ids)
    own = row_ids[:, 0] // 4 == rank.rank
    output = torch.where(own[:, None], rows * (row_ids + 1), 0)  # an expert multiplies by its id + 1
    combined = manager.combine(output.to(torch.bfloat16))
    expected = x * (ids + 1).sum(1, keepdim=True)
    manager.destroy()
    return (
        None if torch.equal(combined, expected.to(torch.bfloat16)) else f"rank {rank.rank}: not the sum of its experts"
    )


def low_latency_bytes_agree(rank: Rank) -> bool:
    import deep_ep

    return all(
        deep_ep.Buffer.get_low_latency_rdma_size_hint(tokens, hidden, 2, experts)
        == low_latency_bytes(tokens, hidden, experts)
        for tokens, hidden, experts in ((1, 128, 2), (128, 7168, 256), (512, 2048, 64))
    )


def one_sided_bytes_agree(rank: Rank) -> bool:
    from flashinfer.comm import moe_a2a_get_workspace_size_per_rank

    return all(
        moe_a2a_get_workspace_size_per_rank(ep_size, tokens, sent, returned)
        == one_sided_workspace_bytes(
            ep_size=ep_size, max_tokens=tokens, dispatched_row_bytes=sent, returned_row_bytes=returned
        )
        for ep_size, tokens, sent, returned in ((2, 1, 64, 32), (8, 4096, 14400, 14336), (4, 513, 4160, 4096))
    )


def all_reduces(rank: Rank, dtype: torch.dtype) -> list[str]:
    groups = rank.groups(tp_size=rank.num_ranks, dp_size=1)
    if not isinstance(groups.tp, TorchDistTransport):
        return ["the group is not one of c10d"]
    major, minor = torch.cuda.get_device_capability()
    reduce = FlashInferAllReduce(
        dist.new_group(backend="gloo"), groups.tp.process_group, max_bytes=ALL_REDUCE_MAX_BYTES[10 * major + minor]
    )
    faults = []
    for shape in ((1, 2048), (16, 2048), (17, 2048), (256, 2048), (7, 4096), (64, 2048)):
        generator = torch.Generator().manual_seed(shape[0] + rank.rank)
        x = torch.randint(-8, 9, shape, generator=generator).to(rank.device, dtype)
        before = x.clone()
        if not reduce.should_use_fi_ar(x):
            faults.append(f"{shape} is refused")
            continue
        if not torch.equal(reduce.all_reduce(x), groups.tp.all_reduce(x)) or not torch.equal(x, before):
            faults.append(f"{shape} is not the sum")
    if reduce.should_use_fi_ar(x.t()) or reduce.should_use_fi_ar(x.cpu()) or reduce.should_use_fi_ar(x.flatten()):
        faults.append("takes a tensor that it cannot reduce")
    reduce.destroy()
    reduce.destroy()
    return faults
