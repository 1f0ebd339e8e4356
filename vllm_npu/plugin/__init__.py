"""The vLLM plugin, and the only place that imports vllm. vLLM finds the two functions below by entry points."""

from vllm_npu import envs


def register_platform() -> str | None:
    """Entry point of `vllm.platform_plugins`: the platform class for this vLLM build, or None to stay out of the way.

    Raises nothing: vLLM ignores errors here. What is wrong is said by register_layers, whose errors vLLM shows.
    """
    from vllm.platforms import cpu_platform_plugin, cuda_platform_plugin

    if cpu_platform_plugin() is not None:
        return "vllm_npu.plugin.platform.NPUPlatformOnCPU"
    if envs.CUDA_PLATFORM.read_flag() and cuda_platform_plugin() is not None:
        return "vllm_npu.plugin.cuda_platform.NPUPlatformOnCUDA"
    return None


def register_layers() -> None:
    """Entry point of `vllm.general_plugins`: on a CPU, replace vLLM's MoE layers by ours; on GPUs they stay vLLM's. Runs in
    every process of vLLM.

    Raises UnsupportedConfigError where vLLM's version is not supported.
    """
    from vllm.platforms import current_platform

    from vllm_npu.plugin import compat

    if current_platform.is_cuda():
        if envs.CUDA_PLATFORM.read_flag():
            compat.check_version(on_gpus=True)
        return
    compat.check_version()
    from vllm_npu.plugin.platform import NPUPlatformOnCPU

    if not isinstance(current_platform, NPUPlatformOnCPU):
        return
    from vllm_npu.plugin import custom_ops, experts, moe_runner

    custom_ops.register()
    experts.register()
    moe_runner.register()
