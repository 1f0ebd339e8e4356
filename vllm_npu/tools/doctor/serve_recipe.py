"""What doctor needs of a script that starts `vllm serve`. Standard library only.

Variables of the shell stay as they are written, so an option that doctor reads needs its value.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from vllm_npu.errors import InvalidInputError
from vllm_npu.tools.doctor.findings import OK, PROBLEM, Finding
from vllm_npu.tools.json_option import read_object
from vllm_npu.tools.serve_script import read_script

LEAVE_OUT = 'leave it out, or keep vllm-ascend\'s own communication: {"vllm_npu": {"moe_comm": "off"}}'
OPTIONS_OF_VARIABLES = {  # vllm-ascend 0.23 reads these variables as options of --additional-config
    "VLLM_ASCEND_ENABLE_FUSED_MC2": "enable_fused_mc2",
    "VLLM_ASCEND_ENABLE_FLASHCOMM1": "enable_flashcomm1",
}
NOT_IN_GRAPHS = "captured steps take mc2, allgather or naive: where all2all is asked for, allgather"
# What happens to an option of vllm serve. The others are vLLM's own, and this package does not read them.
TAKEN = {
    "enable_expert_parallel": "each rank has whole experts, and tokens travel to them",
    "enforce_eager": "no graphs, so each step may take its own strategy",
    "compilation_config": NOT_IN_GRAPHS,
    "speculative_config": "each step of a drafter is planned and voted on as any other",
    "quantization": "experts in W8A8, W4A8 and W4A16 are served, and others refused when the layers are built",
    "kv_transfer_config": "a node that computes prompts runs as any other; what a decode node does, the next row says",
    "enable_lora": "adapters on experts need vllm-ascend 0.30 and --enforce-eager; --lora-target-modules may keep them to other"
    " layers",
    "enable_dbo": "vllm-ascend turns it off with a warning, so no step has two micro-batches, with or without this package",
    "enable_eplb": "vllm-ascend balances and moves the experts; tokens go to the replicas that it names",
}
HARMLESS = "1"  # the value with which an option of the next table is not refused
REFUSED = {
    "enable_lora": "with data parallelism, each rank numbers the adapters itself, which goes wrong on experts; "
    "--lora-target-modules may keep them to other layers",
    "prefill_context_parallel_size": "prefill context parallelism was never run with the strategies of this package",
    "enable_fault_tolerance": "vLLM has no hook by which the groups of HCCL could be opened anew after a failure",
    "worker_cls": "vllm_npu replaces vllm-ascend's own worker only",
}
DECODE_NODE = "a decode node's ranks take mc2 without counts; with another moe_comm they agree on counts"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeRecipe:
    """One `vllm serve` command and the variables set before it."""

    model: str
    tp: int = 1
    dp: int = 1
    max_num_seqs: int | None = None
    additional_config: dict[str, Any] = field(default_factory=dict)  # with what the variables add
    enable_lora: bool = False
    options: dict[str, str] = field(
        default_factory=dict
    )  # the other options that doctor has a row for, as they are written
    variables: dict[str, str] = field(default_factory=dict)


def read_recipe(script: str) -> ServeRecipe:
    """Read a script. Raises InvalidInputError if it has no `vllm serve` command or several, or values that no one can read."""
    read = read_script(script)
    variables = read.variables
    given = _parse(read.arguments)
    chosen = vars(given)
    additional = {
        option: _number(name, variables[name]) for name, option in OPTIONS_OF_VARIABLES.items() if name in variables
    }
    on_experts = any("experts" in target for target in given.lora_target_modules or ["experts"])
    if given.enable_lora and not (on_experts and given.data_parallel_size > 1):
        chosen["enable_lora"] = HARMLESS
    return ServeRecipe(
        model=given.model or given.model_tag or "",
        tp=given.tensor_parallel_size,
        dp=given.data_parallel_size,
        max_num_seqs=given.max_num_seqs,
        additional_config=additional | read_object("--additional-config", given.additional_config),
        enable_lora=given.enable_lora,
        options={name: str(chosen[name]) for name in (*TAKEN, *REFUSED) if chosen[name] not in (None, False)},
        variables=variables,
    )


def recipe_rows(options: Mapping[str, str], variables: Mapping[str, str]) -> Iterator[Finding]:
    """What happens to each option of vllm serve and each variable of vllm-ascend."""
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if name in REFUSED and value != HARMLESS:
            yield Finding(
                "recipe", PROBLEM, f"{option} {value}: {REFUSED[name]}, so the engine does not start", LEAVE_OUT
            )
        elif name in TAKEN:
            yield Finding("recipe", OK, f"{option}: {TAKEN[name]}")
        if name == "kv_transfer_config" and "kv_consumer" in value:
            yield Finding("recipe", OK, f"{option} with kv_consumer: {DECODE_NODE}")
    if "enable_expert_parallel" not in options:
        yield Finding(
            "recipe",
            OK,
            "without --enable-expert-parallel: each rank has a part of every expert; allgather or naive runs",
        )
    for name, value in variables.items():
        if name == "VLLM_USE_V2_MODEL_RUNNER" and value not in ("", "0"):
            yield Finding(
                "recipe",
                PROBLEM,
                f"{name}={value}: model runner V2 asks for a method before a step is planned",
                LEAVE_OUT,
            )
        elif name.startswith("VLLM_ASCEND_") and name not in OPTIONS_OF_VARIABLES:
            yield Finding("recipe", OK, f"{name}={value}: vllm-ascend's own; this package does not read it")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidInputError(f"the recipe's vllm serve: {message}; write the value into the recipe")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the options that doctor reads."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("model_tag", nargs="?")
    parser.add_argument("--model")
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    parser.add_argument("--data-parallel-size", "-dp", type=int, default=1)
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--additional-config", default="{}")
    for flag in (
        "--enable-lora",
        "--enable-expert-parallel",
        "--enforce-eager",
        "--enable-eplb",
        "--enable-dbo",
        "--enable-fault-tolerance",
    ):
        parser.add_argument(flag, action="store_true")
    for option in (
        "--compilation-config",
        "--speculative-config",
        "--quantization",
        "--kv-transfer-config",
        "--worker-cls",
    ):
        parser.add_argument(option)
    parser.add_argument("--prefill-context-parallel-size")
    parser.add_argument("--lora-target-modules", nargs="+")
    given, _ = parser.parse_known_args(arguments)
    return given


def _number(name: str, value: str) -> int:
    if not value.isdecimal():
        raise InvalidInputError(f"{name}={value} is no number; write the value into the recipe")
    return int(value)
