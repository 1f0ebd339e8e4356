"""The counts that a rank keeps of its steps. test_serve.py shows that they reach /metrics."""

import json
import re
from pathlib import Path

import pytest
import torch

from tests.vllm.vllm_ranks import (
    HIDDEN,
    NUM_EXPERTS,
    TP2_DP2,
    Grid,
    VllmRanks,
    build_layer,
    counted_steps,
    integers,
    make_config,
    ranks,  # noqa: F401
    vllm_step,
)
from vllm_npu import envs
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.errors import PlanDisagreementError
from vllm_npu.trust.recording import CollectiveCounter

COUNTS = (3, 5)  # tokens of the DP ranks
TOO_MANY = (600 * TP2_DP2.tp, 1)  # for mc2, which takes 512 a rank


def run_steps(grid: Grid, folder: str) -> tuple[dict[tuple[str, ...], float], list[int]]:
    """Take one failed vote, two steps of mc2, two of all2all and one that mc2 cannot take. Returns the series and the bytes."""
    from vllm_npu.plugin.groups import collective_counter
    from vllm_npu.plugin.step_planner import planner_of

    with counted_steps(folder) as series:
        # Without the self-test: it resets the counter, and the differences below need one count.
        config = make_config(grid, moe_comm="mc2" if grid.rank else "naive", self_test="off")
        layer = build_layer(grid, config)
        before = collective_counter().bytes_sent.total()

        def step(counts: tuple[int, ...], *, run: bool) -> None:
            with vllm_step(grid, config, counts):
                if run:
                    num_tokens = counts[grid.dp_rank]
                    layer(torch.ones(num_tokens, HIDDEN), integers(grid.dp_rank, num_tokens, NUM_EXPERTS))

        with pytest.raises(PlanDisagreementError):
            step(COUNTS, run=False)
        planner = planner_of(config)
        planner.propose("mc2")
        step(COUNTS, run=True)
        step(COUNTS, run=True)
        sent_by_mc2 = collective_counter().bytes_sent.total() - before
        step(TOO_MANY, run=False)
        planner.propose("all2all")
        step(COUNTS, run=True)
        step(COUNTS, run=False)  # counts the bytes of the one before
        total = collective_counter().bytes_sent.total() - before
        return series(), [sent_by_mc2, total - sent_by_mc2]


def test_steps_tokens_bytes_fallbacks_and_failed_votes(ranks: VllmRanks, tmp_path: Path):  # noqa: F811
    for process, (series, sent) in enumerate(ranks.run(run_steps, TP2_DP2, str(tmp_path))):
        rank = str(process)
        dp_rank, is_first_of_tp = process // TP2_DP2.tp, process % TP2_DP2.tp == 0
        assert series[("agreement_failures_total", rank)] == 1
        assert series[("steps_total", rank, "mc2")] == 2
        assert series[("steps_total", rank, "all2all")] == 3
        assert series[("fallbacks_total", rank, "mc2", "all2all")] == 1
        if is_first_of_tp:
            assert series[("tokens_total", rank, "mc2")] == 2 * COUNTS[dp_rank]
            assert series[("tokens_total", rank, "all2all")] == 2 * COUNTS[dp_rank] + TOO_MANY[dp_rank]
        else:
            assert ("tokens_total", rank, "mc2") not in series, "its DP rank's tokens are counted by the first"
        assert [series[("sent_bytes_total", rank, name)] for name in ("mc2", "all2all")] == sent
        assert min(sent) > 0


def test_without_a_folder_nothing_is_counted_and_the_log_says_so(monkeypatch):
    from vllm_npu.plugin import metrics

    warnings = []
    monkeypatch.setattr(metrics.logger, "warning_once", lambda text, *args: warnings.append(text % args))
    monkeypatch.delenv(envs.PROMETHEUS_FOLDER, raising=False)
    topology = ParallelTopology.of_rank(0, tp_size=1, dp_size=2)
    assert metrics.StepMetrics.if_wanted(topology, None) is None
    assert warnings == []
    monkeypatch.setenv("VLLM_NPU_METRICS", "1")
    assert metrics.StepMetrics.if_wanted(topology, None) is None
    assert ["PROMETHEUS_MULTIPROC_DIR is not set" in text for text in warnings] == [True]


def test_a_counter_that_begins_anew_takes_nothing_back(monkeypatch, tmp_path):
    from vllm_npu.plugin import metrics

    monkeypatch.setenv("VLLM_NPU_METRICS", "1")
    monkeypatch.setenv(envs.PROMETHEUS_FOLDER, str(tmp_path))
    counter = CollectiveCounter()
    counted = metrics.StepMetrics.if_wanted(ParallelTopology.of_rank(3, tp_size=1, dp_size=4), counter)
    for sent in (100, None, 30):
        counted.begin_step("naive", "naive", 1, is_fallback=False)
        if sent is None:
            counter.reset()
            sent = 7
        counter.add("dp", "broadcast", sent)
    counted.begin_step("naive", "naive", 1, is_fallback=False)
    assert metrics._series()["sent_bytes"].labels("naive", "3")._value.get() == 100 + 7 + 30


def test_the_dashboard_queries_only_what_is_exported():
    from vllm_npu.plugin.metrics import _series

    dashboard = json.loads((Path(__file__).resolve().parents[2] / "docs/grafana/vllm_npu.json").read_text())
    exported = {f"vllm_npu:moe_{name}_total" for name in _series()}
    labels = {label for counter in _series().values() for label in counter._labelnames}
    queried = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            names = set(re.findall(r"vllm\w*:\w+", target["expr"]))
            assert names, target["expr"]
            queried |= names
            grouped = {label.strip() for by in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in by.split(",")}
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert grouped | shown <= labels
            assert shown <= grouped
    assert queried == exported, "each series has a panel, and no panel asks for another one"
