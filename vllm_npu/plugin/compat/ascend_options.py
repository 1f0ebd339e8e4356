"""The section of this package in --additional-config, beside vllm-ascend's own options there.

This file is apart from v0_30.py because vllm_npu's platform calls it, and the platform is imported before vLLM's layers can be.
"""

from typing import Any

from vllm_ascend import ascend_config

from vllm_npu.plugin.options import SECTION


# COMPAT(vllm-ascend >= 0.24): AscendConfig refuses keys that it does not know. vLLM's config keeps our section, so that every
# process reads it there. vllm-ascend builds AscendConfig in every process, and there it must not see the section. vllm-ascend
# 0.23 ignores unknown keys, so this changes nothing there. CAN REMOVE when vllm-ascend leaves the keys of other plugins alone.
def hide_our_section() -> None:
    """Make vllm-ascend's AscendConfig ignore our section of additional_config. A second call in a process does nothing."""
    theirs = ascend_config.AscendConfig
    if theirs.__module__ == __name__:
        return

    class AscendConfig(theirs):  # type: ignore[misc, valid-type]
        """vllm-ascend's options, without our section."""

        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop(SECTION, None)
            super().__init__(*args, **options)

    ascend_config.AscendConfig = AscendConfig
