"""The vLLM plugin, and the only folder of the package that imports vllm in service. vLLM finds the two functions below by
entry points.

cpu/, gpu/ and ascend/ hold what runs on one platform. compat/ holds what depends on vLLM's release line. The other files run on
several platforms.
"""

from vllm_npu import envs
from vllm_npu.plugin import entry_points, release_lines


def register_platform() -> str | None:
    """Entry point of `vllm.platform_plugins`: the path of our platform class. None if vLLM must choose its own platform.

    Raises nothing, because vLLM ignores errors here. register_layers raises them, and vLLM shows those.
    """
    if entry_points.conflict() is not None:
        return None
    if entry_points.vllm_ascend_is_installed():
        return "vllm_npu.plugin.ascend.platform.AscendMoEPlatform"
    from vllm.platforms import cpu_platform_plugin, cuda_platform_plugin

    if cpu_platform_plugin() is not None:
        return "vllm_npu.plugin.cpu.platform.CpuMoEPlatform"
    if envs.CUDA_PLATFORM.read_flag() and cuda_platform_plugin() is not None:
        return "vllm_npu.plugin.gpu.platform.CudaMoEPlatform"
    return None


def register_layers() -> None:
    """Entry point of `vllm.general_plugins`: on a CPU, make vLLM build our MoE layers. Runs in every process of vLLM.

    On GPUs the layers stay vLLM's. On NPUs vllm-ascend builds its own layers first, so plugin/ascend/worker.py replaces their
    communication later.

    Raises PluginConflictError if vLLM would load vllm-ascend's platform too, and UnsupportedConfigError if vLLM's version is
    not supported.
    """
    from vllm_npu.errors import PluginConflictError

    conflict = entry_points.conflict()
    if conflict is not None:
        raise PluginConflictError(conflict)
    import vllm
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        if envs.CUDA_PLATFORM.read_flag():
            release_lines.check_version(vllm.__version__, on_gpus=True)
        return
    release_lines.check_version(vllm.__version__)
    vllm_ascend = entry_points.vllm_ascend_version()
    release_lines.check_base(vllm.__version__, vllm_ascend=vllm_ascend)
    if vllm_ascend is not None:
        return
    from vllm_npu.plugin.cpu.platform import CpuMoEPlatform

    if not isinstance(current_platform, CpuMoEPlatform):
        return
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.models.transformers.moe import TransformersMoERunner

    from vllm_npu.plugin import compat, custom_ops
    from vllm_npu.plugin.compat import fault_tolerance
    from vllm_npu.plugin.cpu.experts import CpuUnquantizedFusedMoEMethod
    from vllm_npu.plugin.cpu.moe_runner import CpuMoERunner, CpuTransformersMoERunner

    custom_ops.register()
    release = compat.current()
    release.register_out_of_tree(UnquantizedFusedMoEMethod, CpuUnquantizedFusedMoEMethod)
    release.register_out_of_tree(MoERunner, CpuMoERunner)
    release.register_out_of_tree(TransformersMoERunner, CpuTransformersMoERunner)
    release.mend_rotary_embeddings()
    release.open_eplb()
    fault_tolerance.take_engine_sentinel()
