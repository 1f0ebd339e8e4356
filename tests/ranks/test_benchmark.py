"""`vllm-npu bench`: its peers exchange what they say, and its report has every row."""

import json

import numpy as np
import pytest
import torch

from tests.command_line import refusal, vllm_npu
from vllm_npu.core.limits import MoELayer
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.strategies.table import STRATEGIES
from vllm_npu.tools.benchmark import Workload, counts_of, measure, with_ratios
from vllm_npu.tools.launch import Rank
from vllm_npu.tools.peers import PeerExchanges, Tokens

LAYER = MoELayer(num_experts=6, top_k=2, hidden_size=8, dtype=torch.float32)
PEERS = ["AgRs", "original allgather", "original multicast", "raw all-gather", "raw reduce-scatter"]


def peers_of(rank: Rank, counts: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Arrays, since tensors go from process to process through sockets, whose folder a rank leaves when it ends."""
    num_tokens = counts[rank.rank]
    x = torch.arange(num_tokens * 8.0).view(num_tokens, 8) + 100 * rank.rank
    routing = torch.zeros(num_tokens, 2)
    tokens = Tokens(x, torch.zeros(num_tokens, 6), routing, routing.int(), counts)
    group = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    found = {name: peer.run().numpy().copy() for name, peer in PeerExchanges(group, tokens).all().items()}
    return found | {"own": x.numpy()}


@pytest.mark.parametrize("counts", [(3, 3, 3), (4, 1, 2)], ids=str)
def test_peers_bring_rows_to_all_ranks_and_the_sum_back(pools, counts):
    ranks = pools("gloo", 3).run(peers_of, counts)
    for found in ranks:
        for name in PEERS[:3]:  # every rank returns what it gathered: the sum over three ranks is three times the rows
            np.testing.assert_array_equal(found[name], 3 * found["own"], name)
        gathered = found["raw all-gather"].reshape(3, max(counts), 8)
        for rank, count in enumerate(counts):
            np.testing.assert_array_equal(gathered[rank, :count], ranks[rank]["own"])


def test_all_exchanges_are_measured_together(pools):
    workload = Workload(counts=(4, 2, 2), layer=LAYER, rounds=5)
    first, *others = pools("gloo", 3).run(measure, workload)
    assert [result.name for result in first] == [*STRATEGIES, *PEERS]
    assert all([result.us_median for result in each] == [result.us_median for result in first] for each in others)
    for result in first:
        assert 0 < result.us_p10 <= result.us_median <= result.us_p90
        assert result.bytes_sent_per_rank > 0
    ratios = {result.name: ratio for result, ratio in with_ratios(first)}
    assert ratios["AgRs"] == 1
    sent = {result.name: result.bytes_sent_per_rank for result in first}
    assert sent["AgRs"] == 2 * 4 * (2 * 32 + 16), "padded to the fullest rank's 4 rows"
    assert sent["allgather"] == pytest.approx((8 * 2 * 48 + 2 * 8 * 32) / 3), "real rows only"


def test_what_cannot_be_measured_is_refused(pools):
    with pytest.raises(UnsupportedConfigError, match="2 token counts for 3 ranks"):
        pools("gloo", 3).run(measure, Workload(counts=(1, 1), layer=LAYER, rounds=3))
    with pytest.raises(UnsupportedConfigError, match="graphs are captured on GPUs only, not on cpu"):
        pools("gloo", 3).run(measure, Workload(counts=(1, 1, 1), layer=LAYER, rounds=3, graph=True))
    with pytest.raises(UnsupportedConfigError, match="peers run over c10d, not over ThreadedTransport"):
        pools("threaded", 2).run(peers_of, (1, 1))


def test_skew_leaves_every_rank_a_token():
    assert counts_of(512, 4, 64) == (512, 8, 8, 8)
    assert counts_of(1, 3, 64) == (1, 1, 1)
    assert counts_of(7, 2, 1) == (7, 7)


def test_the_command_writes_rows_and_a_chart(tmp_path):
    report, chart = tmp_path / "bench.json", tmp_path / "bench.png"
    sizes = ["--ranks", "2", "--tokens", "1,4", "--hidden", "16", "--experts", "4", "--topk", "2", "--rounds", "3"]
    done = vllm_npu("bench", *sizes, "--json", str(report), "--plot", str(chart))
    assert done.returncode == 0, done.stderr
    rows = json.loads(report.read_text())
    assert len(rows) == 2 * (len(STRATEGIES) + len(PEERS))
    wanted = {"strategy", "transport", "ranks", "tokens", "us_median", "us_p10", "us_p90", "ratio", "collectives"}
    assert all(wanted | {"bytes_sent_per_rank", "device", "dtype"} <= row.keys() for row in rows)
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert "original multicast" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--transport", "threaded"], "unknown transport 'threaded'"),
        (["--tokens", "1,x"], "--tokens '1,x': give counts of 1 or more by commas"),
        (["--ranks", "3"], "64 experts do not divide over ep_size=3"),
    ],
)
def test_wrong_options_are_refused_before_ranks_start(options, message):
    assert message in refusal("bench", *options)
