"""Every strategy as vLLM's all2all manager, over NCCL and symmetric memory: the reference, also after errors, and in graphs."""

import pytest
import torch

from tests.cuda.conftest import NUM_RANKS, SHARED
from tests.strategy_manager_ranks import GivenStep, cases, exchange, goes_on_after_errors, manager_of, run_cases
from vllm_npu.strategies.table import ALL_STRATEGIES
from vllm_npu.tools.launch import Rank
from vllm_npu.tools.verification import Case

pytestmark = pytest.mark.cuda

STEPS = 10 if SHARED else 100
GRAPH_SHAPE = {
    "tp_size": 1,
    "dp_size": NUM_RANKS,
    "width": 96,
    "hidden_size": 96,
    "num_tokens_across_dp": (8,) * NUM_RANKS,
}


def test_every_strategy_gives_the_reference(gpus):
    every = [case for name in ALL_STRATEGIES for case in cases(name, NUM_RANKS)]
    assert [fault for found in gpus.run(run_cases, every) for fault in found] == []


@pytest.mark.parametrize("name", ALL_STRATEGIES)
def test_good_steps_follow_steps_whose_experts_failed(gpus, name):
    case = cases(name, NUM_RANKS)[1]
    assert [fault for found in gpus.run(goes_on_after_errors, case, STEPS) for fault in found] == []


def captures(rank: Rank, name: str) -> str:
    """Capture an exchange in a CUDA graph, and replay it twice. Returns the fault."""
    case = Case(strategy=name, **GRAPH_SHAPE)
    step = GivenStep(case.num_tokens_across_dp)
    manager = manager_of(rank, case, step)
    x = torch.full((8, 96), rank.rank + 1.0, device=rank.device, dtype=torch.bfloat16)
    weights = torch.full((8, 1), 0.5, device=rank.device)
    ids = (torch.arange(8, device=rank.device, dtype=torch.int32) % case.num_experts)[:, None]

    def run() -> torch.Tensor:
        rows, row_weights, row_ids = manager.dispatch(x, weights, ids)
        first = rank.rank * case.experts_per_rank
        own = (row_ids >= first) & (row_ids < first + case.experts_per_rank)
        return manager.combine((rows.float() * torch.where(own, row_weights, 0.0).sum(1, keepdim=True)).to(x.dtype))

    eager = run()
    torch.cuda.synchronize()
    step.begin(case.num_tokens_across_dp, in_graph=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    for factor in (2.0, 3.0):
        x.fill_(factor * (rank.rank + 1))
        graph.replay()
        torch.cuda.synchronize()
        if not torch.equal(output, eager * factor):
            return f"rank {rank.rank}: not {factor} times the eager output"
    manager.check_failed()
    manager.destroy()
    return ""


@pytest.mark.parametrize("name", ["mc2", "all2all", "allgather", "naive", "symmetric", "auto"])
def test_a_graph_holds_the_exchange(gpus, name):
    """With all2all, the eager step is all2all and the captured one allgather."""
    assert set(gpus.run(captures, name)) == {""}


def takes_a_share_of_the_gpu(rank: Rank) -> list[str]:
    """An exchange on 8 multiprocessors, as in dual batch overlap, and one on all of them after it."""
    case = cases("symmetric", rank.num_ranks)[3]
    step = GivenStep(case.num_tokens_across_dp)
    manager, faults = manager_of(rank, case, step), []
    for num_sms, limit in ((8, 8), (1 << 20, None)):
        manager.set_num_sms(num_sms)
        step.begin(case.num_tokens_across_dp)
        faults += exchange(rank, case, manager)
        if manager.max_sms_used() != limit:
            faults.append(f"{num_sms}: {manager.max_sms_used()}")
    manager.destroy()
    return faults


def test_an_exchange_takes_the_share_of_the_gpu_that_vllm_gives_it(gpus):
    assert [fault for found in gpus.run(takes_a_share_of_the_gpu) for fault in found] == []


def test_the_experts_may_run_on_another_case_between(gpus):
    assert [fault for found in gpus.run(_two_layers) for fault in found] == []


def _two_layers(rank: Rank) -> list[str]:
    """Layers of two widths in one step share a manager."""
    step = GivenStep()
    one, other = (Case(strategy="auto", **GRAPH_SHAPE | {"width": width, "hidden_size": width}) for width in (96, 192))
    step.begin(one.num_tokens_across_dp)
    manager = manager_of(rank, one, step)
    faults = [fault for case in (other, one, other) for fault in exchange(rank, case, manager)]
    manager.destroy()
    return faults
