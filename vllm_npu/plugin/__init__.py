"""The vLLM plugin, and the only place that imports vllm. vLLM finds the two functions below by entry points."""

from vllm_npu import envs
from vllm_npu.plugin import entry_points, release_lines


def register_platform() -> str | None:
    """Entry point of `vllm.platform_plugins`: the platform class for this vLLM build, or None to stay out of the way.

    Raises nothing: vLLM ignores errors here. What is wrong is said by register_layers, whose errors vLLM shows.
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
    """Entry point of `vllm.general_plugins`: on a CPU, replace vLLM's MoE layers by ours; on GPUs they stay vLLM's. Runs in
    every process of vLLM.

    Beside vllm-ascend the worker does that, when vllm-ascend has put its own layers in.

    Raises PluginConflictError where vllm-ascend's platform is to be loaded too, UnsupportedConfigError where vLLM's version
    is not supported.
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
    on_ascend = entry_points.vllm_ascend_is_installed()
    release_lines.check_base(vllm.__version__, vllm_ascend_is_installed=on_ascend)
    if on_ascend:
        return
    from vllm_npu.plugin.cpu.platform import CpuMoEPlatform

    if not isinstance(current_platform, CpuMoEPlatform):
        return
    from vllm_npu.plugin import compat, custom_ops
    from vllm_npu.plugin.cpu import experts, moe_runner

    custom_ops.register()
    experts.register()
    moe_runner.register()
    compat.current().open_eplb()
