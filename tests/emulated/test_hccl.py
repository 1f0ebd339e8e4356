"""The hccl transport and every strategy on NPU tensors: real torch_npu, real ProcessGroupHCCL, emulated device."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from tests.ranks.test_transport_contract import CONTRACT, REFUSED, is_refused, with_tensors_on_its_device
from tests.time_limits import PATIENCE_SECONDS
from vllm_npu.core.ascend_recipes import MC2Asked
from vllm_npu.core.limits import DEVICES, QuantMode
from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.emulator import launcher, soc
from vllm_npu.errors import InvalidInputError, UnknownGroupError, UnsupportedConfigError
from vllm_npu.strategies.dispatch.base import RoutedTokens
from vllm_npu.strategies.select import build
from vllm_npu.tools.launch import ProcessRankPool, Rank, RankPool
from vllm_npu.tools.verification import Case, limits_of_device, run_case
from vllm_npu.transport.hccl import HcclTransport
from vllm_npu.trust.recording import CollectiveCounter

pytestmark = pytest.mark.emulated

GRIDS = [(2, 1), (2, 2)]  # (tp_size, dp_size): groups of 1, 2 and 4 ranks


@pytest.fixture(scope="module", params=GRIDS, ids=str)
def grid(request) -> tuple[int, int]:
    return request.param


@pytest.fixture(scope="module")
def pool(grid, warm) -> Iterator[RankPool]:
    num_ranks = grid[0] * grid[1]
    with (
        launcher.emulated_devices(num_ranks),
        ProcessRankPool(num_ranks, transport="hccl", start_method=warm) as opened,
    ):
        yield opened


def where(rank: Rank) -> str:
    return f"{dist.get_backend(rank.groups(tp_size=rank.num_ranks, dp_size=1).ep.process_group)} on {rank.device}"


def test_ranks_are_npus_under_hccl(pool, grid):
    assert pool.run(where) == [f"hccl on npu:{rank}" for rank in range(grid[0] * grid[1])]


@pytest.mark.parametrize("promise", CONTRACT)
def test_contract(pool, grid, promise):
    pool.run(with_tensors_on_its_device, CONTRACT[promise], grid)


def test_arguments_that_do_not_fit_are_refused_before_rows_move(pool, grid):
    for name in REFUSED:
        pool.run(with_tensors_on_its_device, is_refused, grid, name)


@pytest.mark.parametrize(
    ("family", "ranks", "options", "strategies"),
    [
        ("A2", 4, [], {"mc2", "all2all", "allgather", "naive"}),
        ("A3", 2, [], {"mc2", "all2all", "allgather", "naive"}),
        ("310P", 2, [], {"allgather", "naive"}),
        ("A5", 2, [], {"mc2", "all2all", "allgather", "naive"}),
        ("A2", 2, ["--graph"], {"mc2", "allgather", "naive"}),
        ("A3", 2, ["--graph"], {"mc2", "allgather", "naive"}),
    ],
)
def test_verify_runs_the_strategies_of_each_family_of_chips(family, ranks, options, strategies, tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "vllm_npu.cli", "verify", "--transport", "hccl", "--quick", "--json", str(report)]
    env = {**os.environ, "VLLM_NPU_EMULATOR_SOC": family}
    done = subprocess.run(
        [*command, "--ranks", str(ranks), *options],
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(report.read_text())
    assert result["device"] == f"emulated {soc.resolve(family)}"
    assert result["failed"] == {}
    assert result["strategies"].keys() == strategies
    assert min(result["strategies"].values()) >= 20
    assert done.stdout.endswith(f"verify: {result['cases']} cases, 0 failed\n")


@pytest.mark.slow
def test_layers_that_only_the_hierarchy_takes_run_by_it_on_a2(warm):
    """25 experts a rank, one more than the full mesh takes; 16 ranks, the least that the hierarchy takes."""
    case = Case(strategy="mc2", tp_size=1, dp_size=16, num_tokens_across_dp=(3,) * 16, experts_per_rank=25, top_k=6)
    uneven = replace(case, num_tokens_across_dp=tuple(1 + rank % 4 for rank in range(16)))
    with (
        launcher.emulated_devices(16),
        ProcessRankPool(16, transport="hccl", timeout=300, start_method=warm) as pool,
    ):
        for each in (
            case,
            replace(case, integer=False),
            replace(case, quant_mode=QuantMode.INT8_PER_TOKEN),
        ):
            assert [fault for fault in pool.run(run_case, each) if fault] == []
        with pytest.raises(UnsupportedConfigError, match="hierarchy takes as many rows from each rank"):
            pool.run(run_case, uneven)
        with pytest.raises(UnsupportedConfigError, match="hierarchy takes no mask"):  # prepare masks idle ranks
            pool.run(run_case, replace(case, num_tokens_across_dp=(0, *[3] * 15)))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["A2", "A3"])
def test_the_hierarchy_runs_where_an_option_asks_for_it(family, warm, monkeypatch):
    """Layers that the full mesh takes too; 16 ranks, the least that the hierarchy takes. With a mask on A3 alone."""
    monkeypatch.setenv("VLLM_NPU_EMULATOR_SOC", family)
    monkeypatch.setenv("HCCL_BUFFSIZE", "450")
    case = Case(
        strategy="mc2",
        tp_size=1,
        dp_size=16,
        num_tokens_across_dp=(3,) * 16,
        hidden_size=1024,
        width=1024,
        asked=MC2Asked("hierarchy"),
    )
    masked = (
        replace(case, num_tokens_across_dp=tuple(rank % 4 for rank in range(16))),
        replace(case, tp_size=2, dp_size=8, num_tokens_across_dp=(3,) * 8),
    )
    with (
        launcher.emulated_devices(16),
        ProcessRankPool(16, transport="hccl", timeout=300, start_method=warm) as pool,
    ):
        for each in (case, replace(case, integer=False), replace(case, quant_mode=QuantMode.INT8_PER_TOKEN)):
            assert [fault for fault in pool.run(run_case, each) if fault] == []
        for each in masked:
            if family == "A3":
                assert [fault for fault in pool.run(run_case, each) if fault] == []
            else:
                with pytest.raises(UnsupportedConfigError, match="hierarchy takes no mask"):
                    pool.run(run_case, each)


def family_of(rank: Rank) -> str:
    return limits_of_device(rank).family


@pytest.mark.parametrize("family", [each.name for each in soc.FAMILIES])
def test_limits_know_every_chip_that_is_emulated(family):
    chip = soc.resolve(family)
    assert [limits.family for limits in DEVICES.values() if chip.startswith(limits.socs)] == [family]


def test_a_rank_knows_its_chip(pool):
    assert set(pool.run(family_of)) == {"A2"}


def calls_of(rank: Rank, strategy: str) -> dict[str, int]:
    counter = CollectiveCounter()
    pipeline = build(strategy, rank.groups(tp_size=1, dp_size=rank.num_ranks, counter=counter), num_experts=8)
    step = StepPlan(num_tokens_across_dp=(5,) * rank.num_ranks, sharding=TokenSharding.REPLICATED)
    with rank.device:
        ids = torch.arange(10).view(5, 2) % 8
        pipeline.run(torch.ones(5, 32, dtype=torch.bfloat16), torch.ones(5, 2), ids, lambda rows, *_: rows, step)
    return dict(counter.calls)


def test_mc2_is_the_devices_own_dispatch_and_combine(pool, grid):
    calls = {"ep.dispatch": 1, "ep.combine": 1}
    assert pool.run(calls_of, "mc2") == [calls] * (grid[0] * grid[1])
    assert pool.run(calls_of, "all2all")[0] == {"ep.all_to_all": 3}


def two_micro_batches(rank: Rank) -> None:
    """A second dispatch before the first one's combine is refused; a result that nobody holds any more is in nobody's way."""
    dispatcher = build("mc2", rank.groups(tp_size=1, dp_size=rank.num_ranks), num_experts=8).dispatcher
    with rank.device:
        ids = torch.arange(10).view(5, 2) % 8
        x, weights = torch.full((5, 32), rank.rank + 1.0, dtype=torch.bfloat16), torch.ones(5, 2)
    tokens = RoutedTokens(hidden_states=x, topk_weights=weights, topk_ids=ids)
    first = dispatcher.dispatch(tokens)
    with pytest.raises(
        InvalidInputError, match=r"a second dispatch of mc2 on group 'ep' .* before the combine of the first"
    ):
        dispatcher.dispatch(tokens)
    assert torch.equal(dispatcher.combine(first.expert_input, first.handle), 2 * x)
    del first
    dispatcher.dispatch(tokens)
    again = dispatcher.dispatch(tokens)
    assert torch.equal(dispatcher.combine(again.expert_input, again.handle), 2 * x)


def test_micro_batches_of_mc2_take_turns_on_a_group(pool, grid):
    pool.run(two_micro_batches)


def puts_several_messages_into_a_batch(rank: Rank) -> None:
    """HCCL's document does not allow it, and its source does. vllm-ascend moves experts so."""
    peers = [other for other in range(rank.num_ranks) if other != rank.rank]
    sizes = (2, 300_000, 5)  # the second one is larger than what HCCL moves at once

    def filled(sender: int, receiver: int, number: int) -> torch.Tensor:
        return torch.full((sizes[number],), 100.0 * sender + 10 * receiver + number, device=rank.device)

    received = {(peer, number): torch.zeros(sizes[number], device=rank.device) for peer in peers for number in range(3)}
    sends = [dist.P2POp(dist.isend, filled(rank.rank, peer, number), peer) for number in range(3) for peer in peers]
    receives = [dist.P2POp(dist.irecv, into, peer) for (peer, _), into in received.items()]
    for work in dist.batch_isend_irecv(receives + sends):
        work.wait()
    for (peer, number), got in received.items():
        assert torch.equal(got, filled(peer, rank.rank, number)), (peer, number)


def test_messages_of_a_batch_to_the_same_rank_keep_their_order(pool, grid):
    pool.run(puts_several_messages_into_a_batch)


def asks_for_a_group_that_hccl_does_not_have(rank: Rank) -> str:
    group = dist.new_group(backend="gloo")
    with pytest.raises(UnknownGroupError) as error:
        HcclTransport(group, "ep").name_for_ops  # noqa: B018 - a property that asks
    return str(error.value)


def test_a_group_unknown_to_hccl_is_named_before_a_token_moves(pool, grid):
    for rank, text in enumerate(pool.run(asks_for_a_group_that_hccl_does_not_have)):
        assert text.startswith(f"HCCL does not know the group 'ep' of rank {rank}, over which mc2 has to communicate (")
        assert text.endswith("create the group with the hccl backend, or choose all2all or allgather")
