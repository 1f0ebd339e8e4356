"""What `vllm-npu doctor` finds in the environment's variables: those that nothing reads, and values that they do not take."""

import difflib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from vllm_npu import envs
from vllm_npu.emulator import soc
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin import entry_points
from vllm_npu.strategies.table import AUTO, STRATEGIES
from vllm_npu.tools.doctor.findings import OK, PROBLEM, WARNING, Finding

OTHER_VARIABLES = ("VLLM_NPU_ENV_HOME",)  # scripts/setup.sh reads it


def is_one_of(*choices: str) -> Callable[[str], str | None]:
    return lambda text: None if text in choices else f"set it to {', '.join(choices[:-1])} or {choices[-1]}"


def is_whole_number(largest: int) -> Callable[[str], str | None]:
    def fault(text: str) -> str | None:
        fits = re.fullmatch("[0-9]+", text) and int(text) <= largest
        return None if fits else f"set it to a whole number from 0 to {largest}"

    return fault


def is_seconds(text: str) -> str | None:
    try:
        return None if 0 < float(text) < float("inf") else "set it to a positive number of seconds"
    except ValueError:
        return "set it to a positive number of seconds"


def is_soc(text: str) -> str | None:
    try:
        soc.resolve(text)
    except UnsupportedConfigError as error:
        return str(error)
    return None


def is_libraries(text: str) -> str | None:
    return None if Path(text, "libascendcl.so").is_file() else "it holds no libascendcl.so; unset it"


def is_strategy(text: str) -> str | None:
    strategies = (AUTO, *STRATEGIES)
    beside_vllm_ascend = ("off", "compare", *(f"compare:{name}" for name in strategies))
    if text in beside_vllm_ascend and entry_points.vllm_ascend_is_installed():
        return None
    return is_one_of(*strategies)(text)


def is_version(text: str) -> str | None:
    return None if re.fullmatch(r"\d+(\.\w+)+", text) else "set it to a version, e.g. 8.5.0"


# What each variable takes: a function from its text to what is to be done, or None. Numbers as runtime/settings.cpp reads them.
VALUES: dict[envs.Variable, Callable[[str], str | None]] = {
    envs.MOE_COMM: is_strategy,
    envs.CUDA_PLATFORM: is_one_of("0", "1"),
    envs.COUNT_COLLECTIVES: is_one_of("0", "1"),
    envs.METRICS: is_one_of("0", "1"),
    envs.SHARED_WINDOW: is_one_of("0", "1"),
    envs.HCCL_OPS: is_one_of("0", "1"),
    envs.HCCL_BUFFSIZE: is_whole_number(2**31 - 1),
    envs.RECORD: lambda text: None,
    envs.TRANSPORT_TIMEOUT: is_seconds,
    envs.COLLECTIVE_DEADLINE: is_seconds,
    envs.EMULATOR: is_one_of("0", "1"),
    envs.EMULATOR_SOC: is_soc,
    envs.EMULATOR_LIBRARIES: is_libraries,
    envs.EMULATOR_RUN: lambda text: None,
    envs.EMULATOR_TRACE: is_one_of("0", "1"),
    envs.EMULATOR_ASYNC: is_whole_number(2**64 - 1),
    envs.EMULATOR_DEVICES: is_whole_number(1024),
    envs.EMULATOR_MEMORY_GB: is_whole_number(1024),
    envs.EMULATOR_LIMITS: is_one_of("device", "none"),
    envs.EMULATOR_UNDEFINED: is_one_of("nan", "zero"),
    envs.EMULATOR_CANN: is_version,
    envs.EMULATOR_LOG: is_one_of("0", "1", "2", "3"),
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
        elif text and (fault := VALUES[known[name]](text)):
            yield Finding(name, PROBLEM, f"is set to {text!r}, which it does not take", fault)
        else:
            yield Finding(name, OK, f"is set to {text!r}: {known[name].meaning}")
