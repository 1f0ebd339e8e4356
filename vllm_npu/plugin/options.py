"""What the user configured: --additional-config '{"vllm_npu": {...}}', with the environment as fallback. One reader."""

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from vllm_npu import envs
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.strategies import AUTO, check_strategy
from vllm_npu.topology import ParallelTopology

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig

SECTION = "vllm_npu"


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

    moe_comm: str  # auto, or a strategy
    mode: Mode

    @classmethod
    def of(cls, vllm_config: "VllmConfig") -> "Options":
        """Read them. Raises UnsupportedConfigError for a key that does not exist, and for a value of another type."""
        section: Any = (vllm_config.additional_config or {}).get(SECTION, {})
        if not isinstance(section, dict):
            raise UnsupportedConfigError(f"additional_config[{SECTION!r}] is {section!r}; it must be a dictionary")
        unknown = sorted(set(section) - {"moe_comm"})
        if unknown:
            raise UnsupportedConfigError(
                f"additional_config[{SECTION!r}] has unknown keys {unknown}; there is: moe_comm"
            )
        moe_comm = section.get("moe_comm")
        if not isinstance(moe_comm, str | None):
            raise UnsupportedConfigError(
                f"additional_config[{SECTION!r}] has moe_comm={moe_comm!r}; it must be a string, the name of a strategy"
            )
        return cls.parse(moe_comm or envs.MOE_COMM.read())

    @classmethod
    def parse(cls, text: str) -> "Options":
        """The setting's text: a strategy, auto, off, compare, or compare:STRATEGY. The strategy's name is checked where the
        topology is known."""
        mode, _, strategy = text.partition(":")
        if mode == Mode.COMPARE.value:
            return cls(moe_comm=strategy or AUTO, mode=Mode.COMPARE)
        if text == Mode.OFF.value:
            return cls(moe_comm=AUTO, mode=Mode.OFF)
        return cls(moe_comm=text, mode=Mode.TAKE_OVER)


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
