"""On CPUs: vLLM's platform, communicator, worker, MoE runner and experts, replaced by subclasses of this package."""
