"""Data-parallel ranks pad a step alike."""

from pathlib import Path

import pytest

from tests.ascend.test_layer import LINE, run

PROGRAM = Path(__file__).with_name("padding_program.py")


@pytest.mark.skipif(LINE != "0.23", reason="vllm-ascend 0.30 has no padding that one rank decides")
def test_ranks_pad_a_step_if_all_of_them_replay_a_graph():
    # In the first case rank 0 has a prefill, so no rank replays a graph. vllm-ascend's rank 1 pads all the same.
    cases = [["NONE", "FULL"], ["FULL", "FULL"], ["NONE", "NONE"]]
    outcome, reports = run("A3", 1, 2, dtype="bfloat16", program=PROGRAM, tokens=[5, 1], cases=cases)
    assert outcome.code == 0, outcome.output
    before, after = ([report[when] for report in reports] for when in ("before", "after"))
    assert [[answer["counts"] for answer in rank] for rank in before] == [
        [[5, 1], [5, 5], [5, 1]],
        [[5, 5], [5, 5], [5, 1]],
    ]
    assert [[answer["counts"] for answer in rank] for rank in after] == [[[5, 1], [5, 5], [5, 1]]] * 2
    assert [answer["agreed"] for answer in after[0]] == ["NONE", "FULL", "NONE"]
