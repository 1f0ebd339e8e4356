"""vLLM's part in `vllm-npu bench eplb`: its communicators, and the balance that its policy gives a skewed load."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from vllm.distributed.eplb import eplb_communicator as theirs
from vllm.distributed.eplb.eplb_state import EplbState
from vllm.distributed.eplb.policy import DefaultEplbPolicy

from vllm_npu.eplb import open_communicator
from vllm_npu.tools.eplb_benchmark import Mover

# From DeepSeek-V3's config.json. SKEW is an assumption: the expert at place p of the popularity has a chance of p ** -SKEW.
NUM_EXPERTS, TOP_K, MOE_LAYERS = 256, 8, 58
SKEW = 0.6
TOKENS = 65536
CASES = ((8, 0), (8, 32), (32, 0), (32, 32), (64, 0), (64, 64))  # ranks and redundant experts


def vllm_communicators(device: torch.device, groups: Mapping[str, Any]) -> Mapping[str, Mover]:
    """vLLM's communicators by vLLM's names, over the same groups as ours.

    On CPUs only torch_nccl runs, over gloo. torch_gloo does not: it waits for a stream of an accelerator.
    """
    found: dict[str, Mover] = {
        "vLLM torch_nccl": theirs.TorchDistNcclEplbCommunicator(ep_group=groups["device_group"].process_group)
    }
    if device.type == "cuda":
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

        cpu_group = groups["cpu_group"].process_group
        pynccl = PyNcclCommunicator(cpu_group, device)
        found["vLLM torch_gloo"] = theirs.TorchDistGlooStagedEplbCommunicator(cpu_group=cpu_group)
        found["vLLM pynccl"] = theirs.PyNcclEplbCommunicator(pynccl_comm=pynccl)
        found["pynccl"] = open_communicator("cuda", "pynccl", pynccl=pynccl)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """Load of the fullest rank divided by the mean load, summed over layers. 1 is even; the fullest rank slows a step down."""

    seed: int
    ranks: int
    redundant_experts: int
    before: float  # with vLLM's placement at the start
    after: float  # with the placement of vLLM's policy

    @property
    def conditions(self) -> str:
        """The conditions, as a part of a title."""
        load = f"an expert's chance 1 / place ** {SKEW}, seed {self.seed}"
        return f"{NUM_EXPERTS} experts, top-{TOP_K}, {MOE_LAYERS} layers, {load}"


@cache
def draw_load(seed: int) -> torch.Tensor:  # [MOE_LAYERS, NUM_EXPERTS] tokens
    """Draw the load of NUM_EXPERTS experts. Choices of tokens are independent, and each layer prefers other experts."""
    generator = torch.Generator().manual_seed(seed)
    chance = torch.arange(1, NUM_EXPERTS + 1, dtype=torch.float64) ** -SKEW
    preferred = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator) for _ in range(MOE_LAYERS)])
    choices = torch.multinomial(chance[preferred], TOKENS * TOP_K, replacement=True, generator=generator)
    return torch.zeros(MOE_LAYERS, NUM_EXPERTS).scatter_add_(1, choices, torch.ones(choices.shape))


def balance(ranks: int, redundant_experts: int, seed: int) -> Balance:
    """Balance the load of draw_load on this number of ranks."""
    load = draw_load(seed)
    start = EplbState.build_initial_global_physical_to_logical_map(NUM_EXPERTS, redundant_experts)
    before = torch.tensor(start).expand(MOE_LAYERS, -1)
    after = DefaultEplbPolicy.rebalance_experts(load, before.shape[1], 1, 1, ranks, before)
    return Balance(
        seed=seed,
        ranks=ranks,
        redundant_experts=redundant_experts,
        before=imbalance(load, before, ranks),
        after=imbalance(load, after, ranks),
    )


def imbalance(
    load: torch.Tensor,  # [layers, logical experts]
    placement: torch.Tensor,  # [layers, physical experts], the id of each one's logical expert
    ranks: int,
) -> float:
    """The quotient of Balance. Replicas share the load of their expert evenly."""
    replicas = torch.zeros_like(load).scatter_add_(1, placement, torch.ones(placement.shape))
    of_slots = (load / replicas).gather(1, placement)
    of_ranks = of_slots.reshape(load.shape[0], ranks, -1).sum(2)
    return float(of_ranks.amax(1).sum() / of_ranks.mean(1).sum())
