"""vLLM's platform, worker, MoE runner and experts on CPUs."""
