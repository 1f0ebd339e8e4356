"""On NPUs beside vllm-ascend. vllm-ascend brings attention, quantisation, router and experts. This package moves the tokens."""
