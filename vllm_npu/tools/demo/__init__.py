"""Runs of `vllm-npu demo`: every strategy in real vLLM on a tiny random model, token by token against a reference."""
