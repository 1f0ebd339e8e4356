"""`vllm-npu families`: every family of MoE models that vLLM and transformers both have, on expert-parallel CPUs."""
