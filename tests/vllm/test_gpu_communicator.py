"""Our GPU communicator, managers and worker inside real vLLM 0.32, with CPU tensors and gloo in place of CUDA and NCCL.

vLLM's own code makes the calls: CudaCommunicator's constructor, the prepare and finalize that its GPU layers use, the start of
both GPU model runners, and their check for faults.
"""

import ast
import inspect
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.strategy_manager_ranks import ExpertsFailed
from tests.vllm.vllm_ranks import DP4, NUM_RANKS, TP2_DP2, Grid, VllmRanks, counted_steps, make_config, ranks  # noqa: F401
from vllm_npu.core.step_plan import TokenSharding
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.errors import LyingCollectiveError, PlanDisagreementError, RankFailureError, TransportError
from vllm_npu.tools.engines.tiny_models import QWEN3_MOE
from vllm_npu.tools.verification import Case, CaseTensors

pytest.importorskip("vllm")

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_npu.plugin.gpu.communicator import CudaMoECommunicator

WIDTH = 96
CHOICES = [{"all2all": "naive"}, {"all2all": "agrs"}] + [
    {"moe_comm": name} for name in ("auto", "mc2", "all2all", "allgather", "naive")
]


def config_of(grid: Grid, model: str, **options: str) -> "VllmConfig":
    from vllm.config import ModelConfig

    config = make_config(grid)
    config.additional_config = {"vllm_npu": options}  # now, since a CPU's own check refuses options of GPUs
    config.model_config = ModelConfig(model, skip_tokenizer_init=True, enforce_eager=True)
    config.parallel_config.all2all_backend = "allgather_reducescatter"
    return config


def communicator_of(config: "VllmConfig") -> "CudaMoECommunicator":
    """Build it on the EP group as vLLM builds it, and give it to the group. COLLECTIVE."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import get_ep_group

    from vllm_npu.plugin.gpu.communicator import CudaMoECommunicator

    ep = get_ep_group()
    with set_current_vllm_config(config):
        communicator = CudaMoECommunicator(
            cpu_group=ep.cpu_group,
            device=torch.device("cpu"),
            device_group=ep.device_group,
            unique_name="ep:0",
            use_all2all=True,
        )
    ep.device_communicator = communicator
    return communicator


def run_layer(grid: Grid, config: "VllmConfig", case: Case, *, fail: bool = False) -> list[str]:
    """A layer of vLLM's GPU path: its prepare, experts that read rows and ids, and its finalize. Returns the faults."""
    from vllm.forward_context import get_forward_context, set_forward_context
    from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
    from vllm.model_executor.layers.fused_moe.prepare_finalize.naive_dp_ep import MoEPrepareAndFinalizeNaiveDPEPModular
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

    topology = ParallelTopology.of_rank(grid.rank, tp_size=grid.tp, dp_size=grid.dp)
    sliced = case.sharding is TokenSharding.SLICED_OVER_TP
    tensors = CaseTensors.of(case)
    hidden_states, weights, ids = tensors.input_of(topology, case.sharding, torch.device("cpu"))
    stages = MoEPrepareAndFinalizeNaiveDPEPModular(is_sequence_parallel=sliced, num_dispatchers=grid.size)
    counts = torch.tensor(case.num_tokens_across_dp, dtype=torch.int32)
    with (
        set_forward_context(None, config, num_tokens=int(counts[grid.dp_rank]), num_tokens_across_dp=counts),
        get_forward_context().dp_metadata.sp_local_sizes(grid.tp if sliced else 1),
    ):
        rows, _, _, row_ids, row_weights = stages.prepare(
            hidden_states, weights, ids.int(), case.num_experts, None, False, FUSED_MOE_UNQUANTIZED_CONFIG
        )
        if fail:
            raise ExpertsFailed
        shape = (rows.shape[0], case.width)
        experts_output = stages.allocate_fused_expert_output(shape, case.dtype, rows.device, TopKWeightAndReduceNoOP())
        faults = [] if experts_output is None else ["allocate_combine_input gives memory that no manager knows"]
        shares = torch.zeros(shape)
        first = grid.rank * case.experts_per_rank
        for expert in range(first, first + case.experts_per_rank):
            row, k = (row_ids == expert).nonzero(as_tuple=True)
            shares.index_add_(0, row, (rows[row] @ tensors.experts.weights[expert]).float() * row_weights[row, k, None])
        output = torch.full((hidden_states.shape[0], case.width), float("nan"), dtype=case.dtype)
        stages.finalize(output, shares.to(case.dtype), row_weights, row_ids, False, TopKWeightAndReduceNoOP())
    expected = tensors.expected_on(topology, case.sharding)
    return faults + ([] if torch.equal(output[: expected.shape[0]], expected) else [f"{case}: not the reference"])


def case_of(grid: Grid, counts: tuple[int, ...]) -> Case:
    return Case(
        strategy="auto",
        tp_size=grid.tp,
        dp_size=grid.dp,
        num_tokens_across_dp=counts[: grid.dp],
        sharding=TokenSharding.SLICED_OVER_TP if grid.tp > 1 else TokenSharding.REPLICATED,
        hidden_size=WIDTH,
        width=WIDTH,
        experts_per_rank=2,
    )


def runs_choices(grid: Grid, model: str) -> list[str]:
    from vllm.distributed import get_ep_group

    faults, before = [], get_ep_group().device_communicator
    for options in CHOICES:
        config = config_of(grid, model, **options)
        communicator = communicator_of(config)
        for counts in ((4, 4, 4, 4), (5, 1, 3, 2), (1, 7, 1, 1)):
            faults += [f"{options}: {fault}" for fault in run_layer(grid, config, case_of(grid, counts))]
        manager = communicator.all2all_manager
        assert manager.inner.end_step() is not None
        faults += reads_of_the_runners(manager)
        communicator.destroy()
    get_ep_group().device_communicator = before
    return faults


def reads_of_the_runners(manager: Any) -> list[str]:
    """Evaluate what vLLM's GPU runners read from the manager when they start, and in a step's check for faults."""
    from vllm.model_executor.layers.fused_moe.all2all_utils import get_ep_all2all_manager
    from vllm.v1.worker import gpu_model_runner
    from vllm.v1.worker.gpu import model_runner

    faults = []
    for module in (gpu_model_runner, model_runner):
        tree = ast.parse(inspect.getsource(module))
        expressions = [
            ast.unparse(node)
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "get_ep_all2all_manager()"
        ]
        assert "get_ep_all2all_manager().support_fault_tolerance" in expressions
        for expression in expressions:
            found = getattr(get_ep_all2all_manager(), expression.rpartition(".")[2])
            faults += [] if found is False or callable(found) else [f"{expression} is {found}"]
    assert get_ep_all2all_manager() is manager
    assert (manager.max_sms_used(), manager.set_num_sms(8)) == (None, None)
    return faults


@pytest.mark.parametrize("grid", [DP4, TP2_DP2], ids=str)
def test_vllms_layer_gets_the_reference_from_every_manager(ranks: VllmRanks, grid, checkpoint):  # noqa: F811
    for faults in ranks.run(runs_choices, grid, str(checkpoint(QWEN3_MOE))):
        assert faults == []


def goes_on(grid: Grid, model: str) -> list[str]:
    from vllm.distributed import get_ep_group

    before = get_ep_group().device_communicator
    config = config_of(grid, model, moe_comm="all2all")
    communicator = communicator_of(config)
    case = case_of(grid, (5, 1, 3, 2))
    for _ in range(3):
        with pytest.raises(ExpertsFailed):
            run_layer(grid, config, case, fail=True)
    faults = [fault for _ in range(100) for fault in run_layer(grid, config, case)]
    communicator.destroy()
    get_ep_group().device_communicator = before
    return faults


def test_a_hundred_good_steps_follow_failed_experts(ranks: VllmRanks, checkpoint):  # noqa: F811
    assert [fault for found in ranks.run(goes_on, DP4, str(checkpoint(QWEN3_MOE))) for fault in found] == []


# ------------------------------------------------------------------------------------------------------- checks at start


def starts_unlike_the_others(grid: Grid, model: str) -> str:
    options = {"moe_comm": "allgather"} if grid.rank else {}
    with pytest.raises(PlanDisagreementError) as error:
        communicator_of(config_of(grid, model, **options))
    return str(error.value)


def test_ranks_with_other_options_are_named(ranks: VllmRanks, checkpoint):  # noqa: F811
    for message in ranks.run(starts_unlike_the_others, DP4, str(checkpoint(QWEN3_MOE))):
        assert "ranks start with different exchanges" in message
        assert "moe_comm: ranks [0]: None; ranks [1, 2, 3]: allgather" in message


def starts_on_a_lying_group(grid: Grid, model: str) -> str:
    from vllm_npu.transport.gloo import GlooTransport

    honest = GlooTransport._all_gather

    def lying(self: GlooTransport, x: torch.Tensor, sizes: Any) -> torch.Tensor:
        gathered = honest(self, x, sizes)
        return gathered.zero_() if self.group == "ep" and self.rank == 2 else gathered

    config = config_of(grid, model, all2all="agrs")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(GlooTransport, "_all_gather", lying)
        with pytest.raises(LyingCollectiveError) as error:
            communicator_of(config)
    return str(error.value)


def test_a_lying_collective_ends_the_start(ranks: VllmRanks, checkpoint):  # noqa: F811
    for message in ranks.run(starts_on_a_lying_group, DP4, str(checkpoint(QWEN3_MOE))):
        assert "rank 2: all_gather of int32 on group 'ep' gives its rank 2 of 4 zeros" in message


def names_the_rank_that_is_late(grid: Grid, model: str) -> str:
    """The last rank does not come to an exchange."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VLLM_NPU_COLLECTIVE_DEADLINE", "2")
        config = config_of(grid, model, moe_comm="all2all", self_test="off")
        communicator_of(config)
        if grid.rank == grid.size - 1:
            time.sleep(9)
            return ""
        with pytest.raises(RankFailureError) as error:
            run_layer(grid, config, case_of(grid, (4, 4, 4, 4)))
        return str(error.value)


def test_a_rank_that_stays_away_is_named(checkpoint):
    own = VllmRanks()  # its groups are unusable afterwards
    try:
        *waiting, _ = own.run(names_the_rank_that_is_late, DP4, str(checkpoint(QWEN3_MOE)))
    finally:
        own.close()
    for message in waiting:
        assert f"rank {NUM_RANKS - 1} is late" in message


# ------------------------------------------------------------------------------------------------------- worker, metrics


class Scheduled:
    def __init__(self, tokens: int) -> None:
        self.total_num_scheduled_tokens = tokens


def counts_steps(grid: Grid, model: str, folder: str) -> tuple[dict[Any, float], str]:
    """Run steps as CudaMoEWorker begins them. Returns the series of /metrics, and the error after a fault on the device."""
    from vllm.distributed import get_ep_group
    from vllm.v1.worker.gpu_worker import Worker

    from vllm_npu.plugin.gpu.worker import CudaMoEWorker

    before = get_ep_group().device_communicator
    config = config_of(grid, model, moe_comm="mc2")
    try:
        with counted_steps(folder) as series, pytest.MonkeyPatch.context() as patched:
            communicator = communicator_of(config)
            case = case_of(grid, (5, 1, 3, 2))
            worker = object.__new__(CudaMoEWorker)
            patched.setattr(Worker, "execute_model", lambda self, scheduled: run_layer(grid, config, case))
            patched.setattr(Worker, "execute_dummy_batch", lambda self: run_layer(grid, config, case))
            for _ in range(3):
                assert worker.execute_model(Scheduled(7)) == []
            worker.execute_dummy_batch()
            patched.setattr(Worker, "execute_model", lambda self, scheduled: "nothing ran")
            assert worker.execute_model(Scheduled(0)) == "nothing ran"
            worker.execute_model(Scheduled(7))  # counts the step before it
            counted = series()
            manager = communicator.all2all_manager

            def failed() -> None:
                raise TransportError("exchange", "ep", grid.rank, "rank 3 did not reach combine within 600 s")

            assert not any(manager.lookout._waits), "a wait of a step that has ended"
            patched.setattr(manager.inner, "check_failed", failed)
            with pytest.raises(TransportError) as error:
                worker.execute_model(Scheduled(7))
        communicator.destroy()
    finally:
        get_ep_group().device_communicator = before
    return counted, str(error.value)


def test_the_worker_counts_steps_and_raises_faults_of_the_device(ranks: VllmRanks, checkpoint, tmp_path: Path):  # noqa: F811
    found = ranks.run(counts_steps, DP4, str(checkpoint(QWEN3_MOE)), str(tmp_path))
    for process, (series, error) in enumerate(found):
        rank = str(process)
        assert series[("steps_total", rank, "mc2")] == 4
        assert series[("tokens_total", rank, "mc2")] == 3 * 7
        assert series[("sent_bytes_total", rank, "mc2")] > 0
        assert "rank 3 did not reach combine" in error
