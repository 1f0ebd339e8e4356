"""vLLM's platform, communicator and strategy manager on GPUs."""
