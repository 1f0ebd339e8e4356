"""What `vllm-npu top` shows: the ranks of a running engine, from its /metrics or from its traces."""
