"""Offline engines in every topology, compiled and eager, against vanilla vLLM on one worker: token for token.

Each test starts its engines once and switches the living engines from strategy to strategy. The last act of a test may end its
engines: by the death of a process, or by Ctrl-C.
"""

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.time_limits import PATIENCE_SECONDS, on_this_machine
from tests.vllm.forked_engine import FORKED
from tests.vllm.processes import free_ports
from tests.vllm.transformers_reference import write_minimax_m2
from vllm_npu.strategies.table import STRATEGIES
from vllm_npu.tools.demo.vanilla_demo import DP2_EP, DP3_EP, SAFE_MARGIN, TP2_DP2_EP, TP2_EP, compare
from vllm_npu.tools.engines.engine_processes import EngineFailedError, Parallelism, engine_environment
from vllm_npu.tools.engines.engine_set import EngineSet, Generation
from vllm_npu.tools.engines.process_tree import ProcessTree
from vllm_npu.tools.engines.stop_signals import Interrupted, StopSignals
from vllm_npu.tools.engines.tiny_models import DEEPSEEK_V2, DEMO_MAX_TOKENS, QWEN3_MOE, TinyModel, demo_prompts

pytestmark = pytest.mark.slow

REPORT_SECONDS = 30  # from a rank's death to the report of another rank, on a quiet machine
# The first strategy once more in the end: coming back must work as well.
TOPOLOGIES = ["2x1", "1x2", "2x1"]  # tensor-parallel size x data-parallel size
EVERY_STRATEGY_AND_BACK = [*STRATEGIES, next(iter(STRATEGIES))]

Checkpoint = Callable[[TinyModel], Path]
VanillaTokens = Callable[[TinyModel], list[list[int]]]


def assert_same_tokens(generation: Generation, vanilla: list[list[int]], model: TinyModel) -> None:
    """All tokens are vanilla's, the strategy that was asked for generated them, and ranks communicated."""
    expected = vanilla[: len(DEMO_MAX_TOKENS)]
    row = compare(generation, expected, model=model, topology="", mode="")
    assert generation.tokens == expected, row.first_difference
    assert row.strategies_run == [generation.strategy], generation.counters
    assert all(worker["steps"] > 0 and sum(worker["calls"].values()) > 0 for worker in generation.counters)
    assert row.bytes_sent_per_token_per_layer > 0


@pytest.mark.parametrize(
    "parallelism",
    [
        # With vLLM's sequence parallelism inside the MoE blocks only: whole rows travel between the decoder layers.
        pytest.param(TP2_DP2_EP, id="tp2-dp2-ep"),
        pytest.param(TP2_EP, id="tp2-ep"),
        # 8 experts: two ranks have one more than the third.
        pytest.param(DP3_EP, id="dp3-ep", marks=pytest.mark.nightly),
    ],
)
def test_a_model_with_shared_experts(
    parallelism: Parallelism,
    checkpoint: Checkpoint,
    vanilla_tokens: VanillaTokens,
    caches: Path,
    tmp_path: Path,
    shared_memory_unchanged: None,
) -> None:
    expected = vanilla_tokens(DEEPSEEK_V2)
    with engines_for(parallelism, EVERY_STRATEGY_AND_BACK, checkpoint(DEEPSEEK_V2), caches, tmp_path) as engines:
        engines.wait_until_ready()
        for _ in EVERY_STRATEGY_AND_BACK:
            assert_same_tokens(engines.generate(), expected, DEEPSEEK_V2)


def test_a_layer_that_guesses_its_rows_computes_right_under_every_outer_name(
    checkpoint: Checkpoint, vanilla_tokens: VanillaTokens, caches: Path, tmp_path: Path, shared_memory_unchanged: None
) -> None:
    """Mistral Large 3 is another outer class around DeepSeek-V2's decoder layer. The demo has steps of one token."""
    outer = replace(
        DEEPSEEK_V2,
        family="mistral-large-3",
        config={**DEEPSEEK_V2.config, "architectures": ["MistralLarge3ForCausalLM"]},
    )
    expected = vanilla_tokens(DEEPSEEK_V2)
    strategies = ["allgather", "all2all"]
    with engines_for(TP2_DP2_EP, strategies, checkpoint(outer), caches, tmp_path) as engines:
        engines.wait_until_ready()
        for _ in strategies:
            assert_same_tokens(engines.generate(), expected, outer)


def test_tokens_are_those_of_transformers(caches: Path, tmp_path: Path, shared_memory_unchanged: None) -> None:
    """MiniMax-M2, which vanilla vLLM cannot route on a CPU."""
    model = tmp_path / "model"
    expected = write_minimax_m2(model)
    assert expected.smallest_margin > SAFE_MARGIN, "a near tie: identical tokens would prove nothing"
    strategies = list(STRATEGIES)
    with engines_for(DP2_EP, strategies, model, caches, tmp_path) as engines:
        engines.wait_until_ready()
        for strategy in strategies:
            generation = engines.generate()
            assert generation.tokens == expected.tokens, strategy
            assert all(sum(worker["calls"].values()) > 0 for worker in generation.counters), strategy


def test_sequence_parallel_ranks_and_ctrl_c(
    checkpoint: Checkpoint, vanilla_tokens: VanillaTokens, caches: Path, tmp_path: Path, shared_memory_unchanged: None
) -> None:
    """TP2xDP2xEP. Then Ctrl-C comes while both engines generate, and they leave nothing behind."""
    expected = vanilla_tokens(QWEN3_MOE)
    strategies = [*EVERY_STRATEGY_AND_BACK, "all2all"]
    model = checkpoint(QWEN3_MOE)
    trees: list[ProcessTree] = []
    exit_status = 0
    try:
        with (
            StopSignals() as stop_signals,
            engines_for(TP2_DP2_EP, strategies, model, caches, tmp_path, stop_signals=stop_signals) as engines,
        ):
            engines.wait_until_ready()
            for _ in EVERY_STRATEGY_AND_BACK:
                assert_same_tokens(engines.generate(), expected, QWEN3_MOE)
            trees = engines.trees
            assert all(len(tree.members()) >= 3 for tree in trees), "two engines, each with a core and workers"
            with signal_while_generating(os.getpid(), signal.SIGINT):
                engines.generate()
    except Interrupted as interruption:
        exit_status = interruption.exit_status
    assert exit_status == 128 + signal.SIGINT
    assert [tree.members() for tree in trees] == [[], []]


@pytest.mark.nightly  # three engines start one after another
def test_one_engine_after_another_in_one_process(
    checkpoint: Checkpoint, vanilla_tokens: VanillaTokens, caches: Path, tmp_path: Path, shared_memory_unchanged: None
) -> None:
    """Two ranks, started as by torchrun. Groups, planners and windows of an engine must not reach the next one."""
    expected = vanilla_tokens(QWEN3_MOE)[: len(DEMO_MAX_TOKENS)]
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(list(zip(demo_prompts(), DEMO_MAX_TOKENS, strict=True))))
    program = Path(__file__).with_name("one_engine_after_another.py")
    command = [sys.executable, "-W", "ignore", str(program), str(checkpoint(QWEN3_MOE)), str(prompts), *TOPOLOGIES]
    environment = engine_environment(caches, vanilla=False) | {
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(len(TOPOLOGIES))),
    }
    outputs = [tmp_path / f"rank{rank}.log" for rank in range(2)]
    trees = []
    try:
        for rank, output in enumerate(outputs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with output.open("wb") as log:
                trees.append(ProcessTree(command, environment=environment | own, stdout=log, stderr=log))
        for tree, output in zip(trees, outputs, strict=True):
            assert tree.process.wait(len(TOPOLOGIES) * PATIENCE_SECONDS) == 0, output.read_text(errors="replace")
    finally:
        for tree in trees:
            tree.stop(grace_seconds=0)
    for output in outputs:
        assert json.loads(output.read_text().splitlines()[-1]) == [expected] * len(TOPOLOGIES)


def test_compiled_engines_and_the_death_of_a_rank(
    checkpoint: Checkpoint, vanilla_tokens: VanillaTokens, caches: Path, tmp_path: Path, shared_memory_unchanged: None
) -> None:
    """DP2xEP with torch.compile. The first pass compiles, the strategies change afterwards, and the graph holds none of them.

    Then the worker of rank 1 is killed while both ranks generate. Rank 0 fails within seconds in the collective that it is in.
    Our collectives name rank 1 then; vLLM's own report what gloo reports.
    """
    expected = vanilla_tokens(QWEN3_MOE)
    strategies = [*EVERY_STRATEGY_AND_BACK, "all2all"]
    with engines_for(DP2_EP, strategies, checkpoint(QWEN3_MOE), caches, tmp_path, compiled=True) as engines:
        engines.wait_until_ready()
        for _ in EVERY_STRATEGY_AND_BACK:
            assert_same_tokens(engines.generate(), expected, QWEN3_MOE)
        began = time.monotonic()
        with (
            killed_while_generating(worker_of(engines.trees[1])),
            pytest.raises(EngineFailedError, match="while generating with all2all"),
        ):
            engines.generate()
        log_of_rank_0 = tmp_path / "engines" / "rank0.log"
        reported = re.compile(r"RankFailureError: .* rank 1 has ended|Connection (closed|reset) by peer")
        while not reported.search(log := log_of_rank_0.read_text(errors="replace")):
            assert time.monotonic() - began < PATIENCE_SECONDS, log[-3000:]
            time.sleep(0.1)
        assert time.monotonic() - began < on_this_machine(REPORT_SECONDS), log[-3000:]


def test_tensor_parallel_experts_and_the_death_of_a_worker(
    checkpoint: Checkpoint, vanilla_tokens: VanillaTokens, caches: Path, tmp_path: Path, shared_memory_unchanged: None
) -> None:
    """TP2xEP through every strategy. Then one process of the engine is killed, and the failure is reported at once."""
    expected = vanilla_tokens(QWEN3_MOE)
    strategies = [*STRATEGIES, "allgather"]
    with engines_for(TP2_EP, strategies, checkpoint(QWEN3_MOE), caches, tmp_path) as engines:
        engines.wait_until_ready()
        for _ in STRATEGIES:
            assert_same_tokens(engines.generate(), expected, QWEN3_MOE)
        [tree] = engines.trees
        os.kill(worker_of(tree), signal.SIGKILL)
        with pytest.raises(EngineFailedError, match=r"ended with exit status 1 while generating with allgather\.\n---"):
            engines.generate()
    assert tree.members() == []


@contextmanager
def signal_while_generating(process: int, signum: signal.Signals) -> Iterator[None]:
    """Send a signal 50 ms after the block has begun."""
    timer = threading.Timer(0.05, os.kill, (process, signum))
    timer.start()
    yield
    timer.join()


@contextmanager
def killed_while_generating(process: int) -> Iterator[None]:
    """Kill a process 50 ms after the block has begun. It is stopped before the block, so that no generation ends without it."""
    os.kill(process, signal.SIGSTOP)
    with signal_while_generating(process, signal.SIGKILL):
        yield


def worker_of(tree: ProcessTree) -> int:
    """The youngest worker of an engine. Every worker of vLLM names itself so."""
    return max(pid for pid in tree.members() if b"Worker" in Path(f"/proc/{pid}/cmdline").read_bytes())


def engines_for(
    parallelism: Parallelism,
    strategies: list[str],
    model: Path,
    caches: Path,
    folder: Path,
    *,
    compiled: bool = False,
    stop_signals: StopSignals | None = None,
) -> EngineSet:
    """Engines that generate demo_prompts()."""
    return EngineSet(
        model,
        parallelism,
        strategies=strategies,
        prompts=demo_prompts(),
        max_tokens=DEMO_MAX_TOKENS,
        folder=folder / "engines",
        caches=caches,
        compiled=compiled,
        stop_signals=stop_signals,
        **FORKED,
    )
