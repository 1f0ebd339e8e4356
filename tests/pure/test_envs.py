"""envs: defaults, empty variables, values that cannot be."""

import pytest

from vllm_npu import envs
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.tools.launch import ThreadRankPool

SWITCH = envs.COUNT_COLLECTIVES
SECONDS = envs.TRANSPORT_TIMEOUT


@pytest.mark.parametrize("variable", envs.VARIABLES, ids=lambda variable: variable.name)
def test_unset_and_empty_stand_for_the_default(variable, monkeypatch):
    monkeypatch.delenv(variable.name, raising=False)
    assert variable.read() == variable.default
    monkeypatch.setenv(variable.name, "")
    assert variable.read() == variable.default


@pytest.mark.parametrize("variable", envs.VARIABLES, ids=lambda variable: variable.name)
def test_a_variable_is_read_when_asked(variable, monkeypatch):
    monkeypatch.setenv(variable.name, "first")
    assert variable.read() == "first"
    monkeypatch.setenv(variable.name, "second")
    assert variable.read() == "second"


def test_the_table_lists_every_variable_once():
    declared = [value for value in vars(envs).values() if isinstance(value, envs.Variable)]
    assert sorted(each.name for each in envs.VARIABLES) == sorted(each.name for each in declared)
    assert len({each.name for each in declared}) == len(declared)
    assert all(each.name.startswith(("VLLM_NPU_", "HCCL_")) and each.meaning for each in declared)


@pytest.mark.parametrize(("text", "value"), [("0", False), ("1", True), ("", False)])
def test_a_switch_is_0_or_1(text, value, monkeypatch):
    monkeypatch.setenv(SWITCH.name, text)
    assert SWITCH.read_flag() is value


@pytest.mark.parametrize("text", ["2", "true", "yes", "-1", " 1", "01"])
def test_anything_else_is_no_switch(text, monkeypatch):
    monkeypatch.setenv(SWITCH.name, text)
    with pytest.raises(UnsupportedConfigError, match=f"{SWITCH.name}='{text}': not a switch; set it to 0 or 1"):
        SWITCH.read_flag()


@pytest.mark.parametrize(("text", "value"), [("3", 3.0), ("0.25", 0.25), ("1e3", 1000.0), ("", float(SECONDS.default))])
def test_seconds_are_a_positive_number(text, value, monkeypatch):
    monkeypatch.setenv(SECONDS.name, text)
    assert SECONDS.read_seconds() == value


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "-inf", "1e999", "1s", "soon"])
def test_anything_else_is_no_number_of_seconds(text, monkeypatch):
    monkeypatch.setenv(SECONDS.name, text)
    with pytest.raises(UnsupportedConfigError, match=f"{SECONDS.name}='{text}': not a positive number of seconds"):
        SECONDS.read_seconds()


@pytest.mark.parametrize(("text", "number"), [("1", 1), ("0", 0), ("", 200), ("x", None), ("-1", None), ("1.5", None)])
def test_a_whole_number(text, number, monkeypatch):
    monkeypatch.setenv(envs.HCCL_BUFFSIZE.name, text)
    if number is not None:
        assert envs.HCCL_BUFFSIZE.read_whole_number() == number
        return
    with pytest.raises(UnsupportedConfigError, match=f"HCCL_BUFFSIZE='{text}': not a whole number; set it to one"):
        envs.HCCL_BUFFSIZE.read_whole_number()


def test_a_bad_timeout_is_refused_before_any_rank_starts(monkeypatch):
    monkeypatch.setenv(SECONDS.name, "never")
    with pytest.raises(UnsupportedConfigError, match=SECONDS.name):
        ThreadRankPool(2)
    ThreadRankPool(2, timeout=1.0).close()
