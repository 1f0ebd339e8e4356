"""`vllm-npu verify`: what it runs, what it says of a strategy that is wrong, and what it refuses."""

import json

import pytest
import typer

from vllm_npu.cli import verify as command
from vllm_npu.cli.verify import verify
from vllm_npu.errors import TransportError, UnsupportedConfigError
from vllm_npu.strategies.table import STRATEGIES


def test_all_cases_of_every_strategy_pass_and_are_counted(tmp_path, capsys):
    report = tmp_path / "verify.json"
    verify(ranks=2, quick=True, json_path=report)
    written = json.loads(report.read_text())
    assert written["failed"] == {}
    assert set(written["strategies"]) == set(STRATEGIES)
    assert sum(written["strategies"].values()) == written["cases"] >= 40
    assert (written["transport"], written["device"], written["ranks"]) == ("threaded", "CPU", 2)
    assert f"verify: {written['cases']} cases, 0 failed" in capsys.readouterr().out


def test_drawn_cases_are_as_many_as_asked_for(tmp_path):
    report = tmp_path / "verify.json"
    verify(ranks=2, random_count=7, strategy="all2all", json_path=report)
    assert json.loads(report.read_text())["strategies"] == {"all2all": 7}


def test_a_wrong_result_and_an_error_are_failures_with_their_case(monkeypatch, capsys, tmp_path):
    """Every case is wrong here, every other one by an error: 20 are shown, and all are written."""
    runs = iter(range(1000))

    def wrong(rank, case):
        if next(runs) // 2 % 2:
            raise TransportError("all_gather", "ep", rank.rank, "gone")
        return f"rank {rank.rank}: row 3 is off" if rank.rank == 1 else None

    monkeypatch.setattr(command, "run_case", wrong)
    report = tmp_path / "verify.json"
    with pytest.raises(typer.Exit) as ended:
        verify(ranks=2, quick=True, json_path=report)
    assert ended.value.exit_code == 1
    written, shown = json.loads(report.read_text()), capsys.readouterr().out
    assert len(written["failed"]) == written["cases"]
    assert shown.count("FAILED") == command.SHOWN_FAILURES
    assert "rank 1: row 3 is off" in shown
    assert "TransportError: " in shown
    assert f"... and {written['cases'] - command.SHOWN_FAILURES} more" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "mc3"}, "unknown strategy 'mc3'"),
        ({"transport": "mpi"}, "unknown transport 'mpi'"),
        ({"transport": "symmetric", "strategy": "mc2"}, "--transport symmetric is for strategy symmetric"),
        ({"ranks": 1, "strategy": "mc2"}, "mc2 cannot run on 1 ranks on CPU"),
        ({"strategy": "symmetric", "random_count": 3}, "no random cases for symmetric here"),
    ],
)
def test_what_cannot_run_is_refused(options, message):
    with pytest.raises(UnsupportedConfigError, match=message):
        verify(**options)
