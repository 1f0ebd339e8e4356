"""The checks of `vllm-npu doctor`, and what they find. Standard library only, except engine_findings."""
