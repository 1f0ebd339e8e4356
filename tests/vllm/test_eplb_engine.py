"""Experts are counted, placed and moved while real engines serve, and no token changes.

`vllm-npu demo --eplb` runs more topologies, and `--eplb --full` all of them. Here it is one, in detail.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm import eplb_probe
from tests.vllm.forked_engine import FORKED
from vllm_npu.strategies.table import STRATEGIES
from vllm_npu.tools.demo.vanilla_demo import DP2_EP
from vllm_npu.tools.engines.engine_set import EngineSet, Generation
from vllm_npu.tools.engines.tiny_models import DEMO_MAX_TOKENS, QWEN3_MOE, TinyModel, demo_prompts

pytestmark = pytest.mark.slow

WINDOW = 5  # steps; experts move after as many
REDUNDANT = 4
RANKS = 2


def test_no_token_changes_while_experts_move(
    checkpoint: Callable[[TinyModel], Path],
    vanilla_tokens: Callable[[TinyModel], list[list[int]]],
    caches: Path,
    tmp_path: Path,
    shared_memory_unchanged: None,
) -> None:
    """Every strategy in one pair of engines. The first tokens come before the first move; idle ranks take part in moves."""
    expected = vanilla_tokens(QWEN3_MOE)[: len(DEMO_MAX_TOKENS)]
    engines = EngineSet(
        checkpoint(QWEN3_MOE),
        DP2_EP,
        strategies=list(STRATEGIES),
        prompts=demo_prompts(),
        max_tokens=DEMO_MAX_TOKENS,
        folder=tmp_path / "engines",
        caches=caches,
        **FORKED,
        engine_args={
            "enable_eplb": True,
            "eplb_config": {
                "num_redundant_experts": REDUNDANT,
                "window_size": WINDOW,
                "step_interval": WINDOW,
                "use_async": False,
            },
            "worker_extension_cls": eplb_probe.PATH,
        },
    )
    placement: list[list[int]] | None = None
    dummy_steps = 0
    with engines:
        engines.wait_until_ready()
        for strategy in STRATEGIES:
            generation = engines.generate()
            assert generation.tokens == expected, strategy
            assert [worker["strategy"] for worker in generation.counters] == [strategy] * RANKS
            assert all(worker["eplb"]["experts_received"] > 0 for worker in generation.counters)
            placement = check_rearrangements(generation, placement)
            dummy_steps += sum(worker["probe"]["dummy_steps"] for worker in generation.counters)
    assert dummy_steps > 0, "no rank was idle in any step"


def check_rearrangements(generation: Generation, placement: list[list[int]] | None) -> list[list[int]]:
    """Check every rearrangement, and return the last placement.

    The load equals the routed tokens, the placement is the one of vLLM's policy for that load, and every slot has its expert.
    """
    probes = [worker["probe"] for worker in generation.counters]
    if placement is None:
        placement = probes[0]["initial"]
    weights = weights_of_experts(probes)
    notes = [probe["notes"] for probe in probes]
    assert len(notes[0]) >= 2, "experts moved too seldom"
    assert [worker["eplb"]["rearrangements"] for worker in generation.counters] == [len(notes[0])] * RANKS
    for of_ranks in zip(*notes, strict=True):
        routed = torch.tensor([note["recent"] for note in of_ranks]).sum(0)
        assert routed.sum() > 0
        wanted = placement_by_policy(routed, placement)
        for rank, note in enumerate(of_ranks):
            assert note["load"] == routed.tolist()
            assert note["placement"] == wanted
            slots = len(wanted[0]) // RANKS
            for layer, experts in enumerate(wanted):
                own = experts[rank * slots : (rank + 1) * slots]
                assert note["experts"][layer] == [weights[layer, expert] for expert in own]
        placement = wanted
    return placement


def weights_of_experts(probes: list[dict[str, Any]]) -> dict[tuple[int, int], str]:
    """The weights by layer and logical expert, from the slots as they were loaded. All slots of an expert must be equal."""
    weights: dict[tuple[int, int], str] = {}
    for layer, experts in enumerate(probes[0]["initial"]):
        loaded = [digest for probe in probes for digest in probe["experts"][layer]]
        for expert, digest in zip(experts, loaded, strict=True):
            assert weights.setdefault((layer, expert), digest) == digest
    assert len(set(weights.values())) == len(weights), "experts that are equal prove nothing"
    return weights


def placement_by_policy(load: torch.Tensor, placement: list[list[int]]) -> list[list[int]]:
    """The placement that vLLM's policy makes of `load` [layers, logical experts] and the placement before."""
    from vllm.distributed.eplb.policy import DefaultEplbPolicy

    before = torch.tensor(placement)
    after: list[list[int]] = DefaultEplbPolicy.rebalance_experts(load, before.shape[1], 1, 1, RANKS, before).tolist()
    return after
