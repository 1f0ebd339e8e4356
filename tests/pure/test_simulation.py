"""The alpha-beta model: its bytes are the planner's, its figures have sources, and docs/simulate.md shows what it computes."""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_npu.cli import simulate as command
from vllm_npu.core.limits import MoELayer, QuantMode
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.strategies.planning import COUNT_BYTES, bytes_sent, row_bytes
from vllm_npu.tools.calibration import RowPath, calibration_of, is_one_number, published_times
from vllm_npu.tools.link_model import (
    GATHER,
    PER_EXPERT,
    PER_RANK,
    SLOTS,
    Fabric,
    busiest_rows,
    bytes_us,
    demand,
    fabrics,
    popularity,
    rows_of,
)
from vllm_npu.tools.simulation import Workload, estimate, estimates

LAYER = MoELayer(num_experts=256, top_k=8, hidden_size=7168, dtype=torch.bfloat16)
EP_SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 384, 512, 768)
DOCUMENT = Path(__file__).parents[2] / "docs/simulate.md"


# ------------------------------------------------------------------------------------------------------------ figures


def test_every_figure_has_a_source():
    figures = {each.name for each in fields(Fabric)} - {
        "summary",
        "name",
        "device",
        "ranks_per_node",
        "shared_links",
        "sources",
    }
    for name, fabric in fabrics().items():
        given = {figure for figure in figures if getattr(fabric, figure) is not None}
        assert set(fabric.sources) == given, name
        assert all(fabric.sources.values())


def test_the_document_shows_what_the_model_computes():
    table = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    computed = [line for line in command.published_table(published_times()) if line.startswith("| ")]
    assert table == computed


def test_the_correction_is_tested_on_times_that_did_not_give_it():
    """For each kind of exchange the greatest error of held-out times, as docs/simulate.md says it."""

    def errors(source: str) -> list[float]:
        found = [abs(row.error) for row in published_times() if source in row.source and not row.fits]
        assert found
        return found

    assert max(errors("DeepEP V1, normal")) < 0.165
    assert max(errors("DeepEP V1, low latency")) < 0.115
    assert max(errors("DeepEP-Ascend (sgl-kernel-npu), normal")) < 0.365, "without the correction: 2.22"
    assert max(errors("DeepEP-Ascend (sgl-kernel-npu), low latency")) < 0.165
    assert max(errors("symmetric here")) < 0.095
    assert max(errors("AgRs")) < 0.315


def test_half_of_the_times_give_the_correction():
    rows = published_times()
    assert 0.4 < sum(row.fits for row in rows) / len(rows) < 0.6


def test_every_published_time_is_in_the_interval_of_its_estimate():
    for row in published_times():
        calibration = calibration_of(row.path)
        assert calibration.low <= row.published_us / row.estimated_us * (1 + 1e-9), row
        assert calibration.high >= row.published_us / row.estimated_us * (1 - 1e-9), row


def test_an_estimate_that_may_be_far_off_is_no_single_number():
    a3 = fabrics()["a3"]
    normal = calibration_of(RowPath.of(a3, PER_RANK, "kernel", 64))
    assert not is_one_number(normal.low, normal.high)
    uncorrected = calibration_of(RowPath.of(a3, PER_RANK, "collective", 64))
    assert uncorrected.factor == 1, "no published time of it"
    assert uncorrected.high > 3, "its rows travel as those of DeepEP-Ascend's normal mode"
    lines = command.published_table([row for row in published_times() if "normal, A3" in row.source])
    assert all("–" in line for line in lines[2:])


# -------------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("ep_size", [2, 8, 64])
@pytest.mark.parametrize("quant_mode", QuantMode)
@pytest.mark.parametrize(
    ("strategy", "exchange", "native"),
    [
        ("mc2", PER_EXPERT, True),
        ("mc2", SLOTS, False),
        ("all2all", PER_RANK, False),
        ("allgather", GATHER, False),
        ("naive", GATHER, False),
    ],
)
def test_the_bytes_of_both_stages_are_those_of_the_planner(strategy, exchange, native, ep_size, quant_mode):
    layer = MoELayer(num_experts=256, top_k=8, hidden_size=7168, dtype=torch.bfloat16, quant_mode=quant_mode)
    tokens = 1 << 30  # so many that what a rank receives is what is expected
    wanted = demand(layer.num_experts, layer.top_k, ep_size, 0.0, 0)
    one_node = {
        **{each.name: getattr(fabrics()["h100"], each.name) for each in fields(Fabric)},
        "ranks_per_node": ep_size,
    }
    in_node, outside = rows_of(Fabric(**one_node), ep_size, exchange, tokens, wanted, seed=0)
    assert outside == pytest.approx(0, abs=1)
    sent = in_node * sum(row_bytes(strategy, layer, native_mc2=native))
    topology = ParallelTopology.of_rank(0, tp_size=1, dp_size=ep_size)
    counts = (ep_size - 1) * COUNT_BYTES if strategy == "all2all" else 0
    planned = bytes_sent(strategy, layer, topology, tokens, native_mc2=native) - counts
    assert sent == pytest.approx(planned, rel=1e-3)


def test_rows_in_the_node_and_outside_of_it_are_all_rows():
    rows = np.full(32, 0.25)
    in_node, outside = busiest_rows(rows, 1 << 30, 8, seed=0)
    assert in_node == pytest.approx((1 << 30) * 0.25 * 7, rel=1e-3)
    assert outside == pytest.approx((1 << 30) * 0.25 * 24, rel=1e-3)


def test_links_between_pairs_are_as_many_as_there_are_peers():
    a2 = fabrics()["a2"]
    assert bytes_us(a2, 2, 28e3, 0) == pytest.approx(1)  # one link of 28 GB/s
    assert bytes_us(a2, 8, 196e3, 0) == pytest.approx(1)  # seven
    assert bytes_us(a2, 16, 196e3, 25e3) == pytest.approx(1), "the network is used at the same time"
    assert bytes_us(fabrics()["a3"], 32, 196e3, 196e3) == pytest.approx(2), "one port carries both"


# ------------------------------------------------------------------------------------------------------------- demand


@pytest.mark.parametrize("ep_size", EP_SIZES)
@pytest.mark.parametrize("skew", [0.0, 0.8])
def test_each_token_reaches_its_experts(ep_size, skew):
    wanted = demand(256, 8, ep_size, skew, 3)
    assert wanted.per_expert.sum() == pytest.approx(8)
    assert min(1, wanted.per_rank.min()) > 0
    assert (wanted.per_rank <= wanted.per_expert + 1e-12).all()
    assert 1 <= wanted.per_rank.sum() <= min(8, ep_size)


def test_what_is_drawn_agrees_with_what_is_known():
    for ep_size in (8, 64):
        drawn, exact = demand(256, 8, ep_size, 1e-9, 0), demand(256, 8, ep_size, 0.0, 0)
        assert drawn.per_rank.sum() == pytest.approx(exact.per_rank.sum(), rel=2e-3)
        assert drawn.per_expert == pytest.approx(exact.per_expert, rel=0.1)


def test_skew_is_drawn_from_the_seed_and_slows_the_exchange_down():
    assert popularity(256, 1.0, 5).tolist() == popularity(256, 1.0, 5).tolist()
    assert popularity(256, 1.0, 5).tolist() != popularity(256, 1.0, 6).tolist()
    times = [
        estimate(fabrics()["a3"], Workload(layer=LAYER, ep_size=64, tokens=256, skew=skew, seed=5), "mc2")
        for skew in (0.0, 0.5, 1.0)
    ]
    assert times[0].dispatch_us < times[1].dispatch_us < times[2].dispatch_us
    assert times[0].experts_us < times[1].experts_us < times[2].experts_us


# -------------------------------------------------------------------------------------------------------------- times


@pytest.mark.parametrize("name", fabrics())
def test_more_tokens_and_int8_rows_do_what_they_must(name):
    int8 = MoELayer(
        num_experts=256, top_k=8, hidden_size=7168, dtype=torch.bfloat16, quant_mode=QuantMode.INT8_PER_TOKEN
    )
    for ep_size in EP_SIZES:
        before = None
        for tokens in (1, 64, 4096):
            now = estimates(fabrics()[name], Workload(layer=LAYER, ep_size=ep_size, tokens=tokens))
            assert any(each.reason is None for each in now)
            for each, smaller in zip(now, before or now, strict=True):
                assert (each.reason is None) == np.isfinite(each.layer_us)
                assert before is None or each.reason or smaller.reason or each.exchange_us > smaller.exchange_us
            before = now
        wide, narrow = (
            estimate(fabrics()[name], Workload(layer=layer, ep_size=ep_size, tokens=4096), "all2all")
            for layer in (LAYER, int8)
        )
        assert narrow.dispatch_us < wide.dispatch_us
        assert narrow.combine_us == wide.combine_us


def test_what_the_limits_forbid_is_not_timed():
    def reason(fabric: str, strategy: str, ep_size: int, tokens: int) -> str | None:
        return estimate(fabrics()[fabric], Workload(layer=LAYER, ep_size=ep_size, tokens=tokens), strategy).reason

    assert reason("a3", "mc2", 64, 512) is None
    assert reason("a3", "mc2", 64, 513) == "mc2 takes 512 tokens a rank"
    assert "at most 24 experts a rank, not 64" in reason("a2", "mc2", 4, 1)
    assert "symmetric takes up to 8 ranks, not 16" in reason("h100", "symmetric", 16, 1)
    assert reason("h100", "symmetric", 8, 1) is None


# ------------------------------------------------------------------------------------------------------------ command


def test_the_command_writes_every_number_and_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    report, chart = tmp_path / "report.json", tmp_path / "chart.png"
    command.simulate(
        fabric="a3,h100", ep="8,768", tokens=64, experts=256, topk=8, hidden=7168, intermediate=2048, layers=58,
        dtype="bfloat16", skew=0.0, seed=0, published=False, json_path=report, plot=chart,
    )  # fmt: skip
    rows = json.loads(report.read_text())
    assert {(row["fabric"], row["ep_size"]) for row in rows} == {
        (name, ep) for name in ("a3", "h100") for ep in (8, 768)
    }
    assert all(
        row["step_ms"] == pytest.approx(58e-3 * (row["dispatch_us"] + row["combine_us"] + row["experts_us"]))
        for row in rows
    )
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert "symmetric" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fabric": "h100,tpu"}, "unknown --fabric 'tpu'; there are: h100, h800, a2, a3"),
        ({"ep": "8,1024"}, "--ep '8,1024': give sizes from 2 to 768"),
        ({"ep": "8,x"}, "--ep '8,x': give sizes from 2 to 768"),
        ({"topk": 300}, "a token chooses 300 experts of 256"),
    ],
)
def test_numbers_that_cannot_be_are_refused(options, message):
    defaults = {"fabric": "a3", "ep": "8", "tokens": 1, "experts": 256, "topk": 8, "hidden": 7168, "intermediate": 2048}
    rest = {
        "layers": 1,
        "dtype": "bfloat16",
        "skew": 0.0,
        "seed": 0,
        "published": False,
        "json_path": None,
        "plot": None,
    }
    with pytest.raises(UnsupportedConfigError, match=message):
        command.simulate(**(defaults | rest | options))
