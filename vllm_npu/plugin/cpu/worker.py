"""vLLM's CPU worker with expert load balancing (EPLB)."""

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_npu.plugin import compat


class CpuMoEWorker(CPUWorker):
    """vLLM starts this worker if EPLB is on, and its own worker otherwise."""

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the model and start EPLB. Raises UnsupportedConfigError if the model's experts cannot be balanced."""
        release = compat.current()
        with release.unmovable_experts_explained():
            super().load_model(load_dummy_weights=load_dummy_weights)
        release.start_eplb(self.model_runner)
