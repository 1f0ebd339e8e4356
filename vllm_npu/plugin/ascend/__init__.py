"""On NPUs, beside vllm-ascend: vllm-ascend computes attention, routing and experts, and this package moves the tokens."""
