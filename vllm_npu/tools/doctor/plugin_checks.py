"""doctor's checks of the plugins that vLLM would load. Standard library only."""

import importlib.metadata
import os
from collections.abc import Iterator

from vllm_npu.plugin import entry_points, release_lines
from vllm_npu.tools.doctor.findings import OK, PROBLEM, WARNING, Finding
from vllm_npu.tools.doctor.installed import installed


def check_plugins() -> Iterator[Finding]:
    conflict = entry_points.conflict()
    if conflict is not None:
        yield Finding("plugins", PROBLEM, *conflict.split(". ", 1))
        return
    points = {(point.name, point.value) for point in importlib.metadata.entry_points(group=entry_points.PLATFORMS)}
    listed = ", ".join(sorted(f"{name} = {value}" for name, value in points))
    chosen = os.environ.get("VLLM_PLUGINS")
    active = {name for name, _ in points if chosen is None or name in chosen.split(",")}
    if "vllm_npu" not in {name for name, _ in points}:
        yield Finding("plugins", PROBLEM, "vLLM would not find vllm_npu", "pip install -e . in the checkout")
    elif entry_points.vllm_ascend_is_installed() and "vllm_npu" in active:
        yield from check_beside_vllm_ascend()
    elif "vllm_npu" not in active:
        yield Finding(
            "plugins", WARNING, f"VLLM_PLUGINS={chosen} keeps vllm_npu out", "add vllm_npu to it, or unset it"
        )
    elif len(active) > 1:
        yield Finding(
            "plugins", WARNING, f"several platform plugins, and vLLM stops if two of them accept this machine: {listed}",
            "set VLLM_PLUGINS to the one that you want, e.g. VLLM_PLUGINS=vllm_npu",
        )  # fmt: skip
    else:
        yield Finding("plugins", OK, listed)


def check_beside_vllm_ascend() -> Iterator[Finding]:
    """Whether VLLM_PLUGINS loads vllm-ascend's general plugins, which vllm_npu's platform needs on vllm-ascend."""
    points = importlib.metadata.entry_points(group=entry_points.GENERAL)
    names = {point.name for point in points if point.value.startswith("vllm_ascend:")}
    left_out = sorted(name for name in names if not entry_points.is_loaded(name))
    if left_out:
        yield Finding(
            "plugins", WARNING, f"vllm_npu on vllm-ascend, without vllm-ascend's {', '.join(left_out)}",
            f"export {entry_points.without(entry_points.ASCEND_PLATFORM)}",
        )  # fmt: skip
    else:
        supported = release_lines.ascend_pairs()
        yield Finding("plugins", OK, f"vllm_npu on vllm-ascend {installed('vllm-ascend')}; supported: {supported}")


def check_target_device() -> Iterator[Finding]:
    if os.environ.get("VLLM_TARGET_DEVICE", "").lower() == "cpu":
        yield Finding(
            "VLLM_TARGET_DEVICE", PROBLEM, "is cpu, and then vLLM ignores platforms that are not its own: vllm_npu too",
            "unset VLLM_TARGET_DEVICE",
        )  # fmt: skip
