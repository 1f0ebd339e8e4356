"""The release lines of vLLM that this package supports, and on what. Standard library only: doctor reads it where neither
torch nor vLLM can be imported; plugin/compat refuses by it."""

from vllm_npu.errors import UnsupportedConfigError

# The module of each line: what differs between them is there.
SUPPORTED = {
    "0.23": "vllm_npu.plugin.compat.v0_23",
    "0.32": "vllm_npu.plugin.compat.v0_32",
}
BESIDE_VLLM_ASCEND = frozenset({"0.23"})  # the lines that are supported on NPUs, and there only

# On GPUs the layers stay vLLM's: what the CUDA platform calls is the same in these, so there is no module for it.
CUDA_LINES = ("0.23", "0.32")


def release_line(version: str) -> str:
    """'0.32.0+cpu' -> '0.32'."""
    return ".".join(version.split(".")[:2])


def check_version(version: str, *, on_gpus: bool = False) -> None:
    """Raise UnsupportedConfigError unless the version of vLLM is of a supported line."""
    lines = CUDA_LINES if on_gpus else tuple(SUPPORTED)
    if release_line(version) not in lines:
        raise UnsupportedConfigError(
            f"vLLM {version} is not supported by vllm_npu{' on GPUs' if on_gpus else ''}; supported release lines: "
            f'{", ".join(lines)}. Install one of them, or keep vllm_npu out with VLLM_PLUGINS=""'
        )


def check_base(version: str, *, vllm_ascend_is_installed: bool) -> None:
    """Raise UnsupportedConfigError where the version of vLLM needs vllm-ascend and lacks it, or has it and is not supported
    so."""
    if release_line(version) in BESIDE_VLLM_ASCEND and not vllm_ascend_is_installed:
        raise UnsupportedConfigError(
            f"vLLM {version} is supported on NPUs only, beside vllm-ascend, and vllm-ascend or torch_npu is not installed; "
            "install both, or on CPUs a vLLM of another line: "
            f"{', '.join(sorted(set(SUPPORTED) - BESIDE_VLLM_ASCEND))}"
        )
    if release_line(version) not in BESIDE_VLLM_ASCEND and vllm_ascend_is_installed:
        raise UnsupportedConfigError(
            f"vllm-ascend is installed beside vLLM {version}, and is supported beside {', '.join(sorted(BESIDE_VLLM_ASCEND))} "
            "only; uninstall vllm-ascend, or install that vLLM"
        )
