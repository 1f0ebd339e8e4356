"""The sweep over MoE families judges rightly."""

import pytest

pytest.importorskip("typer")

from vllm_npu.cli.families import choose, table_of
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.tools.engines.engine_set import Generation
from vllm_npu.tools.families.registry import Family
from vllm_npu.tools.families.sweep import (
    AS_TRANSFORMERS,
    AS_VANILLA,
    CRASHED,
    EQUAL,
    REFUSED,
    WRONG,
    FamilyRow,
    cause_of,
    judge,
)

RIGHT, OTHER, THIRD = [[1, 2], [3]], [[1, 2], [4]], [[1, 5], [4]]


def generation(tokens, strategy="naive", ran="naive"):
    return Generation(
        strategy=strategy,
        tokens=tokens,
        seconds=1.0,
        counters=[{"strategy": ran}],
        smallest_margin=None,
        prompt_logprobs=None,
    )


@pytest.mark.parametrize(
    ("tokens", "vanilla", "verdict", "identical"),
    [
        (RIGHT, RIGHT, EQUAL, 3),
        (RIGHT, OTHER, AS_TRANSFORMERS, 3),
        (RIGHT, "KeyError: 'bias'", AS_TRANSFORMERS, 3),
        (OTHER, OTHER, AS_VANILLA, 3),
        (OTHER, RIGHT, WRONG, 2),
        (OTHER, THIRD, WRONG, 2),
        (OTHER, "KeyError: 'bias'", WRONG, 2),
    ],
)
def test_a_family_is_judged_by_transformers_and_by_vanilla_vllm(tokens, vanilla, verdict, identical):
    assert judge([generation(tokens)], vanilla, RIGHT)[::2] == (verdict, {"naive": identical})


def test_one_wrong_strategy_makes_the_family_wrong():
    both = [generation(RIGHT), generation(OTHER, "mc2", "mc2")]
    assert judge(both, RIGHT, RIGHT)[::2] == (WRONG, {"naive": 3, "mc2": 2})


def test_a_strategy_that_ran_as_another_one_is_wrong():
    verdict, reason, _ = judge([generation(RIGHT, ran="allgather")], RIGHT, RIGHT)
    assert (verdict, reason) == (WRONG, "naive ran as {'allgather'}")


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (
            "qwen TP1: the engine of rank 0 ended with exit status 1 while starting.\n"
            "(Worker pid=1) ERROR 11-29 14:10:11 [multiproc_executor.py:953] ValueError: no weights\n"
            "RuntimeError: Engine core initialization failed.",
            "ValueError: no weights",
        ),
        ("ValueError: first\npydantic: vllm_npu.errors.UnsupportedConfigError: named\nValueError: last", "named"),
        ("the engine gave no answer for 420 s while starting.", "the engine gave no answer for 420 s while starting."),
    ],
)
def test_the_cause_of_a_failure_is_the_line_that_names_it(log, cause):
    assert cause_of(log).endswith(cause)


def test_wrong_and_crashed_rows_are_faults_and_refused_ones_are_none():
    rows = {
        verdict: FamilyRow(family="a", architecture="A", topology="DP2×EP", verdict=verdict, reason="why")
        for verdict in (EQUAL, AS_TRANSFORMERS, AS_VANILLA, REFUSED, WRONG, CRASHED)
    }
    assert [verdict for verdict, row in rows.items() if row.is_fault] == [WRONG, CRASHED]
    assert table_of(list(rows.values())).row_count == len(rows)


def test_a_name_that_is_no_family_is_refused_with_the_names_that_are():
    found = [Family("MixtralForCausalLM", "mixtral"), Family("BailingMoeForCausalLM", None)]
    assert choose(found, []) == found
    assert choose(found, ["BailingMoeForCausalLM"]) == found[1:]
    with pytest.raises(UnsupportedConfigError, match=r"--only qwen: no MoE family.*mixtral, BailingMoeForCausalLM"):
        choose(found, ["mixtral", "qwen"])
