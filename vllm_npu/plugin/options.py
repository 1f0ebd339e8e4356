"""What the user configured: --additional-config '{"vllm_npu": {...}}', with the environment as fallback. One reader."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_npu import envs
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.strategies import check_strategy
from vllm_npu.topology import ParallelTopology

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig

SECTION = "vllm_npu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The `vllm_npu` section of vLLM's additional_config."""

    moe_comm: str

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
        return cls(moe_comm=moe_comm or envs.MOE_COMM.read())


def topology_of(parallel_config: "ParallelConfig", *, tp_rank: int = 0, dp_rank: int = 0) -> ParallelTopology:
    """vLLM's parallel configuration as one rank sees it. Pipeline stages each have a grid of their own."""
    return ParallelTopology(
        tp_rank=tp_rank,
        tp_size=parallel_config.tensor_parallel_size,
        dp_rank=dp_rank,
        dp_size=parallel_config.data_parallel_size,
        expert_parallel=bool(parallel_config.enable_expert_parallel),
    )


def check_config(vllm_config: "VllmConfig") -> None:
    """Raise UnsupportedConfigError for what this package cannot serve, before any process is started."""
    parallel_config = vllm_config.parallel_config
    options = Options.of(vllm_config)
    topology = topology_of(parallel_config)
    if vllm_config.model_config is None or not vllm_config.model_config.is_moe:
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
