"""What the user configured: --additional-config '{"vllm_npu": {...}}', with the environment as fallback. One reader."""

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from vllm_npu import envs
from vllm_npu.all2all import FLASHINFER, GATHERING, MANAGERS, manager_row
from vllm_npu.core.limits import NVLINK
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
}


class Mode(Enum):
    """What happens to vllm-ascend's own MoE communication, where vllm-ascend is the base."""

    TAKE_OVER = "take over"
    """Our strategies run in its place."""

    COMPARE = "compare"
    """Both run on every layer's input; differences are logged, and vllm-ascend's result is used."""

    OFF = "off"
    """vllm-ascend is left alone entirely."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The `vllm_npu` section of vLLM's additional_config."""

    moe_comm: str  # auto, or a strategy; the environment's where the section names none
    mode: Mode
    exchange: str | None  # a strategy, where the section or the environment names one
    all2all: str | None  # a manager of all2all.MANAGERS; GPUs only
    flashinfer_all_reduce: bool  # GPUs only
    self_test: str  # of collectives, at the first step: quick, full or off

    @classmethod
    def of(cls, vllm_config: "VllmConfig") -> "Options":
        """Read them. Raises UnsupportedConfigError for a key that does not exist, and for a value of another type."""
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
        named = section.get("moe_comm") or None
        moe_comm, mode = parse_moe_comm(named or envs.MOE_COMM.read())
        return cls(
            moe_comm=moe_comm,
            mode=mode,
            exchange=named or envs.MOE_COMM.read_if_set(),
            all2all=section.get("all2all") or None,
            flashinfer_all_reduce=bool(section.get("flashinfer_all_reduce")),
            self_test=self_test,
        )


def parse_moe_comm(text: str) -> tuple[str, Mode]:
    """The setting's text, a strategy, auto, off, compare, or compare:STRATEGY, as strategy and mode. The strategy's name is
    checked where the topology is known."""
    mode, _, strategy = text.partition(":")
    if mode == Mode.COMPARE.value:
        return strategy or AUTO, Mode.COMPARE
    if text == Mode.OFF.value:
        return AUTO, Mode.OFF
    return text, Mode.TAKE_OVER


def topology_of(parallel_config: "ParallelConfig", *, tp_rank: int = 0, dp_rank: int = 0) -> ParallelTopology:
    """vLLM's parallel configuration as one rank sees it. Pipeline stages each have a grid of their own."""
    return ParallelTopology(
        tp_rank=tp_rank,
        tp_size=parallel_config.tensor_parallel_size,
        dp_rank=dp_rank,
        dp_size=parallel_config.data_parallel_size,
        expert_parallel=bool(parallel_config.enable_expert_parallel),
    )


def check_config(vllm_config: "VllmConfig", *, beside_vllm_ascend: bool = False) -> None:
    """Raise UnsupportedConfigError for what this package cannot serve, before any process is started."""
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
    if options.mode is Mode.OFF or vllm_config.model_config is None or not vllm_config.model_config.is_moe:
        return
    check_strategy(options.moe_comm, topology)
    if parallel_config.prefill_context_parallel_size > 1:
        raise UnsupportedConfigError(
            "prefill context parallelism is not supported with MoE models; set --prefill-context-parallel-size 1"
        )
    if topology.world_size == 1:
        return
    if parallel_config.enable_dbo:
        raise UnsupportedConfigError("dual batch overlap is not supported; start vLLM without --enable-dbo")
    if parallel_config.expert_placement_strategy != "linear":
        raise UnsupportedConfigError(
            f"expert placement {parallel_config.expert_placement_strategy!r} is not supported; set "
            "--expert-placement-strategy linear"
        )


def check_cuda_config(vllm_config: "VllmConfig") -> str | None:
    """vLLM's all2all_backend that goes with what is asked for on GPUs; None: leave vLLM's choice. Raises
    UnsupportedConfigError for what cannot be served, before any process is started."""
    parallel_config, model_config = vllm_config.parallel_config, vllm_config.model_config
    options = Options.of(vllm_config)
    if options.flashinfer_all_reduce:
        FLASHINFER.require("flashinfer_all_reduce")
    if options.all2all is None and options.exchange is None:
        return None
    if options.all2all is not None and options.exchange is not None:
        raise UnsupportedConfigError(
            f"all2all={options.all2all!r} and moe_comm={options.exchange!r} each say how tokens travel; give one of them"
        )
    if parallel_config.enable_eplb:
        raise UnsupportedConfigError(
            "EPLB moves experts between ranks, and these exchanges know their first places only"
        )
    if parallel_config.expert_placement_strategy != "linear":
        raise UnsupportedConfigError(
            f"expert placement {parallel_config.expert_placement_strategy!r} is not supported; set "
            "--expert-placement-strategy linear"
        )
    if options.all2all is not None:
        return manager_row(options.all2all).backend
    check_strategy(options.exchange or AUTO, topology_of(parallel_config), device=NVLINK)
    if options.exchange == "all2all" and model_config is not None and not model_config.enforce_eager:
        raise UnsupportedConfigError(
            "moe_comm all2all reads sizes on the host, so no CUDA graph can hold it; set --enforce-eager, or choose symmetric "
            "or allgather"
        )
    return GATHERING
