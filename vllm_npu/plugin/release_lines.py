"""The release lines of vLLM that this package supports, and the devices of each line.

This file imports no torch and no vLLM, because doctor reads it on machines that cannot import them.
"""

from vllm_npu.errors import UnsupportedConfigError

# The module that holds what is particular to a line.
SUPPORTED = {
    "0.23": "vllm_npu.plugin.compat.v0_23",
    "0.32": "vllm_npu.plugin.compat.v0_32",
}
BESIDE_VLLM_ASCEND = frozenset({"0.23"})  # lines that are supported on NPUs only

# On GPUs the MoE layers stay vLLM's. The CUDA platform calls the same names in all these lines, so it needs no module.
CUDA_LINES = ("0.23", "0.32")


def release_line(version: str) -> str:
    """'0.32.0+cpu' -> '0.32'."""
    return ".".join(version.split(".")[:2])


def check_version(version: str, *, on_gpus: bool = False) -> None:
    """Raise UnsupportedConfigError unless this version of vLLM belongs to a supported line."""
    lines = CUDA_LINES if on_gpus else tuple(SUPPORTED)
    if release_line(version) not in lines:
        raise UnsupportedConfigError(
            f"vLLM {version} is not supported by vllm_npu{' on GPUs' if on_gpus else ''}; supported release lines: "
            f'{", ".join(lines)}. Install one of them, or keep vllm_npu out with VLLM_PLUGINS=""'
        )


def check_base(version: str, *, vllm_ascend_is_installed: bool) -> None:
    """Raise UnsupportedConfigError if this version of vLLM needs vllm-ascend and it is missing, or does not support it and
    it is installed."""
    if release_line(version) in BESIDE_VLLM_ASCEND and not vllm_ascend_is_installed:
        raise UnsupportedConfigError(
            f"vLLM {version} is supported on NPUs only, beside vllm-ascend, and vllm-ascend or torch_npu is not installed; "
            "install both, or on CPUs another release line of vLLM: "
            f"{', '.join(sorted(set(SUPPORTED) - BESIDE_VLLM_ASCEND))}"
        )
    if release_line(version) not in BESIDE_VLLM_ASCEND and vllm_ascend_is_installed:
        raise UnsupportedConfigError(
            f"vllm-ascend is installed beside vLLM {version}, and vllm_npu supports it only beside vLLM "
            f"{', '.join(sorted(BESIDE_VLLM_ASCEND))}; uninstall vllm-ascend, or install that vLLM"
        )
