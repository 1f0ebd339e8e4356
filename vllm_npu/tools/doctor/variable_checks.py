"""doctor's check of environment variables: names that nothing reads, and values that a variable does not take.

Standard library only.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_npu import envs
from vllm_npu.emulator import soc
from vllm_npu.emulator.build import DEVICE
from vllm_npu.envs import Kind, Variable
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin import entry_points
from vllm_npu.strategies.table import AUTO, CHOICES, FUSED_STRATEGIES, STRATEGIES
from vllm_npu.tools.doctor.findings import OK, PROBLEM, WARNING, Finding

OTHER_VARIABLES = ("VLLM_NPU_ENV_HOME",)  # scripts/setup.sh and native_build.py read it


@dataclass(frozen=True, slots=True)
class Rule:
    """The values that a variable takes."""

    read: Callable[[Variable], object]  # raises UnsupportedConfigError for another value
    remedy: str = ""  # empty: the error's message


def fault_of(variable: Variable) -> str | None:
    """What to do about the variable's value in this process, or None if the variable takes it."""
    rule = RULES[variable]
    try:
        rule.read(variable)
    except UnsupportedConfigError as error:
        return rule.remedy or str(error)
    return None


def _one_of(*choices: str) -> Rule:
    def read(variable: Variable) -> None:
        if variable.read() not in choices:
            raise UnsupportedConfigError(f"{variable.name} is none of {', '.join(choices)}")

    return Rule(read, f"set it to {', '.join(choices[:-1])} or {choices[-1]}")


def _whole_number(largest: int) -> Rule:
    def read(variable: Variable) -> None:
        if variable.read_whole_number() > largest:
            raise UnsupportedConfigError(f"{variable.name} is more than {largest}")

    return Rule(read, f"set it to a whole number from 0 to {largest}")


def _read_strategy(variable: Variable) -> None:
    with_vllm_ascend = ("off", "compare", *FUSED_STRATEGIES, *(f"compare:{name}" for name in CHOICES))
    if variable.read() not in with_vllm_ascend or not entry_points.vllm_ascend_is_installed():
        _one_of(AUTO, *STRATEGIES).read(variable)


def _read_libraries(variable: Variable) -> None:
    if not Path(variable.read(), DEVICE.product).is_file():
        raise UnsupportedConfigError(f"it holds no {DEVICE.product}; unset it")


def _read_version(variable: Variable) -> None:
    if not re.fullmatch(r"\d+(\.\w+)+", variable.read()):
        raise UnsupportedConfigError("set it to a version, e.g. 8.5.0")


OF_KIND = {
    Kind.SWITCH: Rule(Variable.value, "set it to 0 or 1"),
    Kind.SWITCH_OR_UNSET: Rule(Variable.value, "set it to 0 or 1, or unset it"),
    Kind.SECONDS: Rule(Variable.value, "set it to a positive number of seconds"),
    Kind.TEXT: Rule(Variable.value),
}

# What each variable takes, beyond its kind. csrc_npu/emulator/runtime/settings.cpp reads the emulator's numbers, with these
# largest values.
RULES: Mapping[Variable, Rule] = {
    **{variable: OF_KIND[variable.kind] for variable in envs.VARIABLES if variable.kind in OF_KIND},
    envs.MOE_COMM: Rule(_read_strategy, _one_of(AUTO, *STRATEGIES).remedy),
    envs.HCCL_BUFFSIZE: _whole_number(2**31 - 1),
    envs.EMULATOR_SOC: Rule(lambda variable: soc.resolve(variable.read())),
    envs.EMULATOR_LIBRARIES: Rule(_read_libraries),
    envs.EMULATOR_ASYNC: _whole_number(2**64 - 1),
    envs.EMULATOR_DEVICES: _whole_number(1024),
    envs.EMULATOR_MEMORY_GB: _whole_number(1024),
    envs.EMULATOR_LIMITS: _one_of("device", "none"),
    envs.EMULATOR_UNDEFINED: _one_of("nan", "zero"),
    envs.EMULATOR_CANN: Rule(_read_version),
    envs.EMULATOR_LOG: _one_of("0", "1", "2", "3"),
}


def check_variables() -> Iterator[Finding]:
    known = {variable.name: variable for variable in envs.VARIABLES}
    ours = {name for name in os.environ if name.startswith("VLLM_NPU_")} - set(OTHER_VARIABLES)
    names = sorted(ours | (known.keys() & os.environ.keys()))
    for name in names:
        text = os.environ[name]
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"unset it; there are: {', '.join(known)}"
            yield Finding(name, WARNING, f"is set to {text!r}, and nothing reads it", remedy)
        elif text and (fault := fault_of(known[name])):
            yield Finding(name, PROBLEM, f"is set to {text!r}, which it does not take", fault)
        else:
            yield Finding(name, OK, f"is set to {text!r}: {known[name].meaning}")
