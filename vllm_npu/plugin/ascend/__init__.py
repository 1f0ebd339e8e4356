"""On NPUs beside vllm-ascend: it brings worker, attention, quantisation, router and experts; what moves tokens is ours."""
