"""Run on each rank to test the strategies as vLLM's all2all manager.

The forward context is vLLM's. The process groups are those of the ranks. The experts read rows, weights and ids as vLLM's do.
"""

import torch
import torch.distributed as dist
from vllm.forward_context import DPMetadata, ForwardContext, override_forward_context

from vllm_npu.core.step_plan import TokenSharding
from vllm_npu.plugin.gpu.strategy_manager import StrategyAll2AllManager
from vllm_npu.tools.launch import Rank
from vllm_npu.tools.verification import Case, CaseTensors


def run_cases(rank: Rank, cases: list[Case]) -> list[str]:
    """Return the faults that this rank finds. COLLECTIVE."""
    cpu_group = dist.new_group(backend="gloo")
    return [f"{case}: {fault}" for case in cases for fault in _run(rank, case, cpu_group)]


def _run(rank: Rank, case: Case, cpu_group: dist.ProcessGroup) -> list[str]:
    groups = rank.groups(tp_size=case.tp_size, dp_size=case.dp_size)
    topology = groups.topology
    manager = StrategyAll2AllManager(
        groups, cpu_group, strategy=case.strategy, num_experts=case.num_experts, graphs=False
    )
    tensors = CaseTensors.of(case)
    hidden_states, weights, ids = tensors.input_of(topology, case.sharding, rank.device)
    ids = ids.int()
    matrices = tensors.experts.weights.to(rank.device)
    first = topology.ep_rank * case.experts_per_rank
    counts = torch.tensor(case.num_tokens_across_dp, dtype=torch.int32)
    context = ForwardContext(no_compile_layers={}, attn_metadata={}, slot_mapping={}, dp_metadata=DPMetadata(counts))
    sequence_parallel = case.sharding is TokenSharding.SLICED_OVER_TP
    with override_forward_context(context):
        for _ in range(3):  # exceptions of the experts: no combine follows, and nothing may be lost by that
            manager.dispatch(hidden_states, weights, ids, sequence_parallel)
        rows, row_weights, row_ids = manager.dispatch(hidden_states, weights, ids, sequence_parallel)
        faults = [f"rank {rank.rank}: not contiguous" for x in (rows, row_weights, row_ids) if not x.is_contiguous()]
        if bool((row_ids < 0).any()) or row_ids.shape != row_weights.shape:
            faults.append(f"rank {rank.rank}: ids below 0, or of another shape than the weights")
        output = torch.zeros(rows.shape[0], case.width, device=rank.device)
        for expert in range(first, first + case.experts_per_rank):
            row, k = (row_ids == expert).nonzero(as_tuple=True)
            output.index_add_(0, row, (rows[row] @ matrices[expert]).float() * row_weights[row, k, None])
        combined = manager.combine(output.to(case.dtype), sequence_parallel)
    expected = tensors.expected_on(topology, case.sharding)
    if not torch.equal(combined[: expected.shape[0]].cpu(), expected):
        faults.append(f"rank {rank.rank}: not the reference")
    manager.destroy()
    return faults


def cases(strategy: str, num_ranks: int) -> list[Case]:
    """Full steps, uneven steps and steps in which some ranks have no tokens, each with data parallelism alone and with sequence
    parallelism over TP2."""
    grids = [(1, num_ranks, TokenSharding.REPLICATED), (2, num_ranks // 2, TokenSharding.SLICED_OVER_TP)]
    found = []
    for tp_size, dp_size, sharding in grids:
        for counts in ((4, 4, 4, 4), (5, 1, 3, 2), (0, 7, 0, 1), (64, 64, 64, 64)):
            own = counts[:dp_size]
            shape = {"tp_size": tp_size, "dp_size": dp_size, "sharding": sharding, "width": 96, "hidden_size": 96}
            found.append(Case(strategy=strategy, num_tokens_across_dp=own, seed=sum(own), **shape))
    return found
