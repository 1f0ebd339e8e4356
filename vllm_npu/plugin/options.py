"""The user's options: --additional-config '{"vllm_npu": {...}}', and the environment for what it leaves out."""

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from vllm_npu import envs
from vllm_npu.all2all import MANAGERS
from vllm_npu.core.ascend_recipes import FusedMC2Asked, FusedOperator
from vllm_npu.core.limits import DEVICES, PORTABLE
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.strategies.select import check_strategy
from vllm_npu.strategies.table import AUTO
from vllm_npu.trust.self_test import MODES, QUICK

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig

SECTION = "vllm_npu"
KEYS: dict[str, tuple[type, str]] = {
    "moe_comm": (str, "a string, the name of a strategy"),
    "all2all": (str, f"a string, one of {', '.join(MANAGERS)}"),
    "flashinfer_all_reduce": (bool, "true or false"),
    "self_test": (str, f"a string, one of {', '.join(MODES)}"),
    "fault_tolerance": (str, "a string, off or retry"),
}
RETRY = "retry"
FAULT_TOLERANCES = ("off", RETRY)


# Refuses no strategy that an NPU can run beside vllm-ascend. check_engine knows the chip, and what vllm-ascend prepared.
SOME_NPU = replace(DEVICES["A3"], fused_mc2_asked=FusedMC2Asked(FusedOperator.FFN_COMBINE, max_rows=1))


class Mode(Enum):
    """What this package does with vllm-ascend's own MoE communication. Other platforms know TAKE_OVER only."""

    TAKE_OVER = "take over"
    """Our strategies replace vllm-ascend's communication."""

    COMPARE = "compare"
    """Both ways run on the input of every layer. Differences are logged, and the layer returns vllm-ascend's output."""

    OFF = "off"
    """vllm-ascend's communication stays, and this package changes nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of one engine. A process reads them once, and passes them on."""

    moe_comm: str  # auto, or the name of a strategy
    mode: Mode
    exchange: str | None  # moe_comm as the user wrote it; None if neither the section nor the environment has it
    all2all: str | None  # a name in all2all.MANAGERS; GPUs only
    flashinfer_all_reduce: bool  # GPUs only
    self_test: str  # the test of collectives at the first step: quick, full or off
    retries: bool = False  # fault_tolerance=retry: all ranks meet in a new epoch after a failed step; CPUs only

    @classmethod
    def of(cls, vllm_config: "VllmConfig") -> "Options":
        """Read the `vllm_npu` section of additional_config. Raises UnsupportedConfigError for an unknown key, for a value of
        another type, and for an unknown self_test or fault_tolerance."""
        section: Any = (vllm_config.additional_config or {}).get(SECTION, {})
        if not isinstance(section, dict):
            raise UnsupportedConfigError(f"additional_config[{SECTION!r}] is {section!r}; it must be a dictionary")
        unknown = sorted(set(section) - set(KEYS))
        if unknown:
            raise UnsupportedConfigError(
                f"additional_config[{SECTION!r}] has unknown keys {unknown}; there are: {', '.join(KEYS)}"
            )
        for key, (kind, meaning) in KEYS.items():
            if not isinstance(section.get(key), kind | None):
                raise UnsupportedConfigError(
                    f"additional_config[{SECTION!r}] has {key}={section[key]!r}; it must be {meaning}"
                )
        self_test = section.get("self_test") or QUICK
        if self_test not in MODES:
            raise UnsupportedConfigError(
                f"additional_config[{SECTION!r}] has self_test={self_test!r}; there are: {', '.join(MODES)}"
            )
        fault_tolerance = section.get("fault_tolerance") or FAULT_TOLERANCES[0]
        if fault_tolerance not in FAULT_TOLERANCES:
            raise UnsupportedConfigError(
                f"additional_config[{SECTION!r}] has fault_tolerance={fault_tolerance!r}; there are: "
                f"{', '.join(FAULT_TOLERANCES)}"
            )
        named = section.get("moe_comm") or None
        moe_comm, mode = parse_moe_comm(named or envs.MOE_COMM.read())
        return cls(
            moe_comm=moe_comm,
            mode=mode,
            exchange=named or envs.MOE_COMM.read_if_set(),
            all2all=section.get("all2all") or None,
            flashinfer_all_reduce=bool(section.get("flashinfer_all_reduce")),
            self_test=self_test,
            retries=fault_tolerance == RETRY,
        )


def parse_moe_comm(text: str) -> tuple[str, Mode]:
    """Split the text of moe_comm into strategy and mode. It is a strategy, auto, off, compare, or compare:STRATEGY.

    The name of the strategy is not checked here: that needs the topology.
    """
    mode, _, strategy = text.partition(":")
    if mode == Mode.COMPARE.value:
        return strategy or AUTO, Mode.COMPARE
    if text == Mode.OFF.value:
        return AUTO, Mode.OFF
    return text, Mode.TAKE_OVER


def topology_of(parallel_config: "ParallelConfig", *, tp_rank: int = 0, dp_rank: int = 0) -> ParallelTopology:
    """The topology of one rank in vLLM's parallel configuration. Each pipeline stage has a grid of its own."""
    return ParallelTopology(
        tp_rank=tp_rank,
        tp_size=parallel_config.tensor_parallel_size,
        dp_rank=dp_rank,
        dp_size=parallel_config.data_parallel_size,
        expert_parallel=bool(parallel_config.enable_expert_parallel),
    )


def check_config(vllm_config: "VllmConfig", *, beside_vllm_ascend: bool = False) -> Options:
    """The options of an engine on CPUs or NPUs. Runs before any process starts.

    Raises UnsupportedConfigError for options, environment variables and settings of vLLM that this package cannot serve.
    """
    envs.check_variables()
    parallel_config = vllm_config.parallel_config
    options = Options.of(vllm_config)
    topology = topology_of(parallel_config)
    for key, value in (("all2all", options.all2all), ("flashinfer_all_reduce", options.flashinfer_all_reduce)):
        if value:
            raise UnsupportedConfigError(f"{key}={value!r} is for GPUs; leave it out here, or choose moe_comm")
    if options.mode is not Mode.TAKE_OVER and not beside_vllm_ascend:
        raise UnsupportedConfigError(
            f"moe_comm={options.mode.value} is about vllm-ascend's own MoE communication, and this engine does not run on "
            "vllm-ascend; name a strategy, or auto"
        )
    if options.mode is not Mode.OFF:
        # Not at the top: it imports vLLM.
        from vllm_npu.plugin.compat.fault_tolerance import check_retry, refuse_fault_tolerance

        if options.retries:
            check_retry(vllm_config, on_cpus=not beside_vllm_ascend)
        else:
            refuse_fault_tolerance(parallel_config)
    if options.mode is Mode.OFF or vllm_config.model_config is None or not vllm_config.model_config.is_moe:
        return options
    check_strategy(options.moe_comm, topology, device=SOME_NPU if beside_vllm_ascend else PORTABLE)
    if parallel_config.prefill_context_parallel_size > 1:
        raise UnsupportedConfigError(
            "prefill context parallelism is not supported with MoE models; set --prefill-context-parallel-size 1"
        )
    if topology.world_size == 1:
        return options
    # vllm-ascend turns it off afterwards, with a warning, so beside it no step has two micro-batches.
    if parallel_config.enable_dbo and not beside_vllm_ascend:
        raise UnsupportedConfigError("dual batch overlap is not supported; start vLLM without --enable-dbo")
    check_expert_placement(parallel_config)
    return options


def check_expert_placement(parallel_config: "ParallelConfig") -> None:
    """Raise UnsupportedConfigError unless each rank owns consecutive experts."""
    if parallel_config.expert_placement_strategy != "linear":
        raise UnsupportedConfigError(
            f"expert placement {parallel_config.expert_placement_strategy!r} is not supported; set "
            "--expert-placement-strategy linear"
        )
